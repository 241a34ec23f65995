"""Files and words merged by Hydra: search path, primary config, defaults list; and its complaints in our words.

Hydra looks for plugins in every installed package, and merges a dozen configs of its own (jobs, logging, sweepers) into
each composition. A run that names none of Hydra's keys needs neither: `merge_files` leaves them out.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config import conf_files, recipe_checks
from runner.config.command_line import Checked, Request
from runner.config.did_you_mean import unknown_key
from runner.config.provenance import COMMAND_LINE, Origin, display_path, origins_in_file
from runner.config.schema_keys import known_keys
from runner.config.yaml_files import load
from runner.errors import Problem, RequestError
from runner.paths import CONF, RECIPES


@dataclass(frozen=True)
class Primary:
    """The config that a composition starts from."""

    name: str
    folders: tuple[Path, ...] = field(default=())


def primary_of(request: Request) -> Primary:
    """Name of the primary config and the folder it needs in the search path."""
    if request.recipe is None:
        return Primary("config")
    file = recipe_checks.find_recipe(request.recipe, request.config_dirs)
    problems = recipe_checks.recipe_problems(file, request.folders)
    if problems:
        raise RequestError(*problems)
    return Primary(file.stem, (file.resolve().parent,))


@contextmanager
def hydra_over(request: Request, primary: Primary) -> Iterator[Hydra]:
    """Hydra over the user's folders, `conf/`, and the recipe's folder, in that order."""
    search = create_config_search_path(None)
    for folder in _folders(request, primary):
        search.prepend("main", f"file://{folder.resolve()}", SearchPathQuery(provider="schema"))
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    try:
        with _quiet():
            yield Hydra.create_main_hydra2("runner", search)
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a recipe may leave `_self_` out: it comes last anyway
        with interruptible():
            yield


def _folders(request: Request, primary: Primary) -> tuple[Path, ...]:
    return (*(folder for folder in request.config_dirs if os.path.isdir(folder)), CONF, *primary.folders, RECIPES)


def merge_config(checked: Checked, primary: Primary) -> tuple[DictConfig, Mapping[str, str | None]]:
    """Merge files and words; the config, and the choice of each group."""
    if found := _without_hydra(checked, primary):
        return found.config, found.defaults.overrides.known_choices
    with hydra_over(checked.request, primary) as hydra:
        config = hydra.compose_config(primary.name, checked.for_hydra, RunMode.RUN, with_log_configuration=False)
        return config, config.hydra.runtime.choices


def _without_hydra(checked: Checked, primary: Primary) -> Merged | None:
    if any(override.is_hydra_override() for override in checked.overrides):
        return None
    version.setbase("1.3")
    with _quiet():
        return merge_files(_folders(checked.request, primary), primary.name, checked.for_hydra)


@contextmanager
def interruptible() -> Iterator[None]:
    """A Ctrl-C stays one. One in twenty meets OmegaConf with a node half set, over which its own clean-up then fails:
    that error would be taken for a mistake in the config."""
    try:
        yield
    except Exception as error:
        before: BaseException | None = error
        while before is not None:
            if isinstance(before, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            before = before.__context__
        raise


@contextmanager
def as_request_error(checked: Checked) -> Iterator[None]:
    """Hydra's, OmegaConf's and YAML's own complaints in one line, with the file or word they are about."""
    try:
        with interruptible():
            yield
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{display_path(Path(mark.name))}:{mark.line + 1}" if mark else checked.request.recipe
        raise RequestError(conf_files.broken_yaml_problem(error, place)) from None
    except RecursionError:
        what = "a defaults list leads back to its own file, and would never end"
        raise RequestError(Problem(what, checked.request.recipe, "name another file there, or _self_")) from None
    except UnicodeDecodeError as error:
        raise RequestError(Problem(f"a YAML file is not UTF-8: {error.reason}", checked.request.recipe)) from None
    except MISTAKES as error:
        raise RequestError(_complaint(error, checked)) from None


def _complaint(error: Exception, checked: Checked) -> Problem:
    """Its first line; where it comes from: a word that was typed, a line of the recipe, or the recipe."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("raised while composing config:"):
        del lines[0]  # a name of OmegaConf's alone
    what, remedy = re.sub(r"^In '.*?': ", "", lines[0]) if lines else "bad config", None
    if isinstance(cause, MissingConfigException):
        what = f"there is no {cause.missing_cfg_file}"
        remedy = f"one of {', '.join(cause.options)}" if cause.options else None
        if cause.missing_cfg_file == "hydra/sweeper/optuna":
            remedy = "pip install hydra-optuna-sweeper"
    if found := re.match(_NOT_DELETED, what):
        return _nothing_deleted(found[1], found[2], found[3])
    if any(override.key_or_group in what for override in checked.overrides):
        return Problem(what, COMMAND_LINE, remedy)
    source, key = checked.request.recipe, getattr(cause, "full_key", None)
    if source and key:
        lines_of_recipe = origins_in_file(recipe_checks.find_recipe(source, checked.request.config_dirs), "")
        source = next((o.place for o in lines_of_recipe if o.key == key), source)
    return Problem(f"{key}: {what}" if key else what, source, remedy)


_NOT_DELETED = r"Could not delete from config\. (?:'(.+)' does not exist|The value of '(.+)' is (.+) and not)"


def _nothing_deleted(unset: str | None, other: str, value: str) -> Problem:
    """`~key` where no file sets the key, and `~key=value` where it has another value."""
    if unset is None:
        return Problem(f"~{other}: it is {value}", COMMAND_LINE, f"write ~{other}")
    if unset not in known_keys():
        return unknown_key(unset, None, COMMAND_LINE)
    return Problem(f"~{unset}: no file sets it, so that it has its default already", COMMAND_LINE, "leave it out")


def file_origins(checked: Checked) -> Iterator[Origin]:
    """Every key set by the YAML files of the defaults list, in order."""
    primary = primary_of(checked.request)
    with as_request_error(checked):
        if found := _without_hydra(checked, primary):
            result = found.defaults
        else:
            with hydra_over(checked.request, primary) as hydra:
                result = hydra.config_loader.compute_defaults_list(primary.name, checked.for_hydra, RunMode.RUN)
    for item in result.defaults:
        if file := _file_of(item.config_path, checked.request, primary):
            yield from origins_in_file(file, item.package or "")


def _file_of(config_path: str | None, request: Request, primary: Primary) -> Path | None:
    """The file behind an entry of the defaults list; None for one that Hydra itself brings."""
    candidates = (folder / f"{config_path}.yaml" for folder in _folders(request, primary))
    return next((file for file in candidates if os.path.isfile(file)), None)


MISTAKES = (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError, OSError)
"""Raised for a wrong config: by Hydra also for a defaults list of numbers or nulls, and for a name that no file can
have."""


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
