"""The words of a command line, checked as far as possible before composition.

`key=value` is read by Hydra's own grammar; which choices there are is read off the folders.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, OverrideType
from hydra.errors import HydraException
from yaml import YAMLError

from runner.config import conf_files, recipe_checks
from runner.config.did_you_mean import nearest, unknown_choice
from runner.config.provenance import COMMAND_LINE
from runner.config.schema_keys import accepts_list, accepts_text, as_typed, only_text, quoted
from runner.errors import Problem, RequestError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class Request:
    """A request as typed, before anything is read."""

    recipe: str | None = None
    """Name of a recipe, or path of a YAML file; None means `conf/config.yaml`."""
    overrides: tuple[str, ...] = ()
    """`group=choice` and `key=value`, in the order they were typed."""
    config_dirs: tuple[Path, ...] = ()
    """A user's own folders with groups; they come before the project's."""
    spec_file: Path | None = None
    """A resolved run to repeat, instead of a recipe: a finished `spec.json`, or YAML as `show` prints it."""
    problems: tuple[Problem, ...] = ()
    """Problems of other words that were typed, told with the rest."""
    exchange: tuple[str, ...] = ()
    """Groups whose choice may be another one than in `spec_file`."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of the user's choices: the named ones, and that of the recipe."""
        try:
            beside = (recipe_checks.find_recipe(self.recipe, self.config_dirs).resolve().parent,) if self.recipe else ()
        except RequestError:
            beside = ()
        return (*(folder for folder in self.config_dirs if os.path.isdir(folder)), *beside)


@dataclass(frozen=True)
class Checked:
    """A request as far as it can be read, and what is wrong with the rest of it."""

    request: Request
    """Without `recipe=…` among its overrides."""
    overrides: tuple[Override, ...]
    problems: tuple[Problem, ...]
    unsure: frozenset[str]
    """Groups and keys that do not hold what the user meant for them."""

    @property
    def for_hydra(self) -> list[str]:
        """The overrides as Hydra is to see them."""
        return [for_hydra(override) for override in self.overrides]

    def without_sweeps(self) -> Checked:
        """The request that all points of a sweep share."""
        fixed = tuple(o for o in self.overrides if not o.is_sweep_override())
        varied = {o.key_or_group for o in self.overrides if o.is_sweep_override()}
        return replace(self, overrides=fixed, unsure=self.unsure | varied)


def check_request(request: Request, *, sweeping: bool = False) -> Checked:
    """Judge every word; `sweeping` allows several values for a key."""
    request, found = _lift_recipe(request)
    unsure = set(conf_files.GROUPS) if found else set()
    problems = [*request.problems, *found]
    for folder in request.config_dirs:
        if not os.path.isdir(folder):
            what = f"--config-dir {folder} is not a folder"
            problems.append(Problem(what, COMMAND_LINE, "name a folder with model/mine.yaml, say"))
        elif os.path.isfile(folder / "config.yaml"):
            what = f"--config-dir {folder} holds a config.yaml, which would take the place of the main job"
            problems.append(Problem(what, COMMAND_LINE, "call it another name, and start it with recipe=NAME"))
            request = replace(request, config_dirs=tuple(d for d in request.config_dirs if d != folder))
    if sweeping and request.spec_file:
        remedy = "start from a recipe, or repeat the run once per value"
        problems.append(Problem("a sweep cannot start from a resolved run", COMMAND_LINE, remedy))
    overrides: list[Override] = []
    for text in request.overrides:
        override, problem = _read(text, request, sweeping)
        if override and not problem:
            overrides.append(override)
        if problem:
            problems.append(problem)
            unsure.add(text.lstrip("+~").partition("=")[0])
    return Checked(request, (*_implied(request, overrides), *overrides), tuple(problems), frozenset(unsure))


IMPLIED = {
    "model.id": ("model", "hub"),
    "data.id": ("data", "hub"),
    "data.path": ("data", "file"),
    "data.sources": ("data", "file"),
}
"""Keys that say which choice they mean: `model.id=X` alone is `model=hub model.id=X`."""


def _implied(request: Request, overrides: list[Override]) -> list[Override]:
    """The choices that keys mean whose group nobody has named with them."""
    typed = {o.key_or_group for o in overrides if not o.is_delete()}
    if request.spec_file or not (request.recipe or typed & IMPLIED.keys()):
        return []
    chosen, written = _of_recipe(request)
    found: dict[str, str] = {}
    for key, (group, choice) in IMPLIED.items():
        by_recipe = key not in typed and group not in chosen and written.get(key) is not None
        if group not in typed and (
            by_recipe or (key in typed and not _takes(chosen.get(group), group, choice, request))
        ):
            found.setdefault(group, choice)
    return [OverridesParser.create().parse_override(f"{group}={choice}") for group, choice in found.items()]


