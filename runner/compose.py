"""Recipe, choices and command line → one validated `RunSpec`. The only importer of Hydra.

A recipe is Hydra's primary config. Every `key=value` that is not a choice is handed to Hydra as
`++key=value`, so that the schema alone judges keys: all mistakes are found at once, with their
nearest right spelling, instead of one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from runner import catalogue
from runner.errors import Problem, RequestError
from runner.paths import CONF, RECIPES
from runner.problems import problems_of
from runner.provenance import Origin, of_file, shown
from runner.spec import RunSpec
from runner.suggest import known_keys, nearest, nearest_key

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Request:
    """What the user asked for, before anything is read."""

    recipe: str | None = None
    """Name of a recipe, or path of a YAML file; None means `conf/config.yaml`."""
    overrides: tuple[str, ...] = ()
    """`group=choice` and `key=value`, in the order they were typed."""
    config_dirs: tuple[Path, ...] = ()
    """A user's own folders with groups; they come before the project's."""
    spec_file: Path | None = None
    """A finished `spec.json` to repeat, instead of a recipe."""


@dataclass(frozen=True)
class _Primary:
    name: str
    folders: tuple[Path, ...] = field(default=())


def compose(request: Request) -> RunSpec:
    """The validated run; RequestError with every mistake at once."""
    if request.spec_file:
        return _from_file(request)
    request, problems, overrides = _checked(request)
    values: dict[str, Any] = {}
    try:
        values = _values(request, overrides)
    except RequestError as error:
        problems += error.problems
        raise RequestError(*problems) from None
    try:
        spec = RunSpec.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, _source_finder(request))
        raise RequestError(*problems) from None
    if problems:
        raise RequestError(*problems)
    return spec


def explain(request: Request, key: str) -> tuple[Any, list[Origin]]:
    """The final value of `key` and all places that set it, in order; the last one wins."""
    spec = compose(request).model_dump()
    if key not in known_keys():
        near = nearest_key(key)
        raise RequestError(Problem(f"unknown key {key}", COMMAND_LINE, near and f"did you mean {near}?"))
    value: Any = spec
    for step in key.split("."):
        if not isinstance(value, dict) or step not in value:
            raise RequestError(Problem(f"{key} does not exist for this choice", COMMAND_LINE))
        value = value[step]
    places = [o for o in origins(request) if o.key == key or o.key.startswith(f"{key}.")]
    for origin in list(places):  # follow an interpolation to the place of its value
        if isinstance(origin.value, str) and origin.value.startswith("${") and origin is places[-1]:
            target = origin.value.strip("${}")
            places += [o for o in origins(request) if o.key == target][-1:]
    return value, places


def origins(request: Request) -> list[Origin]:
    """Every place that sets any key, in the order in which they apply."""
    found: list[Origin] = []
    if request.spec_file:
        name = shown(request.spec_file)
        found += [Origin(k, v, name) for k, v in _flat(json.loads(request.spec_file.read_text("utf-8")))]
    else:
        _, _, overrides = _checked(request)
        found += _file_origins(_lift_recipe(request), overrides)
    for override in _lift_recipe(request).overrides:
        name, _, value = override.lstrip("+~").partition("=")
        found.append(Origin(name if "." in name else f"{name}.name", value, COMMAND_LINE))
    return found


def sweep(request: Request, task: Callable[[RunSpec, int], float], sweep_dir: Path) -> None:
    """Run `task(spec, index)` for every point of a sweep through Hydra's sweeper and launcher.

    Every point of a grid is validated before the first one starts. `task` returns the metric,
    so that an HPO sweeper can drive it. `sweep_dir` receives what Hydra itself writes.
    """
    request, problems, overrides = _checked(request)
    if problems:
        raise RequestError(*problems)
    own = [o for o in overrides if o.split("=", 1)[0].lstrip("+").startswith("hydra")]
    for point in _grid([o for o in overrides if o not in own]):
        compose(replace(request, overrides=tuple(point)))
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
    places = [f"hydra.sweep.dir={_quoted(sweep_dir)}", "hydra.sweep.subdir=."]
    primary = _primary(request)
    with _hydra(request, primary) as hydra, _as_request_error():
        hydra.multirun(primary.name, _Task(task), [*quiet, *places, *overrides], with_log_configuration=False)


def task_overrides() -> list[str]:
    """What was typed for the point of a sweep that is running now."""
    from hydra.core.hydra_config import HydraConfig

    return [o.lstrip("+") for o in HydraConfig.get().overrides.task]


@dataclass(frozen=True)
class _Task:
    """What Hydra calls for one point; picklable, for launchers that use processes."""

    task: Callable[[RunSpec, int], float]

    def __call__(self, config: Any) -> float:
        from hydra.core.hydra_config import HydraConfig

        values = OmegaConf.to_container(config, resolve=True)
        return self.task(RunSpec.model_validate(values), int(HydraConfig.get().job.num))


def complete(shell_request: str) -> None:
    """Print what Hydra's shell completion asks for (`install=bash`, `query=bash`, …)."""
    from hydra.core.config_store import ConfigStore

    values = _values(Request(), [])
    full = RunSpec.model_validate(values).model_dump()
    # Completion offers what a config holds, so it is given one with every default spelled out.
    ConfigStore.instance().store("completion", {"defaults": ["config", "_self_"], **_without_nulls(full)})
    with _hydra(Request(), _Primary("completion")) as hydra:
        hydra.shell_completion(config_name="completion", overrides=[shell_request])


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_nulls(v) if isinstance(v, dict) else v for k, v in values.items()}


