"""Every rule about money: what a pod costs while it runs, and what `where.max_usd` allows.

A cap is held against the offer before a pod is asked for, against what earlier pods of the run have cost, against the
price that the pod turns out to have, and against the clock while it runs: it brings the pod's deadline forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runner.cloud import clock
from runner.cloud.ledger import Entry, Ledger
from runner.cloud.provider_errors import TooDearError
from runner.errors import CannotRunError, Problem
from runner.plan.cost import HOURS_PER_MONTH, STORAGE_USD_PER_GB_MONTH
from runner.report.text import duration
from runner.spec import RentedPlace

STOPPED_USD_PER_GB_MONTH = 0.20  # RunPod's volume disk of a stopped pod (docs.runpod.io/pods/pricing, as of 2026-11-20)
WARN_AT = (0.5, 0.8, 1.0)
"""Shares of the cap at which a user is told."""


def storage_usd_per_hour(disk_gb: float) -> float:
    """Container disk and volume disk of a running pod."""
    return disk_gb * STORAGE_USD_PER_GB_MONTH / HOURS_PER_MONTH


def stopped_usd_per_day(volume_gb: float) -> float:
    """Return the daily price of a stopped pod's volume disk."""
    return volume_gb * STOPPED_USD_PER_GB_MONTH / HOURS_PER_MONTH * 24


@dataclass
class Meter:
    """The live bill of one pod: elapsed time × (its price + its disks), beside what is allowed."""

    usd_per_hour: float
    """Of all its GPUs, as the provider says it."""
    started: float
    """Epoch seconds."""
    disk_gb: float = 0.0
    cap_usd: float | None = None
    before_usd: float = 0.0
    """What earlier pods of the same run have cost."""
    _told: set[float] = field(default_factory=set)

    @property
    def rate(self) -> float:
        """US$ per hour, disks included."""
        return self.usd_per_hour + storage_usd_per_hour(self.disk_gb)

    def usd(self, now: float) -> float:
        """Cost so far, earlier pods included."""
        return self.before_usd + max(0.0, now - self.started) / 3600 * self.rate

    def ends(self) -> float | None:
        """Epoch at which the cap is reached; None without one."""
        if self.cap_usd is None or self.rate <= 0:
            return None
        return self.started + max(0.0, self.cap_usd - self.before_usd) / self.rate * 3600

    def warning(self, now: float) -> str | None:
        """Return a sentence when a further share of the cap is reached."""
        if self.cap_usd is None:
            return None
        share = self.usd(now) / self.cap_usd
        reached = [mark for mark in WARN_AT if share >= mark and mark not in self._told]
        if not reached:
            return None
        self._told.update(reached)
        used = f"${self.usd(now):.2f} of ${self.cap_usd:.2f} (where.max_usd) are used"
        if reached[-1] >= 1:
            return f"{used}: the pod is ended"
        left = max(0.0, (self.ends() or now) - now)
        return f"{used}, {share:.0%}; the rest lasts {duration(left)}"


def spent(ledger: Ledger, run_id: str, but: str | None = None) -> float:
    """US$ that the pods of a run have cost so far, by their time and price; but one by its name."""
    total = 0.0
    for entry in ledger.entries(run_id, gone=True):
        if entry.pod_id is not None and entry.name != but:
            total += Meter(entry.usd_per_hour, entry.created, entry.disk_gb).usd(paid_until(entry, clock.now()))
    return total


def paid_until(entry: Entry, now: float) -> float:
    """Epoch until which its GPUs cost: a stopped pod costs its disk alone, cents that are not counted."""
    return entry.ended or (entry.updated if entry.state == "STOPPED" else now)


def hours_of(place: RentedPlace) -> float:
    """The deadline of a resolved run; what is open still gets a day, which is more than nothing."""
    return 24.0 if isinstance(place.deadline_hours, str) else place.deadline_hours


def deadline_of(place: RentedPlace, meter: Meter) -> float:
    """Epoch: `where.deadline_hours`, or earlier where the cap is reached."""
    named = meter.started + hours_of(place) * 3600
    paid = meter.ends()
    return named if paid is None else min(named, paid)


