"""DeepSpeed in the worker: its JSON, conversion of a checkpoint to resume with other shards, models under ZeRO-3."""

from __future__ import annotations

import subprocess
import sys
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn import Module
from transformers import AutoConfig
from trl.trainer import utils as trl_utils

from runner.config import deepspeed_json
from runner.errors import Problem, RunFailedError
from runner.plan.zero_config import resolved_config
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, write_atomically
from runner.spec import RunSpec
from runner.train.distributed import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "deepspeed.json"
_gather = trl_utils.maybe_gather_lm_head_ctx


def deepspeed_config(spec: RunSpec, run: RunDir, source: str) -> dict[str, Any] | None:
    """The resolved JSON, with no "auto" left; None without DeepSpeed. RequestError for an "auto" that stays open."""
    stage = spec.deepspeed.name
    if stage in ("none", "auto"):
        return None
    planned = run.read(FILE)
    if planned:
        return planned
    train = spec.train
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    assert train.precision != "auto"
    resolved = resolved_config(
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


LATEST_UNIVERSAL = "latest_universal"  # the file in which DeepSpeed looks for the folder's name


def _has_same_shards(spec: RunSpec, path: Path, ranks: Ranks) -> bool:
    """True if the checkpoint was written by as many processes and in the same ZeRO stage."""
    noted = checkpoints.facts(path)
    return noted.get("processes") == ranks.world and noted.get("stage") == spec.deepspeed.name


def config_to_resume(
    spec: RunSpec, run: RunDir, step: int, ranks: Ranks, config: dict[str, Any] | None
) -> dict[str, Any] | None:
    """DeepSpeed's JSON to resume after `step`. A checkpoint of other shards is converted to a universal one, once.

    RunFailedError where DeepSpeed cannot convert it.
    """
    path = checkpoints.folder(run, step)
    if config is None or not step or _has_same_shards(spec, path, ranks):
        return config
    problem = _convert(run, path) if ranks.main and not (path / LATEST_UNIVERSAL).is_file() else None
    problem = ranks.broadcast(problem)
    if problem is not None:
        noted = checkpoints.facts(path)
        remedy = f"go on with {noted.get('processes')} processes and deepspeed={noted.get('stage')}, which wrote it"
        raise RunFailedError(Problem(f"checkpoint {step} cannot be resharded: {problem}", None, remedy))
    return {**config, "checkpoint": {"load_universal": True}}


def _convert(run: RunDir, path: Path) -> str | None:
    """Run DeepSpeed's converter in a process of its own; its last line if it fails."""
    tag = (path / "latest").read_text("utf-8").strip()
    target = path / f"{tag}_universal"
    words = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words += ["--input_folder", str(path / tag), "--output_folder", str(target)]
    log = run.path / "logs" / "universal.log"
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run([sys.executable, *words], stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} ({log})"
    write_atomically(path / LATEST_UNIVERSAL, target.name)
    return None


def prepare_for_zero3(model: PreTrainedModel) -> None:
    """Prepare a model for ZeRO-3, before DeepSpeed wraps it: mark the blocks of a mixture, and fix TRL's fused head.

    A block with experts becomes a leaf, whose parameters are fetched together: in which order its modules are run may
    differ from step to step, and DeepSpeed then stops with "tracing error". DeepSpeed 0.19 knows the blocks of Mixtral,
    Qwen2-MoE and Qwen3-MoE by name, and no others.
    """
    from deepspeed.utils import set_z3_leaf_module  # not installed everywhere

    for block in moe_blocks(model):
        set_z3_leaf_module(block, True)
    trl_utils.maybe_gather_lm_head_ctx = _LmHeadGather(model)


def moe_blocks(model: PreTrainedModel) -> list[Module]:
    """The modules of a mixture that send tokens to experts; none of a dense model."""
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), Module)]


class _LmHeadGather:
    """TRL's context for a head's weight, which takes into account that ZeRO-3 may be fetching the weight.

    TRL 1.16 gathers a weight that is not there. One that is also the embedding may be in flight, fetched ahead for the
    backward pass: it would be read before it has arrived, and "Cannot partition a param in flight" ends the run.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)

    def __call__(self, *params: Any) -> AbstractContextManager[Any]:
        """Wait for what is in flight; gather the rest."""
        under_way = getattr(self.model(), "ds_inflight_param_registry", {})
        for param in params:
            if param is not None and param in under_way:
                under_way.pop(param).wait()
        context: AbstractContextManager[Any] = _gather(*params)
        return context
