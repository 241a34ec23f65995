"""`train.optimizer=muon` updates the matrices of the layers, is planned to the byte, and resumes bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.errors import RequestError
from runner.plan.memory import _moments
from runner.plan.model_shape import shape_for
from runner.plan.step_time import orthogonalisation_flops
from runner.plan.trainable import training_of
from runner.plan.zero_config import refusal
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama

MUON = ("train.optimizer=muon", "train.learning_rate=1e-2", "train.save_every_steps=3", "eval.num_prompts=2")


def learned(run: RunDir) -> tuple[float, float]:
    measured = json.loads((run.path / "summary.json").read_text("utf-8"))["eval"]
    return measured["before"]["loss"], measured["after"]["loss"]


@pytest.mark.parametrize("method", [("method=full",), ("method=freeze", "method.layers=last:2")])
def test_a_run_learns_keeps_what_is_planned_and_resumes_bit_by_bit(
    method: tuple[str, ...], train: Callable[..., Any], tmp_path: Path
) -> None:
    finished, run = train(*tiny_llama.words(tmp_path), *method, *MUON)
    before, after = learned(run)
    assert after < before

    saved = torch.load(checkpoints.folder(run, max(checkpoints.steps(run))) / "optimizer.pt", weights_only=True)
    states = saved["state"].values()
    held = sum(value.nbytes for state in states for name, value in state.items() if name != "step")
    planned = training_of(shape_for(run.spec), run.spec.method, "bf16", deepspeed=False)
    assert held == round(_moments(planned, "muon"))
    matrices = sum(state["momentum_buffer"].numel() for state in states if "momentum_buffer" in state)
    assert matrices == planned.in_matrices and 0 < matrices < planned.trainable

    spec = run.spec
    again = RunDir.create(spec)  # the same run, from its third step
    (again.path / "checkpoints").mkdir(exist_ok=True)
    checkpoints.folder(run, 3).rename(checkpoints.folder(again, 3))
    resumed, _ = train_here(spec, again)
    ours, theirs = finished.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_embeddings_head_and_norms_are_left_to_adamw(train: Callable[..., Any], tmp_path: Path) -> None:
    """After one step a matrix has moved by at most Muon's 0.2 · learning rate (RMS), all else by AdamW's 1."""
    words = [*tiny_llama.words(tmp_path, tied=False), "method=full", *MUON, "train.precision=fp32", "train.max_steps=1"]
    finished, _ = train(*words, "train.schedule=constant", "train.max_grad_norm=0")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for (name, old), new in zip(base.named_parameters(), finished.model.parameters(), strict=True):
        moved = (new.detach() - old.detach()).abs()
        moved = moved[moved > 1e-6]  # a word that was not read has no gradient
        rms = float(moved.square().mean().sqrt())
        inside = ".layers." in name and "norm" not in name
        if inside:  # below 0.2: a gradient of few tokens has not the matrix's full rank
            assert 5e-4 < rms < 2.6e-3, name
        else:
            assert rms == pytest.approx(1e-2, rel=0.05), name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model=smollm2_135m", "method=lora"), "write train.optimizer=adamw, or method=full"),
        (("model=mixtral_8x7b", "method=full"), "one tensor of three dimensions"),
    ],
)
def test_what_muon_cannot_update_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        spec_of(*words, "hw=h100", "train.optimizer=muon")
    assert said in f"{refused.value} {refused.value.problems}"


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_zero_hands_it_flat_parts_and_is_refused(stage: str) -> None:
    problem = refusal(stage, "full", "muon", "bf16", True)
    assert problem is not None and "deepspeed=none" in str(problem.remedy)


def test_five_iterations_of_three_products_are_counted() -> None:
    m, n = 3, 7
    one = 2 * m * m * n + 2 * m**3 + 2 * m * m * n
    assert orthogonalisation_flops([(n, m, 2), (m, n, 1)]) == 3 * 5 * one
