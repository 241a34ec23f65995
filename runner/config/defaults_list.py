"""Checks of a recipe for what Hydra passes over in silence, or has only words about its own classes for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from runner.config import catalog
from runner.config.provenance import shown
from runner.errors import Problem
from runner.paths import RECIPES

Choices = list[tuple[yaml.Node, yaml.Node]]


def problems_in(file: Path, node: yaml.MappingNode, entries: list[yaml.Node], choices: Choices) -> Iterator[Problem]:
    """Mistakes in a file whose defaults list has these `entries`, some of which are `choices`."""
    yield from _overruled(file, entries, choices, len(node.value) > 1)
    yield from _circles(file)
    yield from _of_hydra(file, node)
    yield from _misshapen(file, node)


def group_of(key: str) -> str:
    """`override /model@x` → `model`."""
    return re.sub(r"^(override|optional)\s+", "", key).removeprefix("/").split("@")[0]


def _overruled(file: Path, entries: list[yaml.Node], choices: Choices, sets: bool) -> Iterator[Problem]:
    """What a defaults list names and Hydra passes over: a second choice of a group, values that stand before a base."""
    first: dict[str, tuple[str, int]] = {}
    for key, choice in choices:
        group, line = group_of(key.value), key.start_mark.line + 1
        if group in first and key.value.startswith("override "):
            name, before = first[group]
            what = f"{group} is chosen twice: {name} in line {before}, and {choice.value} here"
            yield Problem(what, f"{shown(file)}:{line}", "leave one of the two lines")
        elif key.value.startswith("override "):
            first[group] = (str(choice.value), line)
    names = [str(entry.value) for entry in entries if isinstance(entry, yaml.ScalarNode)]
    if sets and "_self_" in names and (later := names[names.index("_self_") + 1 :]):
        own = next(entry for entry in entries if entry.value == "_self_")
        what = f"_self_ stands before {later[-1]}, which would overwrite what this file sets"
        yield Problem(what, f"{shown(file)}:{own.start_mark.line + 1}", "write - _self_ last")


def _circles(file: Path) -> Iterator[Problem]:
    """A recipe whose bases lead back to one of them, which Hydra would follow without end."""
    seen, below = [file.resolve()], [file.resolve()]
    while below:
        here = below.pop()
        for entry in catalog.read(here).get("defaults") or []:
            base = _base(here, entry) if isinstance(entry, str) else None
            if base == here or base == file.resolve():
                what = f"{shown(here)} builds on {entry}, which is {'itself' if base == here else 'built on it'}"
                remedy = f"call {here.name} another name" if entry in catalog.recipes() else "name config there"
                yield Problem(what, shown(here), remedy)
            elif base and base not in seen:
                seen.append(base)
                below.append(base)


def _base(file: Path, name: str) -> Path | None:
    """The recipe that Hydra takes for an entry of a defaults list; `file` itself, too."""
    found = (folder / f"{name.removesuffix('.yaml')}.yaml" for folder in (file.resolve().parent, RECIPES))
    return next((f.resolve() for f in found if f.is_file()), None)


def _misshapen(file: Path, node: yaml.MappingNode) -> Iterator[Problem]:
    """A list where a group's keys belong, and a key that is empty: Hydra's words for them are about its own classes."""
    for key, value in node.value:
        place = f"{shown(file)}:{key.start_mark.line + 1}"
        if key.tag.endswith(":null"):
            yield Problem("a key is empty", place, "write key: value")
        elif isinstance(value, yaml.SequenceNode) and key.value != "defaults":
            yield Problem(f"{key.value}: expected a mapping of keys, not a list", place, f"write {key.value}: {{…}}")


def _of_hydra(file: Path, node: yaml.MappingNode) -> Iterator[Problem]:
    """Settings of Hydra's that this runner decides, as they are refused on the command line."""
    settings = next((value for key, value in node.value if key.value == "hydra"), None)
    for key, _ in settings.value if isinstance(settings, yaml.MappingNode) else ():
        if key.value not in ("sweeper", "launcher"):
            what = f"hydra.{key.value}: this runner decides it itself"
            remedy = "leave it out; run.output_dir is where runs go"
            yield Problem(what, f"{shown(file)}:{key.start_mark.line + 1}", remedy)