def _lift_recipe(request: Request) -> Request:
    """Take `recipe=…` out of the overrides: it names the primary config."""
    chosen = [o.split("=", 1)[1] for o in request.overrides if o.startswith("recipe=")]
    if not chosen:
        return request
    if "," in chosen[-1]:
        raise RequestError(
            Problem(
                f"recipe={chosen[-1]}: a sweep cannot go over recipes",
                COMMAND_LINE,
                "sweep over choices and values, such as method=lora,qlora4, or call the runner once per recipe",
            )
        )
    rest = tuple(o for o in request.overrides if not o.startswith("recipe="))
    return replace(request, recipe=chosen[-1], overrides=rest)


def _primary(request: Request) -> _Primary:
    """Name of the primary config and the folder it needs in the search path."""
    if request.recipe is None:
        return _Primary("config")
    if request.recipe in catalogue.recipes():
        return _Primary(request.recipe, (RECIPES,))
    file = Path(request.recipe)
    if file.suffix in (".yaml", ".yml") and file.is_file():
        if file.stem == "config":
            raise RequestError(
                Problem(f"{file}: a recipe cannot be called config.yaml", None, "give the file another name")
            )
        return _Primary(file.stem, (file.resolve().parent,))
    near = nearest(file.stem, catalogue.recipes())
    remedy = f"did you mean recipe={near}?" if near else "python -m runner list recipes shows them"
    raise RequestError(Problem(f"there is no recipe {request.recipe}", COMMAND_LINE, remedy))


@contextmanager
def _hydra(request: Request, primary: _Primary) -> Iterator[Hydra]:
    """Hydra over the user's folders, `conf/`, and the recipe's folder, in that order."""
    search = create_config_search_path(None)
    for folder in (*request.config_dirs, CONF, *primary.folders):
        search.prepend("main", f"file://{folder.resolve()}", SearchPathQuery(provider="schema"))
    version.setbase("1.3")
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("runner", search)
    finally:
        GlobalHydra.instance().clear()


