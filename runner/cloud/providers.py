"""The clouds that pods are rented from, by the name that `where=` has: one line each in two tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.cloud.provider import OVER, Provider
from runner.cloud.provider_errors import NoKeyError
from runner.cloud.runpod import prices
from runner.errors import RunnerError
from runner.rundir.directory import RunDir, run_id_of
from runner.spec import HardwareSpec, RentedPlace, RunSpec

PROVIDERS: dict[str, str | type[Provider]] = {"runpod": "runner.cloud.runpod.runpod_provider:RunPod"}
"""Their classes; of those named as `module:class` nothing is imported before something is asked of an account."""
Price = tuple[float | None, str | None]
"""US$ per GPU and hour (of the machine, on a CPU), and who says so; None where nobody knows."""
PRICES: dict[str, Callable[[HardwareSpec, RentedPlace | None], Price]] = {"runpod": prices.price_of}
"""What hardware costs there, without a key; a cloud without an entry has no price before it is asked for offers."""
DEFAULT = "runpod"
"""For what names no cloud, such as the price of hardware that is planned for and not rented."""


def provider_class(name: str) -> type[Provider]:
    """The class of a cloud."""
    found = PROVIDERS[name]
    if isinstance(found, str):
        module, _, inner = found.partition(":")
        made: type[Provider] = getattr(import_module(module), inner)
        return made
    return found


def connect(name: str = DEFAULT) -> Provider:
    """The account of a cloud; NoKeyError without its key. Nothing is asked of it yet."""
    return provider_class(name)()


def name_of(api: Provider) -> str:
    """The name of an account's cloud."""
    return next((name for name in PROVIDERS if type(api) is provider_class(name)), DEFAULT)


def provider_of(spec: RunSpec) -> Provider:
    """The account that a run's pod is rented with."""
    return connect(spec.where.name)


def cloud_of(words: str, entries: list[Any]) -> str:
    """The cloud of a run or pod that words name: by its entry among the ledger's `entries`, else the run's directory
    here, else the one account there is; among several the first that lists a pod of it. `DEFAULT` where that tells
    nothing.
    """
    if len(PROVIDERS) == 1:
        return DEFAULT
    word = run_id_of(words)
    apis = dict(_accounts())
    bases = {entry.base for entry in entries if word in (entry.run_id, entry.pod_id, entry.name)}
    named = [name for name, api in apis.items() if api.base in bases]
    place = run.read("spec.json").get("where") if (run := RunDir.at(Path(words))) else None
    if not named and isinstance(place, dict) and place.get("name") in PROVIDERS:
        return str(place["name"])
    if named or len(apis) < 2:
        return next(iter(named or apis), DEFAULT)
    for name, api in apis.items():
        with suppress(RunnerError):  # another one may have it
            if any(
                word in (pod.id, pod.name) or f"-{word}-" in pod.name for pod in api.pods() if pod.status not in OVER
            ):
                return name
    return DEFAULT


def accounts() -> list[Provider]:
    """Every account whose key is here, or RunPod's: NoKeyError where there is none."""
    return [api for _, api in _accounts()] or [connect()]


def _accounts() -> list[tuple[str, Provider]]:
    found = []
    for name in PROVIDERS:
        with suppress(NoKeyError):
            found.append((name, connect(name)))
    return found
