"""Everything that can be known of a run before it starts, put together."""

from __future__ import annotations

from runner.plan.memory import Job
from runner.plan.shape import shape_of
from runner.plan.training import Training, training_of
from runner.spec import RunSpec


def inputs_of(spec: RunSpec, stage: str = "none") -> tuple[Training, Job]:
    """The run in the arithmetic's own terms."""
    train, hw = spec.train, spec.hw
    assert train.precision != "auto"
    training = training_of(shape_of(spec.model), spec.method, train.precision, deepspeed=stage != "none")
    flash = train.attention.startswith("flash") or (train.attention == "auto" and hw.flash_attention)
    job = Job(
        seq=train.max_length,
        precision=train.precision,
        checkpointing=train.gradient_checkpointing is True,
        attention="flash" if flash else "eager" if train.attention == "eager" else "sdpa",
        optimizer=train.optimizer,
        on_gpu=hw.accelerator == "cuda",
        world=hw.world_size,
        eval_batch=spec.eval.batch_size if spec.eval.num_prompts else 0,
        eval_new_tokens=spec.eval.max_new_tokens,
    )
    return training, job
