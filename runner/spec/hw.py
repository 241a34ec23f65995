"""`hw=`: the machine, and `deepspeed=`: how its memory is shared."""

from __future__ import annotations

import os
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from runner.spec.part import Named, Part


class HardwareSpec(Named):
    """The hardware: one machine, or several identical ones."""

    name: str = Field(min_length=1)
    """Name of the choice, as in `hw=h100x3`."""
    accelerator: Literal["detect", "cuda", "cpu"]
    """`cuda`, `cpu`, or `detect`: look at this machine when the run is composed."""
    gpu: str | None = None
    """The GPU's name as the driver reports it, without the vendor, such as `H100 80GB HBM3`."""
    runpod_gpu_id: str | None = None
    """RunPod's exact id of this GPU."""
    num_gpus: int = Field(default=0, ge=0)
    """GPUs per node."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines."""
    num_processes: int | None = Field(default=None, ge=1)
    """Processes per node; null means one per GPU, or one on a CPU."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU (of the machine, on a CPU)."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPU cores of one node; on a CPU run, the threads torch uses."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Main memory of one node."""
    rented_memory_gib_per_gpu: float | None = Field(default=None, gt=0)
    """Least main memory of a rented pod per GPU; null if unknown. `host_memory_gib` takes precedence."""
    rented_vcpus_per_gpu: int | None = Field(default=None, ge=1)
    """Least number of vCPUs of a rented pod per GPU; null if unknown. `num_cpus` takes precedence."""
    bf16: bool | None = None
    """The hardware multiplies in bfloat16 natively."""
    flash_attention: bool = False
    """FlashAttention 2 runs on it (Ampere and later)."""
    compute_capability: float | None = Field(default=None, gt=0)
    """CUDA compute capability."""
    tflops_bf16: float | None = Field(default=None, gt=0)
    """Dense 16-bit peak of one GPU in TFLOP/s, without sparsity, from the vendor's datasheet."""
    bandwidth_gb_s: float | None = Field(default=None, gt=0)
    """Memory bandwidth of one GPU in GB/s, from the vendor's datasheet."""
    interconnect: Literal["nvlink", "pcie", "none"] | None = None
    """Connection between the GPUs of one node."""
    usd_per_hour: float | None = Field(default=None, ge=0)
    """Price of one GPU per hour in US$, on `price_date`; used without a live catalogue."""
    price_date: str | None = None
    """Date and source of `usd_per_hour`, or the reason for its absence, such as `no dated price`."""
    env: dict[str, str] = {}
    """Environment variables of every process, such as `NCCL_P2P_DISABLE`; values are texts, as written (`0,1`, `010`, `no`)."""
    hostfile: str | None = None
    """File with a line `name slots=4` per machine. The first is this machine; the others are started over ssh."""
    rendezvous: str | None = None
    """Rendezvous address, `host:port` of the first node; null means the first name in the hostfile and port 29500."""
    node_address: str | None = None
    """Address of the first node as seen by the others; null means that of the route to the rendezvous."""

    @field_validator("env", mode="before")
    @classmethod
    def _without_null(cls, value: object) -> object:
        """Null takes a variable of the profile away."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("rendezvous")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"([^\s:]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?", value or "")
        if value is not None and (found is None or not found[2] or not 0 < int(found[2][1:]) < 65536):
            host = found[1] if found else "HOST"
            raise ValueError(
                f"expected HOST:PORT; write hw.rendezvous={host}:29500, say, with the first node's address"
            )
        return value

    @model_validator(mode="after")
    def _gpus_match(self) -> HardwareSpec:
        if self.accelerator == "cuda" and self.num_gpus < 1:
            raise ValueError("hw.num_gpus must be at least 1 where hw.accelerator is cuda; choose hw=cpu for none")
        if self.accelerator == "cpu" and self.num_gpus:
            raise ValueError(
                "hw.num_gpus must be 0 where hw.accelerator is cpu; choose hw=local for this machine's GPUs"
            )
        return self

    @property
    def processes_per_node(self) -> int:
        """One per GPU, or as many as were asked for."""
        return self.num_processes or max(1, self.num_gpus)

    def main_memory_gib(self, *, rented: bool) -> float | None:
        """Main memory of one node; None where it is not known."""
        if self.host_memory_gib is None and rented and self.rented_memory_gib_per_gpu:
            return self.rented_memory_gib_per_gpu * self.num_gpus
        return self.host_memory_gib

    def cpus(self, *, rented: bool) -> int | None:
        """CPU cores of one node; None where it is not known."""
        if self.num_cpus is None and rented and self.rented_vcpus_per_gpu:
            return self.rented_vcpus_per_gpu * self.num_gpus
        return self.num_cpus

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_nodes * self.processes_per_node


class DeepSpeedSpec(Part):
    """The DeepSpeed ZeRO stage."""

    name: Literal["auto", "none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"] = "auto"
    """The stage; auto takes none for one process."""
    config: str | None = None
    """DeepSpeed JSON: a file name in `deepspeed_configs/`, or a path. With `deepspeed=auto`, your own file decides the stage."""
    nvme_path: str | None = None
    """Folder on an NVMe disk that `zero3_offload` uses instead of main memory; `~` is the home folder."""

    @field_validator("nvme_path")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        """With the home folder in place of `~`, which DeepSpeed does not know."""
        return value and os.path.expanduser(value)

    @model_validator(mode="after")
    def _used(self) -> DeepSpeedSpec:
        for key in ("config", "nvme_path"):
            unread = self.name == "none" or (key == "nvme_path" and self.name == "auto" and self.config is None)
            if unread and getattr(self, key) is not None:
                why = "runs without DeepSpeed" if self.name == "none" else "takes no stage that offloads"
                instead = (
                    "deepspeed=auto, which takes the stage from it" if key == "config" else "deepspeed=zero3_offload"
                )
                raise ValueError(f"deepspeed.{key}={getattr(self, key)}: deepspeed={self.name} {why}; write {instead}")
        return self
