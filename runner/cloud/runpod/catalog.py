"""RunPod's hardware and images as conf/runpod/*.yaml and its documentation have them: nothing is asked of its API."""

from __future__ import annotations

from typing import Any

from runner.config.pod_packages import runpod_table
from runner.spec import RunPodPlace

FEWEST, MOST = 2, 32


def vcpus(wanted: int | None, fewest: int = FEWEST, most: int = MOST) -> int:
    """The smallest power of two of vCPUs, as RunPod's CPU pods have, that holds as many, or the most there are."""
    found = fewest
    while found < min(wanted or fewest, most):
        found *= 2
    return found


def gpus_by_model_size(num_parameters: int | None) -> list[str]:
    """The list of conf/runpod/gpus.yaml for a model of that size."""
    billions = (num_parameters or 0) / 1e9
    for entry in runpod_table("gpus")["by_size"]:
        if entry["up_to"] is None or billions <= entry["up_to"]:
            return list(entry["gpus"])
    return []


def image_of(place: RunPodPlace) -> str:
    """The container image that `where.image` names."""
    named: dict[str, Any] = runpod_table("images").get(place.image, {})
    return str(named.get("image", place.image))
