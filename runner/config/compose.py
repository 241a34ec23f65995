"""Recipe, choices and command line → one validated `RunSpec`.

A recipe is Hydra's primary config. Every `key=value` that is not a choice is handed to Hydra as
`++key=value`, so that the schema alone judges keys: all mistakes are found at once, with their
nearest right spelling, instead of one by one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runner.config import conf_files, identifying_keys, spec_json
from runner.config.command_line import Checked, Request, check_request
from runner.config.did_you_mean import misplaced_choices, nearest_key
from runner.config.hydra_compose import as_request_error, file_origins, interruptible, merge_config, primary_of
from runner.config.provenance import COMMAND_LINE, Origin, display_path
from runner.config.schema_keys import default_of, known_keys
from runner.config.validation import SourceOf, validated
from runner.errors import Problem, RequestError
from runner.spec import RunSpec

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass(frozen=True)
class _Composed:
    """Plain values of a run, before the schema has seen them."""

    values: dict[str, Any] | None
    """Plain values, interpolations resolved; None if nothing could be composed."""
    problems: list[Problem]
    unsure: frozenset[str] = frozenset()
    """Keys that were left out because their interpolation leads nowhere."""


def compose(request: Request) -> RunSpec:
    """The validated run; RequestError with every mistake at once."""
    return compose_checked(check_request(request))


def compose_checked(checked: Checked) -> RunSpec:
    """The validated run of a request whose words are checked; RequestError with every mistake at once."""
    base, problems, unsure = checked.request, list(checked.problems), checked.unsure
    composed = _composed(base, checked)
    problems += composed.problems
    if composed.values is None and (base.recipe or base.spec_file):
        # A file that cannot be read: what was typed is judged over the main job, all choices in doubt.
        base, unsure = replace(base, recipe=None, spec_file=None), unsure | set(conf_files.GROUPS)
        composed = _composed(base, checked)
        problems += composed.problems
    if composed.values is None:
        raise RequestError(*dict.fromkeys(problems))
    source = Sources(base)
    return validated(composed.values, source, problems, unsure | composed.unsure, source.written)


def origins_of_key(request: Request, key: str) -> list[Origin]:
    """All places that set `key`, in order; the last one wins, and an interpolation is followed to its value."""
    known = origins(request)
    found = [origin for origin in known if origin.concerns(key)]
    if found and (target := re.fullmatch(r"\$\{([\w.]+)\}", str(found[-1].value))):
        found += [origin for origin in known if origin.key == target[1]][-1:]
    return found


def origins(request: Request) -> list[Origin]:
    """Every place that sets any key, in the order in which they apply."""
    checked = check_request(request)
    return [*_in_files(checked), *_typed(checked)]


def _in_files(checked: Checked) -> list[Origin]:
    file = checked.request.spec_file
    return list(spec_json.origins_in_spec(file) if file else file_origins(checked))


def _typed(checked: Checked) -> list[Origin]:
    split = [(o.key_or_group, str(o.input_line).partition("=")[2]) for o in checked.overrides]
    return [Origin(f"{key}.name" if key in conf_files.GROUPS else key, text, COMMAND_LINE) for key, text in split]


@dataclass(frozen=True)
class Sources:
    """Where the keys of a request come from: a lazy look-up from a key to the place that set it last."""

    request: Request

    def __call__(self, key: str) -> str | None:
        if self.typed(key):
            return COMMAND_LINE
        return next((o.place for o in reversed(self._in_files) if o.concerns(key)), None)

    def typed(self, key: str) -> bool:
        """The command line sets it; no file is read for that."""
        return any(origin.concerns(key) for origin in self._typed)

    def written(self, key: str) -> str | list[str] | None:
        """The value as the place that set it last writes it; None where that is a mapping around it, or no text."""
        found = [origin for origin in (*self._in_files, *self._typed) if origin.concerns(key)]
        if not found or found[-1].key != key:
            return None
        value = found[-1].value
        texts = value if isinstance(value, list) else [value]
        return value if all(isinstance(text, str) for text in texts) else None

    @cached_property
    def _typed(self) -> list[Origin]:
        return _typed(self._checked)

    @cached_property
    def _in_files(self) -> list[Origin]:
        return _in_files(self._checked)

    @cached_property
    def _checked(self) -> Checked:
        return check_request(self.request)


def spec_of_point(config: DictConfig, texts: dict[str, str]) -> RunSpec:
    """The validated run of what Hydra composed for a point of a sweep; `texts` are environment variables as the files
    write them."""
    composed = _resolved(config.copy(), lambda key: None)
    if composed.values is not None:
        _keep_texts(composed.values, lambda: texts)
    return validated(composed.values or {}, lambda key: None, composed.problems, composed.unsure)


def _composed(request: Request, checked: Checked) -> _Composed:
    try:
        if request.spec_file:
            return _repeated(request, request.spec_file, checked.overrides)
        with as_request_error(checked):
            config, choices = merge_config(checked, primary_of(request))
    except RequestError as error:
        return _Composed(None, error.problems)
    source_of = Sources(request)
    content = {key: value for key, value in config.items_ex(resolve=False) if key != "hydra"}
    names = {key: content.pop(key) for key in conf_files.GROUPS if isinstance(content.get(key), (str, int, float))}
    found = _resolved(OmegaConf.create(content), source_of, tuple(names))
    misplaced = [misplaced_choices(key, str(name), source_of(key), request.folders) for key, name in names.items()]
    found = replace(found, problems=[*misplaced, *found.problems])
    if found.values is None:
        return found
    _keep_texts(found.values, lambda: texts_of(request))
    return _identified(found, identifying_keys.identity_problems(choices, found.values, request.folders, source_of))


def texts_of(request: Request) -> dict[str, str]:
    """Environment variables as YAML files write them: to YAML 1.1, `010` is 8, `12:30` is 750 and `no` is false."""
    found: dict[str, str] = {}
    for origin in origins(request):
        if origin.key == "hw.env" and isinstance(origin.value, str):  # typed as a mapping
            found.update(re.findall(r"[{,]\s*(\w+)\s*:\s*([^,{}]*)", origin.value))
        elif origin.key.startswith("hw.env.") and isinstance(origin.value, str):
            found[origin.key.removeprefix("hw.env.")] = origin.value
    return found


def _keep_texts(values: dict[str, object], find_texts: Callable[[], dict[str, str]]) -> None:
    """Environment variables that were read as numbers or truth values, as they were written."""
    hw = values.get("hw")
    env = hw.get("env") if isinstance(hw, dict) else None
    if isinstance(env, dict) and (scalars := {k: v for k, v in env.items() if isinstance(v, (int, float))}):
        texts = find_texts()
        env.update({key: texts.get(key, str(value)) for key, value in scalars.items()})


def _identified(found: _Composed, others: Iterable[Problem]) -> _Composed:
    """With what names another choice than the composed one: of a group with another name nothing else is told."""
    problems = [p for p in others if p.what.split("=")[0] not in found.unsure]
    unsure = {p.what.split(".")[0] for p in problems if p.what.split("=")[0].endswith((".name", ".source"))}
    return replace(found, problems=[*found.problems, *problems], unsure=found.unsure | unsure)


def _resolved(config: DictConfig, source_of: SourceOf, without: tuple[str, ...] = ()) -> _Composed:
    """Interpolations replaced by their values; a key whose own leads nowhere is told and left out.

    `without` are groups of which nothing is known: what refers to them is left out, too.
    """
    dangling: dict[str, Problem] = {}
    left_out = set(without)
    while True:
        try:
            with interruptible():
                values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            assert isinstance(values, dict)
            unsure = frozenset(left_out | dangling.keys())
            return _Composed({str(k): v for k, v in values.items()}, [*dangling.values()], unsure)
        except OmegaConfBaseException as error:
            target, key = _target(error), str(error.full_key).split("[")[0]
            if target and target.split(".")[0] in without:
                left_out.add(key)
            elif target and (default := default_of(target)) is not None:  # an interpolation sees the schema's, too
                OmegaConf.update(config, target, default, force_add=True)
                continue
            else:
                dangling[key] = _dangling(key, error, source_of)
            parent, _, leaf = key.rpartition(".")
            del (OmegaConf.select(config, parent) if parent else config)[leaf]


def _dangling(key: str, error: OmegaConfBaseException, source_of: SourceOf) -> Problem:
    """A key whose interpolation cannot be followed, or that was left open with `???`."""
    if isinstance(error, MissingMandatoryValue):
        return Problem(f"{key} is missing", source_of(key), f"write {key}=…")
    what, target = str(error).split("\n", 1)[0], _target(error)
    if found := re.search(r"Environment variable '(.+)' not found", what):
        remedy = f"export {found[1]}=…, or give a default: ${{oc.env:{found[1]},…}}"
        return Problem(f"{key}: the environment variable {found[1]} is not set", source_of(key), remedy)
    near = nearest_key(target) if target and target not in known_keys() else None
    if near:
        remedy = f"did you mean ${{{near}}}?"
    elif target:
        remedy = "write the value itself: no file of this run sets what it refers to"
    else:  # a resolver that there is not, or a value that refers to itself
        remedy = "write the value itself, ${group.key} or ${oc.env:NAME}"
    return Problem(f"{key}: {what[:1].lower()}{what[1:]}", source_of(key), remedy)


def _target(error: OmegaConfBaseException) -> str | None:
    """The key to which an interpolation leads, where no file sets it."""
    found = re.search(r"key '(.+)' not found", str(error).split("\n", 1)[0])
    return found[1] if found else None


def _repeated(request: Request, spec_file: Path, overrides: tuple[Override, ...]) -> _Composed:
    """A resolved run with single values changed; only choices of the groups in `exchange` can become others in it."""
    before = spec_json.read_spec_file(spec_file)
    values, problems = copy.deepcopy(before), []
    for override in overrides:
        key = override.key_or_group
        if key in request.exchange and not override.is_delete():
            values[key] = before[key] = conf_files.load_choice(key, str(override.value()), request.folders)
        elif key in conf_files.GROUPS or override.is_delete():
            remedy = "change single values such as train.max_steps=5, or start from a recipe"
            place = display_path(spec_file)
            what = f"{override.input_line}: {place} is resolved, so a whole choice cannot be exchanged in it"
            problems.append(Problem(what, COMMAND_LINE, remedy))
        else:
            spec_json.set_key(values, key, override.value())
    _keep_texts(values, lambda: texts_of(request))
    others = identifying_keys.repeat_problems(before, values, request.exchange, Sources(request))
    return _identified(_Composed(values, problems), others)
