"""Network volumes: made once, even if the answer is lost; found by id or name."""

from __future__ import annotations

import time

from runner.cloud.clock import pace
from runner.cloud.errors import CloudError, UnclearError
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.types import Volume
from runner.config.suggestions import nearest
from runner.errors import Problem, RequestError

# $/GB-month, standard kind: 0.07 for the first terabyte, 0.05 beyond (docs.runpod.io/pods/pricing, as of 2026-11-20).
USD_PER_GB, USD_PER_GB_BEYOND, FIRST_GB = 0.07, 0.05, 1000
LOOKS = 5


def usd_per_month(size_gb: int) -> float:
    """What a volume costs, used or not."""
    return round(min(size_gb, FIRST_GB) * USD_PER_GB + max(0, size_gb - FIRST_GB) * USD_PER_GB_BEYOND, 2)


def create(api: Api, name: str, size_gb: int, data_center: str) -> Volume:
    """A new one. RequestError where the name is taken or the data centre has none."""
    if any(volume.name == name for volume in api.volumes()):
        raise RequestError(Problem(f"there is a network volume {name} already", "command line", "take another name"))
    centers = {center.id: center for center in api.data_centers()}
    if data_center not in centers or not centers[data_center].volume_types:
        able = sorted(i for i, center in centers.items() if center.volume_types)
        near = nearest(data_center, able)
        what = f"RunPod has no network volumes in {data_center}"
        remedy = f"did you mean {near}?" if near and near != data_center else f"one of {', '.join(able)}"
        raise RequestError(Problem(what, "--data-center", remedy))
    try:
        return api.create_volume(name, size_gb, data_center)
    except UnclearError as error:  # not sent again: a second volume would be paid for as well
        for look in range(LOOKS):
            time.sleep(2.0 * pace(api.base) * look)
            found = [volume for volume in api.volumes() if volume.name == name]
            if found:
                return found[0]
        remedy = "look again: python -m runner volumes"
        raise UnclearError(Problem(f"{error}; no volume {name} has appeared", None, remedy)) from None


def find(api: Api, word: str) -> Volume:
    """By id or name; RequestError where there is none, or more than one."""
    volumes = api.volumes()
    found = [v for v in volumes if v.id == word] or [v for v in volumes if v.name == word]
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(f"{v.id} ({v.data_center})" for v in found)
        raise RequestError(Problem(f"{len(found)} network volumes are called {word}", "command line", f"by id: {ids}"))
    near = nearest(word, {v.name: v.name for v in volumes} | {v.id: v.id for v in volumes})
    remedy = f"did you mean {near}?" if near else "python -m runner volumes lists them"
    raise RequestError(Problem(f"there is no network volume {word}", "command line", remedy))


def delete(api: Api, volume: Volume) -> None:
    """Confirmed: CloudError where it is still there."""
    for look in range(LOOKS):
        time.sleep(2.0 * pace(api.base) * look)
        api.delete_volume(volume.id)
        if all(other.id != volume.id for other in api.volumes()):
            return
    remedy = "it is paid for: try again, or delete it at https://console.runpod.io/user/storage"
    raise CloudError(Problem(f"volume {volume.id} is still there", None, remedy))
