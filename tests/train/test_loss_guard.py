"""A loss that is no number stops the run where it happens; one that jumps is skipped or gone back from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import pack_dataset

from runner.errors import Problem, RequestError, Rewind, RunFailedError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, display_path
from runner.train import model_loading
from runner.train.objectives.sft import SftTrainer, UnguardedSftTrainer, sft_config
from runner.train.trainers import guarded_trainer
from runner.train.trainers.loss_guard import MAX_REWINDS, LossGuard, MicroBatch, is_spike, step_losses
from runner.train.trainers.trainer_settings import shared_settings
from tests.conftest import ROOT, spec_of

VOCABULARY = 64
POISON = VOCABULARY - 1
PATTERN = [2, 3, 4, 5] * 4
GARBAGE = [41, 17, 58, 23, 36, 12, 55, 29, 47, 19, 33, 51, 14, 60, 26, 39]


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def model() -> Any:
    """Two layers, 64 words, embeddings of its own: a broken one is read only where its word occurs."""
    set_seed(1)
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


class Steps(TrainerCallback):
    """Remembers what a test wants to look at afterwards."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}
        self.gradients: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights = copy(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})


def copy(model: Any) -> dict[str, Any]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


class Lab:
    """A run of the tiny model, and trainers on it."""

    def __init__(self, path: Path, *overrides: str) -> None:
        words = ("hw=cpu", "method=full", "train.precision=fp32", "train.packing=false", "train.schedule=constant",
                 "train.warmup_ratio=0", "train.learning_rate=1e-2", "train.batch_size=1")  # fmt: skip
        self.spec = spec_of(*words, *overrides, f"run.output_dir={path / 'runs'}")
        self.run = RunDir.create(self.spec)
        self.steps = Steps()
        self.notes: list[str] = []

    def trainer(self, data: Dataset, **changed: Any) -> SftTrainer:
        guard = LossGuard(self.spec.train, self.run, note=self.notes.append)
        args = sft_config(self.spec, shared_settings(self.spec, self.run, 100, []))
        args.num_train_epochs, args.max_steps = 1, -1
        return SftTrainer(
            model=model(), args=args, train_dataset=data, eval_dataset=data.select(range(2)),
            processing_class=tokenizer(), callbacks=[self.steps], guard=guard, **changed,
        )  # fmt: skip


def dataset(many: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"input_ids": many, "labels": many})


def order(trainer: SftTrainer) -> list[list[int]]:
    """Rows of every micro batch, in the order of training."""
    return [batch[guarded_trainer.ROW_IDS] for batch in trainer.get_train_dataloader()]


def flat(many: list[list[int]]) -> list[int]:
    return [one for some in many for one in some]


def with_one(special: list[int], at: int, of: int, lab: Callable[[], Lab]) -> tuple[Dataset, int]:
    """`of` rows of the pattern and a special one, so placed that it is met in micro batch `at`; and its row."""
    (row,) = order(lab().trainer(dataset([PATTERN] * of)))[at]
    return dataset([special if i == row else PATTERN for i in range(of)]), row


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7)) for name in first)


def test_a_broken_loss_stops_before_a_weight_changes_and_shows_the_row(tmp_path: Path) -> None:
    special = [2, 3, 4, 5, POISON, *PATTERN[5:]]
    data, row = with_one(special, 7, 12, lambda: Lab(tmp_path))
    lab = Lab(tmp_path, "train.batch_size=3", "train.micro_batch_size=1")
    trainer = lab.trainer(data)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[POISON] = math.nan
    with pytest.raises(RunFailedError) as caught:
        trainer.train()
    (problem,) = caught.value.problems
    assert f"the loss became nan at step 3, micro batch 2, in row {row} of" in problem.what
    assert problem.remedy and "learning_rate" in problem.remedy
    assert trainer.state.global_step == 2 and same(lab.steps.weights, copy(trainer.model))
    file = lab.run.path / "nan" / "step-3-rank0.json"
    assert problem.source == display_path(file)
    kept = json.loads(file.read_text("utf-8"), parse_constant=lambda word: pytest.fail(word))
    losses = [line["loss"] for line in trainer.state.log_history]
    words = " ".join(f"w{token}" for token in special)
    assert kept == {
        "step": 3, "micro_batch": 2, "rank": 0, "row_ids": [row], "loss": "nan", "learning_rate": pytest.approx(1e-2),
        "last_losses": losses, "rows": [{"row": row, "num_tokens": 16, "texts": [words]}],
    }  # fmt: skip
    assert len(losses) == 2