def cap_sets_deadline(deadline: float, meter: Meter) -> bool:
    """The cap, and not `where.deadline_hours`, is why a pod ends at its deadline."""
    paid = meter.ends()
    return paid is not None and paid <= deadline + 1


def paid_minutes(place: RentedPlace, usd_per_hour: float, disk_gb: float, spent_usd: float) -> float | None:
    """Minutes of a pod that the rest of the cap pays for; None without a cap."""
    paid = Meter(usd_per_hour, 0.0, disk_gb, place.max_usd, spent_usd).ends()
    return None if paid is None else paid / 60


def over_first_hour(place: RentedPlace, usd_per_hour: float) -> str:
    """Return why a price exceeds the cap in the first hour; empty if it does not. A cap below one hour usually ends a
    pod before it has done anything."""
    if place.max_usd is None or usd_per_hour <= place.max_usd:
        return ""
    return f"the first hour costs ${usd_per_hour:.2f}, more than where.max_usd={place.max_usd:g}"


def over_plan(
    place: RentedPlace, plan: dict[str, Any], usd_per_hour: float, *, named: bool, most_times: float
) -> str:  # fmt: skip
    """Return why a price is too high for a run of that plan; empty if it is not. Without a cap, hardware that was not
    `named` may cost at most a multiple of the plan."""
    hours, planned = plan.get("hours"), plan.get("usd_per_hour")
    if over := over_first_hour(place, usd_per_hour):
        return over
    if place.max_usd is not None and hours and usd_per_hour * hours > place.max_usd:
        return f"${usd_per_hour:.2f} an hour for {hours:.2f} hours is more than where.max_usd={place.max_usd:g}"
    if place.max_usd is None and not named and planned and usd_per_hour > most_times * planned:
        said = f"${usd_per_hour:.2f} an hour, where the plan says ${planned:.2f}"
        return f"{said}: name it in where.gpu_types to allow that"
    return ""


def check_hours(place: RentedPlace, usd_per_hour: float, hours: float) -> None:
    """CannotRunError where so many hours of a pod cost more than the cap."""
    cap, cost = place.max_usd, usd_per_hour * hours
    if cap is not None and cost > cap:
        what = f"{hours:g} hours cost ${cost:.2f}, more than where.max_usd={cap:g}"
        raise CannotRunError(Problem(what, "where.max_usd", f"write --hours {cap / usd_per_hour:.1f}, or less"))


def check_left(place: RentedPlace, usd_per_hour: float, spent_usd: float) -> None:
    """TooDearError for a pod after others of the same run: what is left must pay for a tenth of an hour at least."""
    left = None if place.max_usd is None else place.max_usd - spent_usd
    if left is not None and spent_usd and left < usd_per_hour / 10:
        what = f"${spent_usd:.2f} of where.max_usd={place.max_usd:g} are spent: no further pod is rented"
        raise TooDearError(Problem(what, None, "raise where.max_usd, and resume the run"))


def check_real_price(place: RentedPlace, pod_id: str, usd_per_hour: float, offered: float, spent_usd: float) -> None:
    """TooDearError for a pod whose own price is above what is left: it has been half as high again as the list's."""
    if place.max_usd is not None and usd_per_hour > place.max_usd - spent_usd:
        what = f"pod {pod_id} costs ${usd_per_hour:.2f} an hour, where ${offered:.2f} was offered"
        what += f": its first hour is more than what is left of where.max_usd={place.max_usd:g}; the pod was ended"
        raise TooDearError(Problem(what, "where.max_usd", "raise where.max_usd, or take cheaper hardware"))


def check_taken(place: RentedPlace, pod_id: str, usd_per_hour: float, spent_usd: float) -> None:
    """TooDearError for a pod that exists and costs more an hour than is left of the cap."""
    if place.max_usd is not None and usd_per_hour > place.max_usd - spent_usd:
        what = f"pod {pod_id} costs ${usd_per_hour:.2f} an hour: more than where.max_usd allows"
        raise TooDearError(Problem(what, "where.max_usd", "raise where.max_usd, or take cheaper hardware"))
