"""Utilisation, memory, power and temperature of a pod's GPUs, from its nvidia-smi."""

from __future__ import annotations

from dataclasses import dataclass

from runner.cloud.ssh import Connection
from runner.errors import CannotRunError, Problem

FIELDS = (
    "index", "name", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
MISSING = 127  # of a shell: no such command


@dataclass(frozen=True)
class Usage:
    """One GPU at one moment; None for what it does not tell (`[N/A]`)."""

    index: int
    name: str
    utilisation_percent: float | None
    memory_used_mib: float | None
    memory_total_mib: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None


def usage(connection: Connection) -> list[Usage]:
    """Of every GPU. CannotRunError for a pod without GPUs, or whose driver does not answer."""
    words = f"timeout 20 nvidia-smi --query-gpu={','.join(FIELDS)} --format=csv,noheader,nounits"
    code, said, wrong = connection.attempt(words)
    if code:
        what = "the pod has no nvidia-smi: it has no GPU" if code == MISSING else f"nvidia-smi ends with {code}"
        last = (wrong or said).strip().splitlines()[-1:]
        raise CannotRunError(Problem(": ".join([what, *last])))
    return [_parsed(line) for line in said.splitlines() if line.count(",") >= len(FIELDS) - 1]


def _parsed(line: str) -> Usage:
    index, name, *numbers = (part.strip() for part in line.split(","))
    return Usage(int(index), name, *(_number(text) for text in numbers[: len(FIELDS) - 2]))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