def test_rows_that_are_packed_and_joined_are_all_named(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.packing=true", "train.max_length=32", "train.batch_size=2", "train.micro_batch_size=2")
    data = pack_dataset(dataset([[*PATTERN[:9], POISON, 5] if i == 3 else PATTERN[:10] for i in range(30)]), 32, "bfd")
    (row,) = [i for i, line in enumerate(data) if POISON in line["input_ids"]]
    trainer = lab.trainer(data)
    step, others = next((i + 1, ids) for i, ids in enumerate(order(trainer)) if row in ids)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[POISON] = math.nan
    with pytest.raises(RunFailedError, match=f"step {step}, micro batch 1, in rows {others[0]}, {others[1]} of"):
        trainer.train()
    kept = lab.run.read(f"nan/step-{step}-rank0.json")
    assert kept["row_ids"] == others
    (mine,) = [line for line in kept["rows"] if line["row"] == row]
    lengths = data[row]["seq_lengths"]
    assert [len(text.split()) for text in mine["texts"]] == lengths and len(lengths) > 1
    assert sum(f"w{POISON}" in text.split() for line in kept["rows"] for text in line["texts"]) == 1


def test_guarded_losses_are_bit_by_bit_those_without_a_guard(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.batch_size=4", "train.micro_batch_size=2", "train.on_loss_spike=skip")
    data = dataset([PATTERN[: 8 + i % 9] for i in range(22)])
    guarded = lab.trainer(data)
    guarded.train()
    bare = UnguardedSftTrainer(
        model=model(), args=guarded.args, train_dataset=data, processing_class=tokenizer(), callbacks=[lab.steps]
    )
    bare.train()
    keys = ("step", "loss", "grad_norm")
    ours, theirs = ([[line.get(key) for key in keys] for line in each.state.log_history] for each in (guarded, bare))
    assert ours == theirs and len(ours) == 7 and same(copy(guarded.model), copy(bare.model))


def test_beginnings_of_rows_are_cut() -> None:
    (found,) = guarded_trainer.row_texts(dataset([PATTERN * 500]), [0], tokenizer())
    assert found["num_tokens"] == 8000 and len(found["texts"][0]) == 300


def test_every_row_is_met_once_and_the_model_never_sees_its_number(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.batch_size=4", "train.micro_batch_size=2")
    trainer = lab.trainer(dataset([PATTERN] * 11))
    assert sorted(flat(order(trainer))) == list(range(11))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 4


@pytest.mark.parametrize("fp16", [False, True])
def test_a_broken_gradient_stops_unless_a_scaler_passes_over_it(fp16: bool, tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.batch_size=2", "train.micro_batch_size=1", "train.save_every_steps=3")
    trainer = lab.trainer(dataset([PATTERN] * 8))
    sixth = chain([1, 1, 1, 1, 1, math.inf], repeat(1))
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * next(sixth))
    trainer.args.fp16 = fp16  # only what the guard is told: a CPU has no scaler
    with pytest.raises(RunFailedError) as caught:
        trainer.train()
    (problem,) = caught.value.problems
    if fp16:  # nothing passed over it: the next loss
        assert "the loss became nan at step 4" in problem.what
        return
    assert "the gradient norm became inf at step 3, in rows " in problem.what
    kept = lab.run.read("nan/step-3-rank0.json")
    assert kept["grad_norm"] == "inf" and kept["row_ids"] == flat(order(trainer)[4:6]) and "loss" not in kept
    assert not checkpoints.steps(lab.run)  # a step is judged before it is saved


def test_skip_learns_nothing_from_the_micro_batch_that_jumps(tmp_path: Path) -> None:
    words = ("train.batch_size=2", "train.micro_batch_size=1", "train.on_loss_spike=skip", "train.max_grad_norm=0")
    data, row = with_one(GARBAGE, 51, 60, lambda: Lab(tmp_path))
    lab = Lab(tmp_path, *words)
    trainer = lab.trainer(data)
    before: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 25:
                before.update(copy(model))

    trainer.add_callback(Keep())
    trainer.train()
    (note,) = lab.notes
    assert "at step 26" in note and f"in row {row} of" in note and "not learned from" in note
    marked = [line["step"] for line in trainer.state.log_history if line.get("skipped")]
    assert marked == [26]
    jump = next(line["loss"] for line in trainer.state.log_history if line.get("step") == 26)
    assert jump > 1  # what was measured is shown, although nothing was learned from it

    reference = model()
    reference.load_state_dict({**reference.state_dict(), **before})
    ids = torch.tensor([PATTERN])
    logits = reference(ids).logits[:, :-1].flatten(0, 1)
    other = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / 30
    other.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, gradient in lab.steps.gradients[25].items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=1e-7), name


def test_skipping_leaves_the_gradient_exactly_as_without_the_micro_batch(tmp_path: Path) -> None:
    """Bit by bit: the same step, with and without a second micro batch that is skipped."""
    lab = Lab(tmp_path)
    trainer = lab.trainer(dataset([PATTERN] * 4))
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.current_gradient_accumulation_steps = 2
    trainer.create_optimizer_and_scheduler(4)
    data = dataset([PATTERN, GARBAGE])
    one, two = (trainer.data_collator([{**row, guarded_trainer.ROW_COLUMN: i}]) for i, row in enumerate(data))
    trainer.training_step(trainer.model, dict(one), torch.tensor(30))
    alone = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, dict(one), torch.tensor(30))
    trainer.guard.left_out = {1}
    loss = trainer.training_step(trainer.model, dict(two), torch.tensor(30))
    assert same(alone, {name: p.grad for name, p in trainer.model.named_parameters()})
    trainer.guard.left_out = set()
    assert torch.equal(loss, trainer.training_step(trainer.model, dict(two), torch.tensor(30)))
    assert not same(alone, {name: p.grad for name, p in trainer.model.named_parameters()})


def test_ignore_is_the_default_and_trains_on(tmp_path: Path) -> None:
    data, _ = with_one(GARBAGE, 25, 30, lambda: Lab(tmp_path))
    lab = Lab(tmp_path)
    lab.trainer(data).train()
    assert lab.notes == [] and len(lab.steps.gradients) == 30
    assert any(gradient.abs().max() > 0 for gradient in lab.steps.gradients[25].values())


def test_rewind_notes_the_steps_and_the_next_worker_leaves_them_out(tmp_path: Path) -> None:
    words = ("train.on_loss_spike=rewind", "train.save_every_steps=10")
    data, row = with_one(GARBAGE, 27, 32, lambda: Lab(tmp_path))
    lab = Lab(tmp_path, *words)
    with pytest.raises(Rewind) as caught:
        lab.trainer(data).train()
    assert caught.value.exit_code == 75
    assert "at step 28" in str(caught.value) and f"in row {row} of" in str(caught.value)
    assert lab.run.read("rewinds.json") == {"skipped_steps": [27, 28], "count": 1}
    assert lab.run.state() == "rewinding"

    again = lab.trainer(data)
    lab.steps.gradients.clear()
    again.train(resume_from_checkpoint=str(checkpoints.folder(lab.run, 20)))
    assert again.state.global_step == 32
    silent = [21 + i for i, of_step in enumerate(lab.steps.gradients)
              if not any(gradient.any() for gradient in of_step.values())]  # fmt: skip
    assert silent == [27, 28] == [line["step"] for line in again.state.log_history if line.get("skipped")]
    assert "1 of 3 times" in lab.notes[0]
    assert [note.split(":")[0].strip() for note in lab.notes[1:]] == ["step 27", "step 28"]
    assert len(step_losses(again.state.log_history)) == 30  # of both lives, the checkpoint's included


@pytest.mark.parametrize(("kept", "left"), [([20, 25], [20]), ([25], [25]), ([20, 24], [20, 24])])
def test_a_checkpoint_that_holds_what_is_left_out_goes(kept: list[int], left: list[int], tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.on_loss_spike=rewind", "train.save_every_steps=5")
    for step in kept:
        checkpoints.folder(lab.run, step).mkdir(parents=True)
        checkpoints.seal(checkpoints.folder(lab.run, step), {"step": step})
    guard = LossGuard(lab.spec.train, lab.run, note=lab.notes.append)
    with pytest.raises(Rewind):
        guard.learns(MicroBatch(26, 1, 9.0, [4]), [1.0] * 25)
    guard.step_back()
    assert lab.run.read("rewinds.json")["skipped_steps"] == [25, 26]
    assert checkpoints.complete(lab.run) == left


def test_after_the_last_rewind_the_run_has_failed(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.on_loss_spike=rewind", "train.save_every_steps=10")
    for turn in range(MAX_REWINDS):
        with pytest.raises(Rewind):
            LossGuard(lab.spec.train, lab.run).learns(MicroBatch(30 + 2 * turn, 1, 9.0, [4]), [1.0] * 20)
    assert lab.run.read("rewinds.json") == {"skipped_steps": [29, 30, 31, 32, 33, 34], "count": MAX_REWINDS}
    guard = LossGuard(lab.spec.train, lab.run)
    assert not guard.learns(MicroBatch(34, 1, 9.0, [4]), [1.0] * 20)
    with pytest.raises(RunFailedError, match=r"9\.0 × the median of the last steps, in row 4 of") as caught:
        guard.learns(MicroBatch(36, 1, 9.0, [4]), [1.0] * 20)
    assert caught.value.problems[0].remedy


def test_what_counts_as_a_jump() -> None:
    assert not is_spike(100.0, [1.0] * 19, 3.0)
    assert is_spike(3.1, [1.0] * 20, 3.0) and not is_spike(3.0, [1.0] * 20, 3.0)
    assert is_spike(1.0, [9.0] * 100 + [0.2] * 50, 3.0)  # the last 50 only
    assert not is_spike(math.nan, [1.0] * 20, 3.0)  # that is another matter
    history = [{"loss": 2.0}, {"eval_loss": 7.0}, {"loss": 9.0, "skipped": True}, {"loss": math.nan}, {"loss": 1.0}]
    assert step_losses(history) == [2.0, 1.0]
    assert step_losses([{"loss": float(i)} for i in range(99)])[0] == 49.0


def test_rewind_needs_checkpoints() -> None:
    with pytest.raises(RequestError) as caught:
        spec_of("train.on_loss_spike=rewind")
    (problem,) = caught.value.problems
    assert isinstance(problem, Problem) and "train.save_every_steps=100" in f"{problem.what} {problem.remedy}"
    assert spec_of("train.on_loss_spike=rewind", "train.save_every_steps=5").train.spike_factor == 3.0


PROCESS = """
import json, math, sys
from datetime import timedelta
import torch.distributed as dist
from runner.errors import Rewind, RunFailedError
from runner.rundir.directory import RunDir
from runner.spec import TrainSpec
from runner.train.trainers.loss_guard import LossGuard, MicroBatch
from runner.train.distributed import Ranks
from pathlib import Path

rank, path = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
run, seen = RunDir(path), []

def life(action, value):
    spec = TrainSpec(on_loss_spike=action, save_every_steps=5)
    guard = LossGuard(spec, run, Ranks(rank, 2, rank), seen.append)
    batch = MicroBatch(40, 2, value if rank else 1.0, [6 + rank])
    try:
        seen.append(guard.learns(batch, [1.0] * 30))
    except (Rewind, RunFailedError) as error:
        seen.append(f"{type(error).__name__}: {error}")

for action, value in [("skip", 1.0), ("skip", 9.0), ("rewind", 9.0), ("ignore", math.inf)]:
    life(action, value)
print(json.dumps(seen), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_all_processes_act_on_what_one_of_them_finds(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = []
    for process in both:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        told.append(json.loads(out.splitlines()[-1]))
    place = "at step 40, 9.0 × the median of the last steps, in row 7 (rank 1) of the tokenised training set"
    rewind = f"Rewind: the loss jumped to 9 {place}"
    failed = "RunFailedError: the loss became inf at step 40, micro batch 2, in row 7 (rank 1) of the tokenised " \
        "training set"  # fmt: skip
    assert told[1] == [True, False, rewind, failed]
    back = f"  the loss jumped to 9 {place}: going back to a checkpoint, 1 of 3 times"
    assert told[0] == [True, f"  the loss jumped to 9 {place}: not learned from", False, back, rewind, failed]
    assert json.loads((tmp_path / "rewinds.json").read_text("utf-8"))["count"] == 1
    assert [file.name for file in (tmp_path / "nan").iterdir()] == ["step-40-rank1.json"]


def test_the_worker_is_under_guard(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = model_loading.load_model

    def poisoned(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)
        with torch.no_grad():
            found.model.layers[-1].mlp.down_proj.weight[0, 0] = math.nan
        return found

    monkeypatch.setattr(model_loading, "load_model", poisoned)
    with pytest.raises(RunFailedError, match="the loss became nan at step 1, micro batch 1, in row"):
        train("eval.num_prompts=0", "data.max_eval_examples=2", "train.packing=false")
    (dump,) = (tmp_path / "runs").glob("*/nan/step-1-rank0.json")
    kept = json.loads(dump.read_text("utf-8"))
    assert len(kept["rows"]) == len(kept["row_ids"]) > 0
    assert all(line["texts"][0].startswith("<|im_start|>system") for line in kept["rows"])
    assert not (dump.parent.parent / "model").exists()
