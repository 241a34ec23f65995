"""`where=`: here, or on a rented machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from runner.spec.part import Auto, Part

LONGEST_HOURS = 366 * 24
"""No pod runs for longer: a deadline that never comes is none."""


def country_codes(value: Any) -> list[str]:
    """One code of ISO 3166 or a list of them, in capitals; ValueError for what is none."""
    codes = list(value or []) if isinstance(value, (list, tuple)) or value is None else [value]
    for code in codes:
        if code is False:
            raise ValueError('a bare NO is false in YAML; write where.country=NO when typed, "NO" in a file')
        if not (isinstance(code, str) and code.isascii() and code.isalpha() and len(code) == 2):
            raise ValueError(f"{code!r} is no country code of two letters; write where.country=US, or [SE,RO]")
    return list(dict.fromkeys(code.upper() for code in codes))


class _Place(Part):
    """What every place shares."""

    max_usd: float | None = Field(default=None, gt=0)
    """Refuse a run whose plan costs more than this, in US$; a rented pod is ended before it costs more."""
    max_hours: float | None = Field(default=None, gt=0)
    """Refuse a run whose plan takes longer than this; a rented pod is ended after it."""


class LocalPlace(_Place):
    """Run on this machine."""

    name: Literal["local"] = "local"
    """Name of the choice."""


class _PodKeys(_Place):
    """What a rented pod is like."""

    cloud: Literal["secure", "community"] = "secure"
    """RunPod's own data centres, or machines of third parties, which are cheaper and less reliable."""
    data_centers: list[str] = []
    """Data centres in order of preference, such as `[EU-RO-1, US-KS-2]`; empty means any."""
    country: list[str] = []
    """Countries as ISO 3166 codes, such as `US` or `[SE, RO]`; empty means any."""
    gpu_types: list[str] = []
    """RunPod's exact GPU ids, tried in this order; empty means that of `hw` and its substitutes."""
    cpu_type: str = "cpu3c"
    """RunPod's CPU flavour, for `hw=cpu`."""
    image: str = "runpod/pytorch:1.0.7-cu1281-torch280-ubuntu2404"
    """Container image, or one of the names `pytorch`, `unsloth`, `axolotl` (conf/runpod/images.yaml)."""
    template: str | None = None
    """RunPod template, by id or exact name, instead of an image (`pods templates TEXT` finds one)."""
    volume: str | None = None
    """Network volume, by id or name. It is kept when the pod ends, and binds the run to its data centre."""
    volume_gb: int | Auto = Field(default="auto")
    """Disk at `/workspace` in GB, without a network volume; auto takes 1.5 times the plan's need plus 20."""
    container_disk_gb: int | Auto = Field(default="auto")
    """Disk of the container in GB; auto takes 20 (plus the plan's need on a CPU pod, which has no other disk)."""
    cuda_versions: list[str] = []
    """CUDA versions that the host's driver must support, such as `["12.8"]`; empty means any."""
    spot: bool = False
    """Rent an interruptible machine at a bid: cheaper, but it can be taken away at any time. Uses RunPod's old API."""
    bid_usd: float | None = Field(default=None, gt=0)
    """Bid per GPU-hour in US$, with `spot`."""
    max_replacements: int = Field(default=3, ge=0)
    """Number of replacements for pods that vanish during the run."""
    pod: str | None = None
    """Run in this existing pod, by its id or its run's: a stopped one, or one rented by `pods up`."""
    keep: bool | None = None
    """Stop the pod at the end instead of terminating it; its volume disk is kept and paid for. null keeps only a pod named by `pod` that was stopped before."""
    deadline_hours: float | Auto = Field(default="auto")
    """Hours after which the pod ends itself in any case, at most a year (8,784); auto is `max_hours`, or twice the plan plus one."""
    heartbeat_minutes: float = Field(default=30, gt=0, le=60 * LONGEST_HOURS)
    """Minutes without contact to an attached launcher after which the pod ends itself."""
    setup_minutes: float = Field(default=20, gt=0, le=60 * LONGEST_HOURS)
    """Minutes until SSH must respond; a first image pull takes 9 to 13."""
    bad_host_minutes: float = Field(default=3, gt=0, le=60 * LONGEST_HOURS)
    """Minutes without a machine after which a pod is given up and another one is tried."""

    @model_validator(mode="before")
    @classmethod
    def _without_push(cls, values: object) -> object:
        """`push_to: null` stands in the spec.json of runs from before there was `push.to`."""
        if isinstance(values, dict) and "push_to" in values and values["push_to"] is None:
            return {key: value for key, value in values.items() if key != "push_to"}
        return values

    @field_validator("country", mode="before")
    @classmethod
    def _codes(cls, value: object) -> object:
        return country_codes(value)

    @field_validator("volume_gb", "container_disk_gb", "deadline_hours")
    @classmethod
    def _positive(cls, value: float | Auto, info: ValidationInfo) -> float | Auto:
        if value != "auto" and value <= 0:
            raise ValueError(f"expected more than 0, or auto; write where.{info.field_name}=auto")
        return value

    @field_validator("deadline_hours")
    @classmethod
    def _ends(cls, value: float | Auto) -> float | Auto:
        if value != "auto" and value > LONGEST_HOURS:
            raise ValueError(f"expected at most {LONGEST_HOURS} (a year), or auto; write where.deadline_hours=auto")
        return value

    @property
    def keeps(self) -> bool:
        """The pod is stopped at the end, and not ended."""
        return self.pod is not None if self.keep is None else self.keep

    @model_validator(mode="after")
    def _agree(self) -> _PodKeys:
        if self.pod is not None and (self.spot or self.volume):
            key, word = ("where.spot", "spot") if self.spot else ("where.volume", "volume")
            raise ValueError(f"{key}: a pod that exists has its price and its disks already; leave out where.{word}")
        if self.spot and self.bid_usd is None:
            raise ValueError("where.spot=true needs a bid per GPU-hour; write where.bid_usd=0.30, say")
        if self.bid_usd is not None and not self.spot:
            raise ValueError("where.bid_usd is for interruptible machines; add where.spot=true, or leave it out")
        if self.volume is not None and self.cloud == "community":
            raise ValueError("where.volume: network volumes are in the secure cloud only; write where.cloud=secure")
        return self


class RentedPlace(_PodKeys):
    """A place at a provider, which has the same name in `runner/cloud/providers.py`."""

    name: str
    """Name of the choice."""


class RunPodPlace(RentedPlace):
    """Run on a pod rented from RunPod, which is terminated and verified to be gone at the end."""

    name: Literal["runpod"]
    """Name of the choice."""


class AutoPlace(_PodKeys):
    """Run on this machine if the run fits and ends in time, else on the cheapest rented hardware."""

    name: Literal["auto"]
    """Name of the choice."""
    max_hours_here: float = Field(default=24, gt=0)
    """Longest planned time on this machine; a longer run is rented if that is faster and within `max_usd`. `max_hours` applies as well."""

    @property
    def rented(self) -> RunPodPlace:
        """The pod, if one is rented; what was not set stays so."""
        return RunPodPlace.model_validate(
            {**self.model_dump(exclude_unset=True, exclude={"max_hours_here"}), "name": "runpod"}
        )


Where = Annotated[LocalPlace | AutoPlace | RunPodPlace, Field(discriminator="name")]
