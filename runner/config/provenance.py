"""The origin of every value: a line of a YAML file, or the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runner.config import yaml_files
from runner.paths import ASSETS

COMMAND_LINE = "command line"
"""The place of what was typed."""


@dataclass(frozen=True)
class Origin:
    """One place that sets a key; the last one wins."""

    key: str
    value: Any
    """The value as written there: an interpolation such as `${model.…}` is shown as such."""
    place: str
    """`command line`, or file and line, such as `conf/method/lora.yaml:7`."""

    def concerns(self, key: str) -> bool:
        """Return True if the origin sets `key`, a part of it, or a mapping that contains it."""
        return self.key == key or self.key.startswith(f"{key}.") or key.startswith(f"{self.key}.")


def origins_in_file(file: Path, package: str) -> Iterator[Origin]:
    """Every key a YAML file sets, with its line, placed below `package` (dotted; empty: top level)."""
    with file.open(encoding="utf-8") as stream:
        node = yaml_files.compose(stream)
    if isinstance(node, yaml.MappingNode):
        yield from _walk(node, package, display_path(file))


def display_path(file: Path) -> str:
    """A path as a user would recognise it: below the project, or below the working directory."""
    for base in (Path.cwd(), ASSETS):
        if file.resolve().is_relative_to(base.resolve()):
            return str(file.resolve().relative_to(base.resolve()))
    return str(file)


def flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; an empty mapping counts as a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _walk(node: yaml.MappingNode, prefix: str, file: str) -> Iterator[Origin]:
    for key_node, value_node in node.value:
        if not prefix and key_node.value == "defaults":
            continue
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, key, file)
        else:
            yield Origin(key, _plain(value_node), f"{file}:{key_node.start_mark.line + 1}")


def _plain(node: yaml.Node) -> object:
    """The text of a scalar, or a list of such."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    return node.value
