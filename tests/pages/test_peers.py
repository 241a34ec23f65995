"""benchmarks/peers.py: both sides are asked for the same work, and the table is made from what was said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import peers
from runner.config.command_line import Request
from runner.config.compose import compose


@pytest.mark.parametrize(("name", "ours", "theirs"), [
    ("lora", "lora", {"finetuning_type": "lora", "lora_rank": peers.RANK}),
    ("full", "full", {"finetuning_type": "full"}),
    ("qlora4", "qlora4", {"finetuning_type": "lora", "lora_rank": peers.RANK, "quantization_bit": 4}),
])  # fmt: skip
def test_both_train_the_same_method_in_the_same_batches(
    name: str, ours: str, theirs: dict[str, object], tmp_path: Path
) -> None:
    rows = peers.rows_file(tmp_path / "rows.jsonl", 3)
    for one in peers.WORKS[name].contestants:
        if one.theirs is None:
            spec = compose(Request(overrides=("hw=cpu", "data=file", f"data.path={rows}", *one.ours)))
            assert (spec.method.name, getattr(spec.method, "rank", peers.RANK)) == (ours, peers.RANK)
            assert spec.train.packing is True or spec.train.batch_size == spec.train.micro_batch_size == peers.BATCH
        else:
            keys = yaml.safe_load(peers._keys(one.theirs, tmp_path, rows, tmp_path / "model").read_text("utf-8"))
            assert keys.items() >= theirs.items()
            assert (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]) == (peers.BATCH, 1)


def test_the_ratio_is_of_the_medians_and_a_failure_is_shown() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": 9.0, "training": one, "mib": 100.0} for one in seconds]

    names = [one.name for one in peers.WORKS["lora"].contestants]
    told = {names[0]: runs(4, 8, 6), names[1]: [{"seconds": 1.0, "mib": 1.0, "failed": "no CUDA"}],
            names[2]: runs(3, 3, 90), names[3]: runs(2, 2, 2)}  # fmt: skip
    lines = peers._lines(peers.WORKS["lora"], told)
    assert [line[4] for line in lines] == ["1", "", "**2.00**", "**3.00**"]
    assert "no CUDA" in lines[1][0] and [line[5] for line in lines] == ["", "", "1.1", "2.0"]