def _takes(chosen: str | None, group: str, choice: str, request: Request) -> bool:
    """The recipe's own choice is one whose rows are named by such a key: `data/mine.yaml` with `source: file`."""
    if chosen is None or chosen not in conf_files.options(group, request.folders):
        return False
    return choice in (
        chosen,
        conf_files.load_choice(group, chosen, request.folders).get("source") if choice == "file" else None,
    )


def _of_recipe(request: Request) -> tuple[dict[str, str], dict[str, object]]:
    if request.recipe is None:
        return {}, {}
    try:
        return recipe_checks.choices_and_keys(recipe_checks.find_recipe(request.recipe, request.config_dirs))
    except (RequestError, YAMLError, OSError, ValueError, AttributeError, TypeError):
        return {}, {}  # told when it is composed


def for_hydra(override: Override) -> str:
    """A plain `key=value` becomes `++key=value`: the schema, not Hydra, knows which keys there are."""
    plain = override.type == OverrideType.CHANGE and not override.is_hydra_override()
    return f"{'++' if plain and override.key_or_group not in conf_files.GROUPS else ''}{override.input_line}"


def _lift_recipe(request: Request) -> tuple[Request, list[Problem]]:
    """Take `recipe=…` out of the overrides: it names the primary config."""
    named = [o.split("=", 1)[1] for o in request.overrides if o.startswith("recipe=")]
    rest = tuple(o for o in request.overrides if not o.startswith("recipe="))
    files = [str(file) for file in (request.recipe, request.spec_file) if file] + named
    if len(files) > 1:
        problem = Problem(f"{' and '.join(files)}: a run starts from one file", COMMAND_LINE, "name one of them")
    elif named and "," in named[0] and not os.path.isfile(os.path.expanduser(named[0])):
        remedy = "sweep over choices and values, such as method=lora,qlora4, or call the runner once per recipe"
        problem = Problem(f"recipe={named[0]}: a sweep cannot go over recipes", COMMAND_LINE, remedy)
    else:
        chosen = named[0] if named else request.recipe
        whole = recipe_checks.whole_run_file(chosen, request.config_dirs) if chosen else None
        if whole is not None:
            return replace(request, recipe=None, spec_file=whole, overrides=rest), []
        return replace(request, recipe=chosen, overrides=rest), []
    return replace(request, recipe=None, spec_file=None, overrides=rest), [problem]


def _read(text: str, request: Request, sweeping: bool) -> tuple[Override | None, Problem | None]:
    """One `key=value`, and what is wrong with it."""
    parser = OverridesParser.create()
    text = _plain_text(_environment_text(text, sweeping))
    try:
        override = parser.parse_override(text)
        parser.parse_override(for_hydra(override))  # stricter about the key
    except HydraException:
        return None, Problem(f"cannot read {text!r}", COMMAND_LINE, _how_to_quote(text))
    group = override.key_or_group
    if not group:
        return None, Problem(f"cannot read {text!r}", COMMAND_LINE, "write key=value")
    if override.is_hydra_override() and override.is_sweep_override():
        swept = text.lstrip("+").removeprefix(f"{PARAMS}.")
        remedy = f"write {swept}" if swept != text.lstrip("+") else "name one value"
        return None, Problem(f"{text}: a sweep cannot go over Hydra's own keys", COMMAND_LINE, remedy)
    if override.is_hydra_override() and (problem := _hydra_problem(group, sweeping)):
        return override, Problem(f"{text}: {problem[0]}", COMMAND_LINE, problem[1])
    if override.is_sweep_override() and not sweeping:
        remedy = "add -m to run once per value"
        if group not in conf_files.GROUPS:
            value = text.partition("=")[2]
            if accepts_list(group):
                remedy += f", or write a list: {group}=[{value}]"
            elif accepts_text(group):
                remedy += f", or quote it: {as_typed(group, value)}"
        return override, Problem(f"{text}: several values make a sweep", COMMAND_LINE, remedy)
    if (raw := _number(override)) and only_text(group):
        return override, Problem(f"{group}={raw}: expected text", COMMAND_LINE, f"quote it: {as_typed(group, raw)}")
    if group in conf_files.GROUPS:
        return override, _choice_problem(override, request)
    if any(os.path.isdir(folder / group) for folder in request.folders):
        near = nearest(group, conf_files.GROUPS)
        remedy = f"call the folder {near}, and write {near}=…" if near else f"one of {', '.join(conf_files.GROUPS)}"
        return None, Problem(f"there is no group {group!r}", COMMAND_LINE, remedy)
    return override, None


