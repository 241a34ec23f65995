"""The clouds that pods are rented from, by the name that `where=` has: one line each."""

from __future__ import annotations

from runner.cloud.provider import Provider
from runner.cloud.runpod.provider import RunPod
from runner.spec import RunSpec

PROVIDERS: dict[str, type[Provider]] = {"runpod": RunPod}
DEFAULT = "runpod"
"""For verbs that name no run's spec, such as `pods` and `attach`."""


def connect(name: str = DEFAULT) -> Provider:
    """The account of a cloud; NoKeyError without its key. Nothing is asked of it yet."""
    return PROVIDERS[name]()


def provider_of(spec: RunSpec) -> Provider:
    """The account that a run's pod is rented with."""
    return connect(spec.where.name)
