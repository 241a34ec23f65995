"""YAML as OmegaConf reads it (`2e-5` is a number, a key that stands twice is an error), parsed by libyaml if installed.

libyaml is faster than PyYAML's own parser, which is asked again about a file with a mistake: its messages
are those that users and the tests know.
"""

from __future__ import annotations

import re
from typing import IO, Any

import yaml

DEEPEST = 100
"""Levels of nesting. libyaml's composer calls itself for each: at some 20,000 it ends the process."""
MOST_VALUES = 100_000
"""With all aliases written out: a few lines of `[*a, *a]` can stand for billions."""


def load(stream: IO[str]) -> Any:
    """The content of a YAML file, open at its beginning; YAMLError with the file's name and line."""
    return _parsed(stream, lambda loader: loader.get_single_data())


def compose(stream: IO[str]) -> yaml.Node | None:
    """Its nodes, with the line of each; YAMLError as `load`, but for keys that stand twice."""
    node: yaml.Node | None = _parsed(stream, lambda loader: loader.get_single_node())
    return node


def _parsed(stream: IO[str], read: object) -> Any:
    try:
        _read(_Fast, stream, _check_size)
        stream.seek(0)
        return _read(_Fast, stream, read)
    except _TooMuchError:
        raise
    except yaml.YAMLError as error:
        stream.seek(0)
        try:
            return _read(_Careful, stream, read)
        except RecursionError:  # nested too deeply before the mistake, which was found first
            raise error from None


class _TooMuchError(yaml.MarkedYAMLError):
    """Nested too deeply, or too large with its aliases."""


def _check_size(loader: Any) -> None:
    """_TooMuchError before anything is built of such a file."""
    sizes: dict[Any, int] = {}
    open_ones: list[tuple[Any, int]] = []  # anchor, and values before it
    values = 0
    event: Any
    while not isinstance(event := loader.get_event(), yaml.StreamEndEvent):
        values += 1
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_ones]:
                raise _TooMuchError(None, None, f"*{event.anchor} contains itself", mark)
            values += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            sizes |= {anchor: values - before} if anchor else {}
        if len(open_ones) > DEEPEST:
            raise _TooMuchError(None, None, f"nested deeper than {DEEPEST} levels", mark)
        if values > MOST_VALUES:
            raise _TooMuchError(None, None, f"more than {MOST_VALUES:,} values", mark)


def _read(kind: type[Any], stream: IO[str], read: Any) -> Any:
    loader = kind(stream)
    try:
        return read(loader)
    finally:
        loader.dispose()


_FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Careful(yaml.SafeLoader):
    """As OmegaConf 2.3's loader (`get_yaml_loader`), which a pod does not have: `2e-5` is a number, a date is text, a
    repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
                continue
            if key.value in seen:
                what = "while constructing a mapping", node.start_mark
                raise yaml.constructor.ConstructorError(*what, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Careful.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Careful.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Careful.yaml_implicit_resolvers.items()
}
_Fast: type[Any] = _Careful
if yaml.__with_libyaml__:
    _parser: Any = vars(yaml.cyaml)["CParser"]  # its types leave it out

    class _OverLibyaml(_parser, _Careful):  # type: ignore[misc]  # a base known at run time
        def __init__(self, stream: IO[str]) -> None:
            _parser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    _Fast = _OverLibyaml
