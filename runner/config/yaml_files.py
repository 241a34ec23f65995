"""YAML as OmegaConf reads it (`2e-5` is a number, a key that stands twice is an error), parsed by libyaml if installed.

libyaml is faster than PyYAML's own parser, which is asked again about a file with a mistake: its messages
are those that users and the tests know.
"""

from __future__ import annotations

from functools import cache
from typing import IO, Any

import yaml


def load(stream: IO[str]) -> Any:
    """The content of a YAML file, open at its beginning; YAMLError with the file's name and line."""
    return _parsed(stream, lambda loader: loader.get_single_data())


def compose(stream: IO[str]) -> yaml.Node | None:
    """Its nodes, with the line of each; YAMLError as `load`, but for keys that stand twice."""
    node: yaml.Node | None = _parsed(stream, lambda loader: loader.get_single_node())
    return node


def _parsed(stream: IO[str], read: Any) -> Any:
    fast, careful = _loaders()
    try:
        return _read(fast, stream, read)
    except yaml.YAMLError:
        stream.seek(0)
        return _read(careful, stream, read)


def _read(kind: type[Any], stream: IO[str], read: Any) -> Any:
    loader = kind(stream)
    try:
        return read(loader)
    finally:
        loader.dispose()


@cache
def _loaders() -> tuple[type[Any], type[Any]]:
    """OmegaConf's loader over libyaml's parser, where PyYAML was built with it, and as it is."""
    from omegaconf._utils import get_yaml_loader  # a pod imports this module, and has no OmegaConf

    careful: type[Any] = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return careful, careful

    parser: Any = vars(yaml.cyaml)["CParser"]  # its types leave it out

    class Fast(parser, careful):  # type: ignore[misc]  # bases known at run time
        def __init__(self, stream: IO[str]) -> None:
            parser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Fast, careful
