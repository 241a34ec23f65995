"""The run that `doctor` checks a machine for: composed, resolved and planned as any other."""

from __future__ import annotations

from runner.config.request import Request
from runner.doctor.finding import DoctorTarget
from runner.errors import RequestError
from runner.resolve import plan_inputs
from runner.resolve.steps import resolved


def wanted(request: Request) -> DoctorTarget:
    """What the words ask for; RequestError where they are wrong."""
    spec, notes = resolved(request)
    try:
        return DoctorTarget(spec, plan_inputs.plan(spec, notes))
    except RequestError:  # a model that the arithmetic does not know
        return DoctorTarget(spec, None)
