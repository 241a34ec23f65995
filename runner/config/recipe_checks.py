"""Recipe files: found by name or path, their defaults lists checked with line numbers before Hydra reads them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from runner.config import conf_files, other_trainers, yaml_files
from runner.config.did_you_mean import as_defaults_line, misplaced_choices, nearest, unknown_choice
from runner.config.provenance import display_path, flattened
from runner.errors import Problem, RequestError
from runner.paths import RECIPES

Choices = list[tuple[yaml.Node, yaml.Node]]
_BASE = "begin it with: defaults: [config, _self_]"


def find_recipe(recipe: str, folders: tuple[Path, ...] = ()) -> Path:
    """The file behind `recipe=NAME`, of a user's own `folders` or a shipped one, or a path; RequestError for none."""
    file = Path(recipe).expanduser()
    own = (folder / f"{recipe.removesuffix('.yaml')}.yaml" for folder in folders)
    if not os.path.isfile(file) and (found := next((f for f in own if os.path.isfile(f)), None)):
        return found
    if recipe in conf_files.recipes():
        return RECIPES / f"{recipe}.yaml"
    if file.suffix not in (".yaml", ".yml") or not os.path.isfile(file):
        near = nearest(file.stem, conf_files.recipes())
        remedy = f"did you mean recipe={near}?" if near else "python -m runner list recipes shows them"
        raise RequestError(Problem(f"there is no recipe {recipe!r}", "command line", remedy))
    if file.suffix == ".yml" and (theirs := other_trainers.problems_in(file)):
        raise RequestError(*theirs)
    if file.name != f"{file.stem}.yaml" or file.stem == "config":  # Hydra reads .yaml only, and config is the main job
        name = "my_recipe" if file.stem == "config" else file.stem
        raise RequestError(Problem(f"a recipe cannot be called {file.name}", "command line", f"call it {name}.yaml"))
    return file


def whole_run_file(recipe: str, folders: tuple[Path, ...] = ()) -> Path | None:
    """The file behind `recipe=NAME` where it holds a whole run, as `show` prints it and a run keeps it; else None."""
    file = Path(recipe).expanduser()
    with suppress(RequestError, OSError):  # told when it is composed
        file = file if os.path.isfile(file) else find_recipe(recipe, folders)
        content = conf_files.read_file(file)
        if "defaults" not in content and all(isinstance(content.get(group), dict) for group in conf_files.GROUPS):
            return file
    return None


def recipe_problems(file: Path, folders: tuple[Path, ...]) -> list[Problem]:
    """Mistakes in the defaults list of a recipe, with a user's own `folders` of choices; YAMLError if it is broken."""
    with file.open(encoding="utf-8") as stream:  # a stream, so that an error knows the file's name
        node = yaml_files.compose(stream)
    if not isinstance(node, yaml.MappingNode):
        return [Problem(f"{display_path(file)} is not a recipe: it holds no keys", None, _BASE)]
    if theirs := other_trainers.problems_in(file):
        return theirs
    listed = next((value for key, value in node.value if key.value == "defaults"), None)
    entries = listed.value if isinstance(listed, yaml.SequenceNode) else [listed] if listed else []
    choices = [pair for entry in entries if isinstance(entry, yaml.MappingNode) for pair in entry.value]
    if not isinstance(listed, yaml.SequenceNode) or not any(
        isinstance(entry, yaml.ScalarNode) and entry.value != "_self_" for entry in entries
    ):
        return _baseless(file, choices, node, folders)
    found = [p for group, choice in choices for p in _problems_of_entry(group, choice, display_path(file), folders)]
    found += _overruled(file, entries, choices, len(node.value) > 1)
    return [*found, *_circles(file), *_of_hydra(file, node), *_misshapen(file, node)]


def _baseless(file: Path, choices: Choices, node: yaml.MappingNode, folders: tuple[Path, ...]) -> list[Problem]:
    """Problems of a recipe without `config` in its defaults list, and of each choice that stands elsewhere."""
    found, lines = [], []
    outside = [(key, value) for key, value in node.value if isinstance(value, yaml.ScalarNode)]
    for key, value in [*choices, *((k, v) for k, v in outside if k.value in conf_files.GROUPS)]:
        group = group_of(key.value)
        if group in conf_files.GROUPS and isinstance(value, yaml.ScalarNode):
            place = f"{display_path(file)}:{key.start_mark.line + 1}"
            entry, rest = as_defaults_line(group, value.value, folders)
            lines.append(f"  {entry}")
            if (key, value) in outside:
                found.append(misplaced_choices(group, value.value, place, folders))
            elif rest or value.value not in conf_files.options(group, folders):
                found.append(unknown_choice(group, value.value, conf_files.options(group, folders), place))
    what = f"{display_path(file)} builds on nothing: its defaults list does not name config"
    block = ["begin it with:", "defaults:", "  - config", *dict.fromkeys(lines), "  - _self_"]
    return [Problem(what, None, "\n".join(block) if lines else _BASE), *found]


