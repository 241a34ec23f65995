"""Compose: choices, the form, and the plan of what is in it, by the functions of `plan`, `fit` and `show`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Body

from runner.config import conf_files
from runner.config.compose import Sources, compose
from runner.config.provenance import flattened
from runner.errors import Problem, RunnerError
from runner.machine import writable
from runner.plan.plan import Plan
from runner.report.catalog_tables import listing
from runner.report.plan_terms import FAMILIES, PHASES, heading, segments
from runner.resolve import fit, plan_inputs
from runner.resolve.steps import resolve, with_facts
from runner.runs import inputs
from runner.spec import RunSpec
from runner.ui import confined, remedies
from runner.ui.form_request import command_line, names_of, request_of, texts_of, words_of
from runner.ui.form_schema import form
from runner.ui.safe_json import SafeJson, without_secrets

_composing = threading.Lock()
"""Hydra and the catalogue's caches are one for a process."""
Asked = dict[str, Any]


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Compose in this thread alone: 0.1 to 0.2 s each."""
    with _composing:
        yield


def router() -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api")

    @api.get("/catalogue")
    def catalogue() -> SafeJson:
        groups = {group: listing(group).rows for group in conf_files.GROUPS}
        bars = {family.name: family.colour for family in FAMILIES}
        return SafeJson({"groups": groups, "recipes": listing("recipes").rows, "families": bars, "form": form()})

    @api.post("/check")
    def check(asked: Asked = Body()) -> SafeJson:  # noqa: B008  # FastAPI's way
        with one_at_a_time():
            return SafeJson(checked(asked))

    @api.post("/recipe")
    def recipe(asked: Asked = Body()) -> SafeJson:  # noqa: B008
        with one_at_a_time():
            request = request_of(words_of(asked))
            spec = resolve(compose(request), Sources(request))[0]
            confined.check_spec(spec)
        return SafeJson({"yaml": without_secrets(conf_files.dump_yaml(spec.model_dump(mode="json")))})

    @api.post("/fit")
    def fits(asked: Asked = Body()) -> SafeJson:  # noqa: B008
        with one_at_a_time():
            return SafeJson(_fitting(asked))

    return api


def checked(asked: Asked) -> dict[str, Any]:
    """Everything that the form shows of a request: its values, its plan, its problems with their remedies.

    What cannot be composed has problems and no values; what cannot run has both.
    """
    found: dict[str, Any] = {"problems": [], "values": None, "plan": None, "notes": [], "command": None, "rents": False}
    try:
        words = words_of(asked)
        found["command"] = command_line(words)
        request = request_of(words)
        composed = compose(request)
        found["values"] = dict(flattened(composed.model_dump(mode="json")))
        spec, notes = resolve(composed, Sources(request), needed=True)
        confined.check_spec(spec)
        found["resolved"] = dict(flattened(spec.model_dump(mode="json")))
        found["rents"] = spec.is_rented
        inputs.check_files(spec)
        planned = plan_inputs.plan(spec, notes)
        found |= {"plan": shown(planned, spec), "notes": planned.notes}
        wrong = [*_refused(composed, planned), *writable.problems(spec)]
        found["problems"] = [remedies.placed(problem) for problem in wrong]
    except RunnerError as error:
        found["problems"] = remedies.for_form(error)
    return found


def _refused(composed: RunSpec, planned: Plan) -> list[Problem]:
    if not planned.reasons:
        return []
    advice = plan_inputs.advice(with_facts(composed, needed=True), planned)
    return [Problem(reason, "plan", advice) for reason in planned.reasons]


def shown(planned: Plan, spec: RunSpec) -> dict[str, Any]:
    """The plan with the bars of its phases."""
    bars = [
        {
            "phase": name,
            "when": PHASES.get(name, name),
            "parts": [{"family": f.name, "gib": s} for f, s in parts.items()],
        }
        for name, parts in ((name, segments(terms)) for name, terms in planned.phases.items())
    ]
    title = heading(planned, {"model": spec.model.title, "hw": spec.hw.title})
    return {**planned.as_dict(), "bars": bars, "title": title}


def _fitting(asked: Asked) -> dict[str, Any]:
    """Rows of `fit`: what the form leaves open in `open` (hw, method) is searched."""
    left = [group for group in names_of(asked, "open") if group in ("hw", "method")]
    choices = {group: name for group, name in texts_of(asked, "choices").items() if group not in left}
    values = {k: v for k, v in texts_of(asked, "values").items() if k.partition(".")[0] not in left}
    request = request_of(words_of({**asked, "choices": choices, "values": values}))
    spec = with_facts(compose(request), Sources(request), needed=True)
    confined.check_spec(spec)
    given = {**fit.named_in(request), "model": None}
    given |= {} if "method" in left else {"method": None}
    given = {key: value for key, value in given.items() if key.partition(".")[0] not in left}
    spec = fit.with_default_length(spec, given)
    rows = fit.fit_rows(spec, given, "usd", request.folders)
    return {"title": fit.title(spec, rows), "rows": [asdict(row) for row in rows][:200]}
