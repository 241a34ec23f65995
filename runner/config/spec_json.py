"""A finished `spec.json` as the start of another run, with single values changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from runner.config import conf_files, json_text, other_trainers
from runner.config.provenance import Origin, display_path, flattened, origins_in_file
from runner.config.validation import validated
from runner.errors import Problem, RequestError
from runner.spec import RunSpec


def read_spec_file(file: Path) -> dict[str, object]:
    """The values of a resolved run; RequestError if it cannot be read or holds something else."""
    if file.suffix != ".json":
        return conf_files.read_file(file)
    try:
        values = json_text.loads(file.read_text("utf-8"), object_pairs_hook=json_text.once)
    except OSError as error:
        what = f"cannot read {display_path(file)}: {error.strerror}"
        raise RequestError(Problem(what, "command line", how_to_restore(file))) from None
    except json_text.RepeatedKeyError as error:
        raise RequestError(Problem(str(error), display_path(file), "leave one of them out")) from None
    except ValueError as error:
        what = "holds nothing" if not file.stat().st_size else f"is not JSON: {error}"
        raise RequestError(Problem(f"{display_path(file)} {what}", "command line", how_to_restore(file))) from None
    if not isinstance(values, dict):
        what = f"{display_path(file)} is not a spec.json: it holds no keys"
        raise RequestError(Problem(what, "command line", how_to_restore(file)))
    lacks = [name for name, field in RunSpec.model_fields.items() if field.is_required() and name not in values]
    lacks += [name for name in ("model", "method") if isinstance(values.get(name), str)]  # of `plan --json`
    if lacks:
        raise RequestError(_other(file, values, lacks))
    return values


def how_to_restore(file: Path) -> str:
    """Return the remedy for a lost or damaged `spec.json`."""
    same = file.with_name("training.yaml")
    if same.is_file():
        words = f"show {quote(display_path(same))} --json > {quote(display_path(file))}"
        return f"{same.name} beside it holds the same values: python -m runner {words} writes it again"
    if file.with_name("status.json").is_file():
        return f"bring {file.name} back from a copy: {same.name}, which held the same values, is gone as well"
    return "name the spec.json of a run, or a recipe (docs/recipes.md)"


def _other(file: Path, values: dict[str, object], lacks: list[str]) -> Problem:
    """A JSON file that is no whole spec.json: DeepSpeed's, another trainer's, or one that somebody has cut."""
    if values.keys() & {"zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer"}:
        remedy = f"write deepspeed=auto deepspeed.config={display_path(file)}"
        return Problem(f"{display_path(file)} is a DeepSpeed config, and no spec.json", "command line", remedy)
    if theirs := other_trainers.problems_in(file):
        return theirs[0]
    remedy = "write a recipe (docs/recipes.md): what it leaves out has its default"
    if any(file.with_name(name).is_file() for name in ("training.yaml", "status.json")):  # of a run
        remedy = how_to_restore(file)
    return Problem(
        f"{display_path(file)} is not a whole spec.json: it has no {', '.join(lacks)}", "command line", remedy
    )


def load_spec(file: Path) -> RunSpec:
    """The run that a `spec.json` describes; RequestError with every key that somebody has made wrong in it."""
    return validated(read_spec_file(file), lambda key: display_path(file))


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, mappings on the way to it made where there are none."""
    *parents, leaf = key.split(".")
    for step in parents:
        inner = values.get(step)
        values[step] = inner if isinstance(inner, dict) else {}
        values = values[step]
    values[leaf] = value


def origins_in_spec(file: Path) -> Iterator[Origin]:
    """Every key that the file sets."""
    if file.suffix != ".json":
        return origins_in_file(file, "")
    return (Origin(key, value, display_path(file)) for key, value in flattened(read_spec_file(file)))