def _values(request: Request, overrides: list[str]) -> dict[str, Any]:
    """Plain values, interpolations resolved; RequestError for what Hydra cannot compose."""
    primary = _primary(request)
    with _hydra(request, primary) as hydra, _as_request_error():
        config = hydra.compose_config(primary.name, overrides, RunMode.RUN, with_log_configuration=False)
        del_hydra = {k: v for k, v in config.items_ex(resolve=False) if k != "hydra"}
        values = OmegaConf.to_container(OmegaConf.create(del_hydra), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


@contextmanager
def _as_request_error() -> Iterator[None]:
    """Hydra's and OmegaConf's own complaints (a broken YAML file, a wrong defaults list) in one line."""
    import yaml

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
        what = next((line for line in lines if not line.startswith(("In ", "full_key", "object_type"))), "bad config")
        raise RequestError(Problem(what, None, None)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else None
        raise RequestError(Problem(f"broken YAML: {getattr(error, 'problem', error)}", place)) from None


def _checked(request: Request) -> tuple[Request, list[Problem], list[str]]:
    """The request without `recipe=`, its mistakes in choices and syntax, and overrides fit for Hydra."""
    request = _lift_recipe(request)
    problems: list[Problem] = []
    overrides: list[str] = []
    for folder in request.config_dirs:
        if not folder.is_dir():
            problems.append(Problem(f"--config-dir {folder} is not a folder", COMMAND_LINE))
    parser = OverridesParser.create()
    for text in request.overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException:
            problems.append(Problem(f"cannot read {text!r}", COMMAND_LINE, _quote_hint(text)))
            continue
        problem = _choice_problem(parsed, request)
        if problem:
            problems.append(problem)
        else:
            overrides.append(_for_hydra(parsed, text))
    return request, problems, overrides


def _quote_hint(text: str) -> str:
    name, _, value = text.partition("=")
    return f"quote values with special characters: {name}='\"{value}\"'" if value else "write key=value"


def _for_hydra(parsed: Override, text: str) -> str:
    plain = parsed.type is not None and parsed.type.name == "CHANGE"
    is_choice = parsed.key_or_group in catalogue.GROUPS or parsed.key_or_group.startswith("hydra")
    return f"++{text}" if plain and not is_choice else text


def _choice_problem(parsed: Override, request: Request) -> Problem | None:
    """A `group=name` whose name does not exist, else None."""
    group = parsed.key_or_group
    if group not in catalogue.GROUPS:
        return None
    if parsed.is_sweep_override():
        values = list(parsed.sweep_string_iterator()) if parsed.is_discrete_sweep() else []
    else:
        values = [parsed.get_value_element_as_str()]
    names = catalogue.options(group, request.config_dirs)
    bad = [v for v in values if v not in names]
    if not bad:
        return None
    near = nearest(bad[0], {**_spoken(group), **{n: n for n in names}})
    remedy = f"did you mean {group}={near}?" if near else f"python -m runner list {group} shows all"
    return Problem(f"there is no {group} {bad[0]!r}", COMMAND_LINE, remedy)


def _spoken(group: str) -> dict[str, str]:
    """What people call the choices of a group → their names."""
    if group not in ("model", "hw"):
        return {}
    table: dict[str, str] = {}
    for name in catalogue.options(group):
        if (CONF / group / f"{name}.yaml").exists():
            values = catalogue.load(group, name)
            table |= dict.fromkeys([*values.get("aliases", []), values.get("title") or name], name)
    return table


def _grid(overrides: list[str]) -> list[list[str]]:
    """The points of a plain grid sweep; nothing where an HPO sweeper will choose them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(overrides)
    if any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        return []
    return BasicSweeper.split_arguments(parsed, None)[0]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def _file_origins(request: Request, overrides: Sequence[str]) -> Iterator[Origin]:
    """Every key set by the YAML files of the defaults list, in order."""
    primary = _primary(request)
    folders = (*request.config_dirs, CONF, *primary.folders)
    with _hydra(request, primary) as hydra, _as_request_error():
        result = hydra.config_loader.compute_defaults_list(primary.name, list(overrides), RunMode.RUN)
    for item in result.defaults:
        file = next((f for d in folders if (f := d / f"{item.config_path}.yaml").is_file()), None)
        if file is not None:
            yield from of_file(file, item.package or "")


def _source_finder(request: Request) -> Callable[[str], str | None]:
    """A lazy look-up from a key to the place that set it last; files are read on the first call only."""
    known: list[Origin] = []

    def source_of(key: str) -> str | None:
        if not known:
            known.extend(origins(request))
        return next((o.place for o in reversed(known) if o.key == key), None)

    return source_of


def _from_file(request: Request) -> RunSpec:
    """A `spec.json` with single values changed; choices cannot be exchanged in it any more."""
    assert request.spec_file is not None
    name = shown(request.spec_file)
    try:
        values = json.loads(request.spec_file.read_text("utf-8"))
    except OSError as error:
        raise RequestError(Problem(f"cannot read {name}: {error.strerror}", COMMAND_LINE)) from None
    except ValueError as error:
        raise RequestError(Problem(f"{name} is not JSON: {error}", COMMAND_LINE)) from None
    _, problems, overrides = _checked(request)
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        if key in catalogue.GROUPS:
            problems.append(
                Problem(
                    f"{override}: a spec.json is resolved, so a whole choice cannot be exchanged in it",
                    COMMAND_LINE,
                    "change single values such as train.max_steps=5, or start from a recipe",
                )
            )
            continue
        node = values
        *parents, leaf = key.split(".")
        for step in parents:
            node = node.setdefault(step, {})
        node[leaf] = OverridesParser.create().parse_override(f"x={text}").value()
    try:
        spec = RunSpec.model_validate(values)
    except ValidationError as error:
        problems += problems_of(error, _source_finder(request))
    if problems:
        raise RequestError(*problems)
    return spec


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
