"""Packages and variables of the trackers: what each needs installed, and what it reads from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import util


@dataclass(frozen=True)
class TrackerPackage:
    """Package of a tracker."""

    title: str
    module: str
    extra: str
    """Extra of this project that installs it."""
    requirements: tuple[str, ...] = ()
    """What a pod gets beyond the requirements of every run, as in pyproject.toml."""
    secrets: tuple[str, ...] = ()
    """Variables that travel to a pod in its memory. An address is one where it may hold a password."""
    settings: tuple[str, ...] = ()
    """Variables that are no secrets."""
    own_project: bool = False
    """It reads `track.project`."""

    @property
    def installed(self) -> bool:
        """The package is there; it is not imported."""
        return util.find_spec(self.module) is not None


TRACKER_PACKAGES = {
    "tensorboard": TrackerPackage("TensorBoard", "tensorboard", "train"),
    "wandb": TrackerPackage(
        "Weights & Biases", "wandb", "train", secrets=("WANDB_API_KEY",), settings=("WANDB_MODE", "WANDB_BASE_URL"),
        own_project=True,
    ),
    "mlflow": TrackerPackage(
        "MLflow", "mlflow", "mlflow", ("mlflow-skinny>=3.17", "sqlalchemy>=2.1", "alembic>=1.20"),
        ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
        ("MLFLOW_TRACKING_INSECURE_TLS",), own_project=True,
    ),
}  # fmt: skip
"""By the name of `track`."""


def travels(name: str, value: str) -> bool:
    """False for an address on this machine's disk: in a pod, the store of the run's own folder comes back instead."""
    return not name.endswith("_URI") or value.startswith(("http://", "https://", "databricks"))


def package_of(name: str) -> TrackerPackage | None:
    """The package of a tracker; None for `none` and for one of the user's own."""
    return TRACKER_PACKAGES.get(name)
