"""Say what a run would rent, at which price, and ask; nothing is rented before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console

from runner.cloud import rent_pod, reuse_pod
from runner.cloud.ledger import Ledger
from runner.cloud.provider import Provider, place_of
from runner.cloud.provider_errors import NoBalanceError
from runner.cloud.providers import provider_of
from runner.cloud.reconcile import reconcile
from runner.cloud.sweep_pool import machine_key
from runner.errors import Problem
from runner.report.text import duration
from runner.rundir.launch_options import LaunchOptions
from runner.spec import RunSpec


def confirm(
    asked: Sequence[tuple[RunSpec, dict[str, object]]], launch_options: LaunchOptions, console: Console
) -> bool:
    """Say what would be rented for runs and their plans at which price, and ask. What the provider does not have is an
    error here already."""
    kinds: dict[str, list[tuple[RunSpec, dict[str, Any]]]] = {}
    for spec, plan in asked:
        kinds.setdefault(machine_key(spec) or spec.hw.name, []).append((spec, plan))
    lines, costs, hourly = [], [], 0.0
    for runs in kinds.values():
        line, usd, rate = _priced(runs)
        hourly = max(hourly, rate)
        lines.append(f"Rents   {line}")
        costs.append(usd)
    if len(asked) > 1:
        pods = min(launch_options.pool.max_pods, len(asked)) if launch_options.pool else 0
        place = f"on up to {pods} pods" if pods > 1 else "on one pod at a time" if pods else "a pod for each"
        total = f", about ${sum(filter(None, costs)):.2f} in all" if all(costs) else ""
        lines.append(f"Sweep   {len(asked)} runs, {place}{total}")
    lines += _balance(provider_of(asked[0][0]), sum(filter(None, costs)), hourly)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return launch_options.yes or click.confirm("Rent it?", default=True, err=True)


def _priced(runs: Sequence[tuple[RunSpec, dict[str, Any]]]) -> tuple[str, float | None, float]:
    """The machine for runs that could have the same pod, what all of them cost there, disks included, where that is
    known, and its price per hour."""
    spec, plan = runs[0]
    described, rate = _machine(spec, plan)
    each = [plan.get("hours") for _, plan in runs]
    hours = sum(filter(None, each)) if all(each) else None
    # The plan's cost beside its hours is that of the disks.
    disks = [plan["usd"] - plan["usd_per_hour"] * plan["hours"] for _, plan in runs if hours and plan.get("usd")]
    usd = rate * hours + max(0.0, sum(disks)) if hours else None
    about = f", about ${usd:.2f} for {duration(3600 * hours)}" if usd is not None and hours else ""
    cap = place_of(spec).max_usd
    limit = f", never more than ${cap:g}{' a run' if len(runs) > 1 else ''}" if cap else ""
    return f"{described}, ${rate:.2f} an hour{about}{limit}", usd, rate


def _machine(spec: RunSpec, plan: dict[str, object]) -> tuple[str, float]:
    """What would be asked for first, or the pod that is named, and its price per hour."""
    if place_of(spec).pod:
        api, ledger = provider_of(spec), Ledger()
        reconcile(api, ledger)
        found = reuse_pod.find_named(api, ledger, spec)
        became = "stopped" if place_of(spec).keeps else "ENDED, with its disk"
        if found.entry.state == "RUNNING" and place_of(spec).keep is None:
            became = "yours again (stopped, where the run is detached)"
        return f"nothing: takes {found.described}, which is {became} after the run", found.entry.usd_per_hour
    machines = rent_pod.find_offers(provider_of(spec), spec, plan)
    return machines[0].described, machines[0].usd_per_hour


def _balance(api: Provider, usd: float, usd_per_hour: float) -> list[str]:
    """A warning where the account has less than what would be spent: it may be filled by itself, so the run may begin.
    NoBalanceError where it does not pay for a tenth of an hour."""
    has = api.balance()
    if has is None or has >= max(usd, usd_per_hour / 10):
        return []
    if has < usd_per_hour / 10:
        what = f"{api.title}: the account has ${has:.2f}, and the pod costs ${usd_per_hour:.2f} an hour"
        raise NoBalanceError(Problem(what, None, f"add funds at {api.billing_page}; nothing was rented"))
    what = f"the account has ${has:.2f}, less than the ${usd:.2f} that this costs"
    return [f"Warning {what}: unless it is topped up, {api.title} stops the pod when nothing is left"]
