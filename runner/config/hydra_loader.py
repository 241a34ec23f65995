"""YAML files as Hydra merges them, without its plugins and its own config.

Hydra looks for plugins in every installed package, and merges a dozen configs of its own (jobs, logging, sweepers) into
each composition. A run that names none of Hydra's keys needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.yaml_files import load

MISTAKES = (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError)
"""Raised for a wrong config: the last four by Hydra for a defaults list of numbers, lists or nulls."""


@dataclass(frozen=True)
class Merged:
    """A primary config, its defaults list and the words of a command line in one."""

    config: DictConfig
    defaults: DefaultsList


def merge_files(folders: Iterable[Path], name: str, words: Sequence[str]) -> Merged | None:
    """None where a file or a word is Hydra's own, and where Hydra has something to say: both are left to it."""
    overrides = OverridesParser.create().parse_overrides(list(words))
    files = _Files(folders)
    try:
        found = create_defaults_list(files, name, overrides, prepend_hydra=False, skip_missing=False)
        loader = _Loader(files)
        config = loader._compose_config_from_defaults_list(found.defaults, files)
        OmegaConf.set_struct(config, True)
        loader._apply_overrides_to_config(found.config_overrides, config)
    except MISTAKES:
        return None
    return None if "hydra" in config else Merged(config, found)


class _Files(ConfigRepository):
    """The `.yaml` files of some folders, of which the first that has a config wins; each is read once."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.sources: list[ConfigSource] = [_Folder("main", f"file://{folder.resolve()}") for folder in folders]
        self._known: dict[str, ConfigResult | None] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        """None for a config that is in no folder."""
        if config_path not in self._known:
            found = super().load_config(config_path)
            if found is not None:
                found.is_schema_source = True  # RunSpec is the schema: none is to be looked for by the file's name
            self._known[config_path] = found
        return self._known[config_path]


class _Folder(FileConfigSource):
    def load_config(self, config_path: str) -> ConfigResult:
        with open(Path(self.path, self._normalize_file_name(config_path)), encoding="utf-8") as stream:
            header = self._get_header_dict(stream.read(512))
            stream.seek(0)
            content = load(stream)
        if content is not None and not isinstance(content, (list, dict, str)):
            raise OSError(f"Invalid loaded object type: {type(content).__name__}")  # as OmegaConf.load does
        config = OmegaConf.create({} if content is None else content)
        return ConfigResult(self.provider, self.full_path(), config, header)


class _Loader(ConfigLoaderImpl):
    def __init__(self, files: ConfigRepository) -> None:
        self.repository = files
