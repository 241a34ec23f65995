"""The run that a machine is checked for: composed, resolved and planned as any other."""

from __future__ import annotations

from runner import planning
from runner.doctor.finding import Wanted
from runner.errors import RequestError
from runner.request import Request
from runner.resolve import resolved


def wanted(request: Request) -> Wanted:
    """What the words ask for; RequestError where they are wrong."""
    spec, notes = resolved(request)
    try:
        return Wanted(spec, planning.plan(spec, notes))
    except RequestError:  # a model that the arithmetic does not know
        return Wanted(spec, None)