def _number(override: Override) -> str | None:
    """A number as it was typed, where Python would write it otherwise, or a truth value: `1e3`, `1_000`, `TRUE`."""
    raw = str(override.input_line).partition("=")[2]
    if override.is_sweep_override() or override.is_delete():
        return None
    value = override.value()
    return raw if isinstance(value, bool) or (isinstance(value, (int, float)) and str(value) != raw) else None


def _hydra_problem(key: str, sweeping: bool) -> tuple[str, str] | None:
    """Why one of Hydra's own keys would be ignored, and what to write."""
    if key.startswith(PRUNER):
        return NO_PRUNING
    if not key.startswith(("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")):
        return "this runner decides it itself", "leave it out; run.output_dir is where runs go"
    return None if sweeping else ("it has no effect on a single run", "add -m to sweep, or leave it out")


PARAMS = "hydra.sweeper.params"
"""Where a recipe writes the keys and values of a sweep."""
PRUNER = ("hydra.sweeper.pruner", "hydra/sweeper/pruner")
NO_PRUNING = (
    "Hydra's Optuna sweeper hears of whole runs only, and cannot prune one",
    "leave it out; eval.every_steps=50 eval.early_stopping_patience=3 ends a run that gets no better",
)


def _environment_text(word: str, sweeping: bool) -> str:
    """`hw.env.X=0,1` with its value quoted: an environment variable is a text, as written.

    `null`, an interpolation, and what is empty or quoted stay.
    """
    key, _, value = word.partition("=")
    if not re.fullmatch(r"\+{0,2}hw\.env\.\w+", key) or value in ("", "null") or value[0] in "'\"" or "${" in value:
        return word
    if sweeping and "," in value:
        return f"{key}={','.join(map(quoted, value.split(',')))}"
    return f"{key}={quoted(value)}"


def _plain_text(word: str) -> str:
    """`data.path=~/dö.jsonl` with its value quoted: Hydra's grammar knows no letters but ASCII's, and no `~`."""
    key, _, value = word.partition("=")
    plain = re.fullmatch(r"(~/)?[\w./\\ :@+%-]*", value) and value.strip() == value
    return f"{key}={quoted(value)}" if plain and (value.startswith("~/") or not value.isascii()) else word


def _how_to_quote(text: str) -> str:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[+~]{0,2}\w[\w./@-]*", name) or ".." in name or not value:
        return "write key=value"
    if any(re.match(r"[+~]{0,2}\w[\w./]*=", word) for word in value.split()[1:]):  # in one pair of quotes
        return f"without quotes they are words of their own: {text}"
    if name in conf_files.GROUPS and (choice := value.strip(" ,;:=\"'")):
        return f"write {name}={choice}"
    return f"quote values with special characters: {as_typed(name, value)}"


def _choice_problem(override: Override, request: Request) -> Problem | None:
    """A `group=name` whose name does not exist, or that is no choice at all; else None."""
    group = override.key_or_group
    if override.is_delete() or override.package is not None:
        remedy = f"write {group}=NAME; python -m runner list {group} shows all"
        return Problem(f"{override.input_line}: a run has one {group}", COMMAND_LINE, remedy)
    text = str(override.input_line)
    if text.startswith("+"):
        return Problem(f"{text}: a run has one {group}", COMMAND_LINE, f"write {text.lstrip('+')}")
    names = conf_files.options(group, request.folders)
    chosen = _chosen(override, names)
    bad = [value for value in chosen if value not in names]
    if len(bad) < len(chosen):
        return None  # of a sweep, some of whose points are right: the others are told one by one
    return unknown_choice(group, bad[0], names, COMMAND_LINE) if bad else None


def _chosen(override: Override, names: tuple[str, ...]) -> list[str]:
    """The choices an override names: one, those of a sweep, or those that fit a pattern."""
    value: Any = override.value()
    if isinstance(value, Glob):
        return value.filter(list(names)) or [str(override.input_line).partition("=")[2]]
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    if override.is_sweep_override():
        return []
    return [value if isinstance(value, str) else override.get_value_element_as_str()]
