"""The DeepSpeed JSON of the worker: the planned one, or one made here for a model without a plan."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

from transformers import AutoConfig
from trl.trainer import utils as trl_utils

from runner.config import deepspeed_json
from runner.plan import zero
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import moe_compat

FILE = "deepspeed.json"
_gather = trl_utils.maybe_gather_lm_head_ctx


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
    resolved = zero.resolved_config(
        deepspeed_json.deepspeed_templates(spec.deepspeed)[stage],
        micro_batch=train.micro_batch_size,
        accumulation=train.accumulation_steps,
        world=spec.hw.world_size,
        hidden_size=AutoConfig.from_pretrained(source, revision=spec.model.revision).get_text_config().hidden_size,
        precision=train.precision,
        max_grad_norm=train.max_grad_norm,
        nvme_path=spec.deepspeed.nvme_path,
    )
    return dict(resolved)


def settle(model: Any) -> None:
    """Prepare a model for ZeRO-3, before DeepSpeed wraps it: mark the blocks of a mixture, and mend TRL's fused head.

    A block with experts becomes a leaf, whose parameters are fetched together: in which order its modules are run may
    differ from step to step, and DeepSpeed then stops with "tracing error". DeepSpeed 0.19 knows the blocks of Mixtral,
    Qwen2-MoE and Qwen3-MoE by name, and no others.
    """
    from deepspeed.utils import set_z3_leaf_module  # not installed everywhere

    for block in moe_compat.blocks(model):
        set_z3_leaf_module(block, True)
    trl_utils.maybe_gather_lm_head_ctx = _Fetched(model)


class _Fetched:
    """TRL's context for a head's weight, which takes into account that ZeRO-3 may be fetching the weight.

    TRL 1.16 gathers a weight that is not there. One that is also the embedding may be in flight, fetched ahead for the
    backward pass: it would be read before it has arrived, and "Cannot partition a param in flight" ends the run.
    """

    def __init__(self, model: Any) -> None:
        self.model = weakref.ref(model)

    def __call__(self, *params: Any) -> AbstractContextManager[Any]:
        """Wait for what is in flight; gather the rest."""
        under_way = getattr(self.model(), "ds_inflight_param_registry", {})
        for param in params:
            if param is not None and param in under_way:
                under_way.pop(param).wait()
        context: AbstractContextManager[Any] = _gather(*params)
        return context
