"""The points of a sweep, from Hydra's sweeper, and their start through Hydra's launcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from runner.config.command_line import NO_PRUNING, PARAMS, PRUNER, Request, check_request, for_hydra
from runner.config.compose import compose_checked, spec_of_point, texts_of
from runner.config.hydra_compose import as_request_error, file_origins, hydra_over, primary_of
from runner.config.provenance import COMMAND_LINE
from runner.config.schema_keys import quoted
from runner.errors import Problem, RequestError, RunFailedError, RunnerError
from runner.spec import RunSpec

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

Task = Callable[[RunSpec | RunnerError, int], float]
"""Runs a point, or records why it cannot be one; returns the metric, so that an HPO sweeper can drive it."""


@dataclass(frozen=True)
class Sweep:
    """The points that `-m` asks for."""

    request: Request
    """With `hydra.sweeper.params` of the files among its words: a key is judged the same wherever it stands."""
    points: list[Request]
    """All points of a grid; where a sweeper `searches`, the ends of each range and all choices, one key at a time."""
    searches: bool = False
    """The sweeper chooses its points as it goes: an HPO sweeper such as Optuna's."""
    direction: Any = None
    """Direction of an HPO sweeper: minimize or maximize; None where it has none."""
    places: dict[str, str] = field(default_factory=dict)
    """File and line of each key of `hydra.sweeper.params`."""

    def varied(self, point: Request) -> str:
        """The words of a point that are not those of every other one."""
        others = [set(p.overrides) for p in self.points]
        return " ".join(w.lstrip("+") for w in point.overrides if not all(w in words for words in others))

    def told(self, problem: Problem, point: Request) -> Problem:
        """The problem with the point that it concerns, and the line of the recipe that says so."""
        for word in self.request.overrides:
            if "=interval(" in word and problem.what.startswith(f"{_key(word)}=") and "a whole number" in problem.what:
                key, _, interval = word.lstrip("+").partition("=")
                problem = replace(problem, remedy=f"write {key}=int({interval})")
        named = next((place for key, place in self.places.items() if key in problem.what), None)
        if problem.source in (None, COMMAND_LINE) and named:
            problem = replace(problem, source=named)
        return replace(problem, source=problem.source or self.varied(point) or " ".join(point.overrides))

    def run(self, task: Task, chosen: Sequence[Request], run: RunSpec, folder: Path, *launcher: str) -> None:
        """Run the `chosen` points of a grid, or what the HPO sweeper chooses; Hydra writes into `folder`.

        `run` is what all points share; `launcher` are words of Hydra's.
        """
        checked = check_request(replace(self.request, overrides=(*self.request.overrides, *launcher)), sweeping=True)
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
        words = [*quiet, f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir=.", *checked.for_hydra]
        if self.direction is not None and run.run.metric_mode == "max":
            words.append("hydra.sweeper.direction=maximize")
        primary, each = primary_of(checked.request), _Each(task, texts_of(replace(self.request, overrides=())))
        with hydra_over(checked.request, primary) as hydra, as_request_error(checked):
            if not self.searches:
                _launch(hydra, primary.name, words, each, chosen)
                return
            try:
                hydra.multirun(primary.name, each, words, with_log_configuration=False)
            except Exception as error:  # a library of the user's choice, which complains as it likes
                what = f"the sweeper stopped: {error.__cause__ or error}"
                raise RunFailedError(Problem(what, "hydra/sweeper")) from None


def read_sweep(request: Request) -> Sweep:
    """The sweep that was asked for; RequestError where it says nothing that can be swept over."""
    settings, places = _settings(request)
    typed = {_key(word) for word in request.overrides}
    params = {str(key): value for key, value in (settings.get("params") or {}).items() if _key(str(key)) not in typed}
    if params or any(key.startswith(PARAMS) for key in typed):
        kept = (word for word in request.overrides if not _key(word).startswith(PARAMS))
        words = (f"{key}={'null' if value is None else value}" for key, value in params.items())
        request = replace(request, overrides=(*words, *kept, f"{PARAMS}=null"))
    if not request.overrides and request.spec_file is None:
        remedy = "write key=a,b for what is to differ, such as method=lora,full; without -m it is one run"
        raise RequestError(Problem("-m sweeps over values, and none is named", COMMAND_LINE, remedy))
    searches = not str(settings.get("_target_", "BasicSweeper")).endswith("BasicSweeper")
    direction = settings.get("direction") if searches else None
    sweep = Sweep(request, [], searches, direction, {key: places[key] for key in params if key in places})
    try:
        return replace(sweep, points=_candidates(request) if searches else _grid(request))
    except RequestError as error:
        raise RequestError(*(sweep.told(problem, request) for problem in error.problems)) from None


def direction_problem(sweep: Sweep, run: RunSpec) -> Problem | None:
    """The problem with the direction of an HPO sweeper: it would look for the worst runs."""
    if sweep.direction is None:
        return None
    if not isinstance(sweep.direction, str) and not hasattr(sweep.direction, "name"):
        what = "hydra.sweeper.direction names several, and a run has one metric"
        return Problem(what, "hydra.sweeper.direction", "leave it out; run.metric_mode=max says what is better")
    asked = str(getattr(sweep.direction, "name", sweep.direction))
    if asked == "maximize" and run.run.metric_mode == "min":
        what = "hydra.sweeper.direction=maximize, and of the metric less is better (run.metric_mode=min)"
        return Problem(what, "hydra.sweeper.direction", "write run.metric_mode=max; the sweeper's direction follows it")
    return None


def task_overrides() -> list[str]:
    """Words of the point of a sweep that is running now."""
    from hydra.core.hydra_config import HydraConfig

    return [o.lstrip("+") for o in HydraConfig.get().overrides.task]


def parallel_jobs() -> int:
    """Return the number of parallel points (joblib's `n_jobs`; -1 is one per core)."""
    from hydra.core.hydra_config import HydraConfig

    jobs = int(HydraConfig.get().launcher.get("n_jobs", 1))
    return jobs if jobs > 0 else os.cpu_count() or 1


@dataclass(frozen=True)
class _Each:
    """The task function that Hydra calls for one point; picklable, for launchers that use processes."""

    task: Task
    texts: dict[str, str]
    """Environment variables as the files write them."""

    def __call__(self, config: Any) -> float:
        from hydra.core.hydra_config import HydraConfig

        try:
            given: RunSpec | RunnerError = spec_of_point(config, self.texts)
        except RequestError as error:
            given = error
        return self.task(given, int(HydraConfig.get().job.num))


def _launch(hydra: Hydra, name: str, words: list[str], each: _Each, chosen: Sequence[Request]) -> None:
    """The points of a grid, through Hydra's launcher."""
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    config = hydra.compose_config(name, words, RunMode.MULTIRUN, with_log_configuration=False)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
    launcher = Plugins.instance().instantiate_launcher(context, each, config)
    points, done = [list(point.overrides) for point in chosen], 0
    for batch in BasicSweeper.split_overrides_to_chunks(points, config.hydra.sweeper.max_batch_size):
        for result in launcher.launch(batch, initial_job_idx=done):
            _ = result.return_value  # raises what the point has raised
        done += len(batch)


def _settings(request: Request) -> tuple[DictConfig | dict[str, Any], dict[str, str]]:
    """Settings of Hydra's sweeper, and where its `params` are written; nothing where neither a recipe nor a word names
    one."""
    named = any(_key(word).startswith(("hydra", "recipe")) for word in request.overrides)
    if request.spec_file or not (request.recipe or named):
        return {}, {}
    checked = check_request(request, sweeping=True)
    if checked.problems:
        compose_checked(checked.without_sweeps())
    found = {origin.key: origin.place for origin in file_origins(checked)}
    if pruners := [Problem(NO_PRUNING[0], found[key], NO_PRUNING[1]) for key in found if key.startswith(PRUNER)]:
        raise RequestError(*pruners)
    primary = primary_of(checked.request)
    with hydra_over(checked.request, primary) as hydra, as_request_error(checked):
        config = hydra.compose_config(primary.name, checked.for_hydra, RunMode.MULTIRUN, with_log_configuration=False)
    places = {key.removeprefix(f"{PARAMS}."): place for key, place in found.items()}
    if config.hydra.sweeper.get("search_space"):
        place = next((place for key, place in found.items() if "sweeper.search_space" in key), COMMAND_LINE)
        what = "hydra.sweeper.search_space is deprecated, and its keys are not checked"
        raise RequestError(Problem(what, place, f"write it as {PARAMS}: train.learning_rate: interval(1e-5, 1e-3)"))
    return config.hydra.sweeper, places


def _grid(request: Request) -> list[Request]:
    """One request per point of a grid, in Hydra's order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    base, overrides = _parsed(request)
    if ranges := [o for o in overrides if o.is_sweep_override() and not o.is_discrete_sweep()]:
        remedy = "name values, as in key=a,b; or add hydra/sweeper=optuna (pip install hydra-optuna-sweeper)"
        whats = [f"{str(o.input_line).lstrip('+')}: only a sweeper that searches chooses from a range" for o in ranges]
        raise RequestError(*(Problem(what, COMMAND_LINE, remedy) for what in whats))
    return [replace(base, overrides=tuple(point)) for point in BasicSweeper.split_arguments(overrides, None)[0]]


def _candidates(request: Request) -> list[Request]:
    """The points that an HPO sweeper may choose, one key at a time: the ends of each range, and all choices."""
    base, overrides = _parsed(request)
    words = [[f"{o.get_key_element()}={value}" for value in dict.fromkeys(_values(o))] for o in overrides]
    first = tuple(of_key[0] for of_key in words)
    others = [(*first[:n], word, *first[n + 1 :]) for n, of_key in enumerate(words) for word in of_key[1:]]
    return [replace(base, overrides=point) for point in (first, *others)]


def _values(override: Override) -> Iterator[str]:
    """Values of a key that stand for all that a sweeper may choose."""
    if override.is_discrete_sweep():
        yield from override.sweep_string_iterator()
        return
    if not override.is_sweep_override():
        yield override.get_value_element_as_str()
        return
    interval: Any = override.value()
    yield str(interval.start)
    if not (isinstance(interval.start, int) and isinstance(interval.end, int)):
        yield str(interval.start + (interval.end - interval.start) / 3)  # which a key for whole numbers does not take
    yield str(interval.end)


def _parsed(request: Request) -> tuple[Request, list[Override]]:
    """The words that are not Hydra's, as Hydra sees them; RequestError with what is wrong with any."""
    checked = check_request(request, sweeping=True)
    if checked.problems:
        compose_checked(checked.without_sweeps())
    words = [for_hydra(o) for o in checked.overrides if not o.is_hydra_override()]
    with hydra_over(checked.request, primary_of(checked.request)) as hydra:  # a glob asks which choices there are
        return checked.request, OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(words)


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]