def choices_and_keys(file: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, str], dict[str, object]]:
    """Choices of a recipe by group, and the dotted keys it sets, those of recipes it builds on included."""
    choices: dict[str, str] = {}
    keys: dict[str, Any] = {}
    content = conf_files.read_file(file.resolve())
    listed = content.get("defaults")
    for entry in listed if isinstance(listed, list) else ():  # else `recipe_problems` says so
        if isinstance(entry, dict):
            choices |= {re.sub(r"^(override|optional)\s+", "", str(k)).lstrip("/"): str(v) for k, v in entry.items()}
        elif (base := _base(file, str(entry))) is not None and base not in (file.resolve(), *above):
            below = choices_and_keys(base, (*above, base))
            choices, keys = below[0] | choices, below[1] | keys
    return choices, keys | dict(flattened({k: v for k, v in content.items() if k != "defaults"}))


def _problems_of_entry(key: yaml.Node, choice: yaml.Node, file: str, folders: tuple[Path, ...]) -> Iterator[Problem]:
    """Problems of `override /group: choice`."""
    place = f"{file}:{key.start_mark.line + 1}"
    group = group_of(key.value)
    if group.startswith("hydra/") or not isinstance(choice, yaml.ScalarNode):
        return
    names = conf_files.options(group, folders)
    if not names:
        near = nearest(group, conf_files.GROUPS)
        yield Problem(f"there is no group {group!r}", place, near and f"did you mean override /{near}?")
    elif choice.value not in names:
        yield unknown_choice(group, choice.value, names, place)
    elif group in conf_files.GROUPS and not key.value.startswith("override "):
        yield Problem(f"{group} is chosen twice: in config and here", place, f"write override /{group}: {choice.value}")


def group_of(key: str) -> str:
    """`override /model@x` → `model`."""
    return re.sub(r"^(override|optional)\s+", "", key).removeprefix("/").split("@")[0]


def _overruled(file: Path, entries: list[yaml.Node], choices: Choices, sets: bool) -> Iterator[Problem]:
    """Entries of a defaults list that Hydra passes over: a second choice of a group, values that stand before a
    base."""
    first: dict[str, tuple[str, int]] = {}
    for key, choice in choices:
        group, line = group_of(key.value), key.start_mark.line + 1
        if group in first and key.value.startswith("override "):
            name, before = first[group]
            what = f"{group} is chosen twice: {name} in line {before}, and {choice.value} here"
            yield Problem(what, f"{display_path(file)}:{line}", "leave one of the two lines")
        elif key.value.startswith("override "):
            first[group] = (str(choice.value), line)
    names = [str(entry.value) for entry in entries if isinstance(entry, yaml.ScalarNode)]
    if sets and "_self_" in names and (later := names[names.index("_self_") + 1 :]):
        own = next(entry for entry in entries if entry.value == "_self_")
        what = f"_self_ stands before {later[-1]}, which would overwrite what this file sets"
        yield Problem(what, f"{display_path(file)}:{own.start_mark.line + 1}", "write - _self_ last")


def _circles(file: Path) -> Iterator[Problem]:
    """A recipe whose bases lead back to one of them, which Hydra would follow without end."""
    seen, below = [file.resolve()], [file.resolve()]
    while below:
        here = below.pop()
        for entry in conf_files.read_file(here).get("defaults") or []:
            base = _base(here, entry) if isinstance(entry, str) else None
            if base == here or base == file.resolve():
                what = f"{display_path(here)} builds on {entry}, which is {'itself' if base == here else 'built on it'}"
                remedy = f"call {here.name} another name" if entry in conf_files.recipes() else "name config there"
                yield Problem(what, display_path(here), remedy)
            elif base and base not in seen:
                seen.append(base)
                below.append(base)


def _base(file: Path, name: str) -> Path | None:
    """The recipe that Hydra takes for an entry of a defaults list; `file` itself, too."""
    found = (folder / f"{name.removesuffix('.yaml')}.yaml" for folder in (file.resolve().parent, RECIPES))
    return next((f.resolve() for f in found if os.path.isfile(f)), None)


def _misshapen(file: Path, node: yaml.MappingNode) -> Iterator[Problem]:
    """A list where a group's keys belong, and a key that is empty: Hydra's words for them are about its own classes."""
    for key, value in node.value:
        place = f"{display_path(file)}:{key.start_mark.line + 1}"
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
            yield Problem(what, f"{display_path(file)}:{key.start_mark.line + 1}", remedy)
