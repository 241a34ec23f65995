"""DeepSpeed's JSON for the worker: the one that was planned, or made here for a model that the plan does not know."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from runner import deepspeed_json
from runner.plan import zero
from runner.rundir import RunDir
from runner.spec import RunSpec

FILE = "deepspeed.json"


def deepspeed_config(spec: RunSpec, run: RunDir, source: str) -> dict[str, Any] | None:
    """Resolved, with no "auto" left; None for a run without DeepSpeed. RequestError for an "auto" nobody decides."""
    stage = spec.deepspeed.name
    if stage in ("none", "auto"):
        return None
    planned = run.read(FILE)
    if planned:
        return planned
    train = spec.train
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    assert train.precision != "auto"
    return zero.resolved_config(
        deepspeed_json.templates(spec.deepspeed)[stage],
        micro_batch=train.micro_batch_size,
        accumulation=train.accumulation_steps,
        world=spec.hw.world_size,
        hidden_size=AutoConfig.from_pretrained(source, revision=spec.model.revision).get_text_config().hidden_size,
        precision=train.precision,
        max_grad_norm=train.max_grad_norm,
        nvme_path=spec.deepspeed.nvme_path,
    )
