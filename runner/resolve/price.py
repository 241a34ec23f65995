"""The price of hardware: that of the cloud it is rented from, or would be."""

from __future__ import annotations

from pathlib import Path

from runner.cloud.providers import DEFAULT, PRICES, Price
from runner.config import conf_files
from runner.spec import HardwareSpec, RentedPlace, Where


def price_of(hw: HardwareSpec, where: Where | RentedPlace | None = None) -> Price:
    """US$ per GPU and hour (of the machine, on a CPU), and who says so: the cloud of `where`, else the default one."""
    place = where if isinstance(where, RentedPlace) else None
    name = place.name if place else DEFAULT
    return PRICES[name](hw, place) if name in PRICES else (None, None)


def hardware(folders: tuple[Path, ...] = (), where: RentedPlace | None = None) -> list[HardwareSpec]:
    """Every named GPU machine of the catalogue and of a user's own folders, with today's price at the cloud of `where`
    (and in the part of it that `where.cloud` names), where that tells it."""
    names = conf_files.options("hw", folders)
    place = RentedPlace(name=where.name, cloud=where.cloud) if where else None  # neither a bid nor other GPUs
    found = [HardwareSpec.model_validate(conf_files.load_choice("hw", name, folders)) for name in names]
    return [_priced(hw, place) for hw in found if hw.accelerator == "cuda"]


def _priced(hw: HardwareSpec, place: RentedPlace | None) -> HardwareSpec:
    usd, _ = price_of(hw, place)
    return hw if usd in (None, hw.usd_per_hour) else hw.model_copy(update={"usd_per_hour": usd})
