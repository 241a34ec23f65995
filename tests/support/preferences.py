"""Small preference tasks that a tiny model can learn, and runs of them in this process."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.conftest import spec_of, train_here
from tests.support.processes import tiny_model

COLOURS = ("red", "green", "blue", "black", "white", "amber", "gold", "grey", "pink", "teal")
THINGS = ("door", "car", "hat", "boat", "lamp", "chair", "shirt", "house")


def pairs(count: int = 60, seed: int = 0) -> Iterator[dict[str, str]]:
    """The polite answer is the better one; both name the same colour and thing."""
    rng = random.Random(seed)
    for _ in range(count):
        colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
        yield {
            "prompt": f"Which colour is the {thing}? Say {colour}.",
            "chosen": f"The {thing} is {colour}, I think.",
            "rejected": f"Find out yourself what the {thing} is, {colour} or not.",
        }


def judged(count: int = 60) -> Iterator[dict[str, Any]]:
    """The same answers one by one, marked."""
    for row in pairs(count):
        yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """As JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def words(folder: Path, *more: str) -> list[str]:
    """A run of the tiny model on pairs (or, for KTO, on marked answers): 6 steps of 4."""
    model = folder / "tiny"
    if not model.exists():
        tiny_model(model)
        write(folder / "pairs.jsonl", pairs())
        write(folder / "judged.jsonl", judged())
    rows = "judged" if "objective=kto" in more else "pairs"
    return [
        "model=hub", f"model.id={model}", f"run.output_dir={folder / 'runs'}", "hw=cpu", "hw.num_cpus=1",
        "train.precision=fp32", "train.max_steps=6", "train.batch_size=4", "train.micro_batch_size=2",
        "train.max_length=96", "train.learning_rate=2e-3", "data=file", f"data.path={folder / f'{rows}.jsonl'}",
        "data.eval_fraction=0.1", "eval.num_prompts=0", *more,
    ]  # fmt: skip


def train(folder: Path, *more: str) -> tuple[Any, Any]:
    """Train in this process: what the worker leaves, and its run directory."""
    return train_here(spec_of(*words(folder, *more)))
