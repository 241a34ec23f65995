"""A finished `spec.json` as the start of another run, with single values changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError
from runner.provenance import Origin, flat, shown


def read(file: Path) -> dict[str, Any]:
    """The values of a `spec.json`; RequestError if it cannot be read or holds something else."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RequestError(Problem(f"cannot read {shown(file)}: {error.strerror}", "command line")) from None
    except ValueError as error:
        raise RequestError(Problem(f"{shown(file)} is not JSON: {error}", "command line")) from None
    if not isinstance(values, dict):
        raise RequestError(Problem(f"{shown(file)} is not a spec.json: it holds no keys", "command line"))
    return values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, mappings on the way to it made where there are none."""
    *parents, leaf = key.split(".")
    for step in parents:
        inner = values.get(step)
        values[step] = inner if isinstance(inner, dict) else {}
        values = values[step]
    values[leaf] = value


def origins(file: Path) -> Iterator[Origin]:
    """Every key that the file sets."""
    return (Origin(key, value, shown(file)) for key, value in flat(read(file)))
