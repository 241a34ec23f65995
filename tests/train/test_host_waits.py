"""The host waits for the GPU once in a step: a number read from a tensor in between would stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTTrainer

from runner.rundir.directory import RunDir
from runner.train.trainers import guarded_trainer, trainer_settings
from tests.conftest import spec_of
from tests.train.test_loss_guard import PATTERN, Lab, dataset


class Reads(TorchDispatchMode):
    """Counts numbers that leave tensors: `.item()`, `int(t)`, `if t:`, and `.tolist()`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Reads]:
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        seen.count += 1
        return plain(tensor)

    with mock.patch("torch.Tensor.tolist", tolist), Reads() as seen:
        yield seen


def batches(trainer: Any, count: int) -> list[dict[str, Any]]:
    """Micro batches of two rows of different lengths, as the data loader gives them."""
    rows = [
        {"input_ids": PATTERN[: 9 + n % 4], "labels": [-100] * 3 + PATTERN[3 : 9 + n % 4]} for n in range(2 * count)
    ]
    numbered = [{**row, guarded_trainer.ROW_COLUMN: n} for n, row in enumerate(rows)]
    return [trainer.data_collator(numbered[2 * n : 2 * n + 2]) for n in range(count)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path, "train.batch_size=6", "train.micro_batch_size=2")


def on_gpu(trainer: Any) -> Any:
    """The trainer, which takes its path for a GPU."""
    trainer.args.use_cpu = False
    trainer.current_gradient_accumulation_steps = 3
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.create_optimizer_and_scheduler(4)
    return trainer


def test_nothing_is_read_per_micro_batch_outside_of_the_model(lab: Lab) -> None:
    trainer = on_gpu(lab.trainer(dataset([PATTERN] * 6)))
    found = []
    for batch in batches(trainer, 3):
        with reads() as seen, mock.patch.object(trainer.model, "forward", without(seen, trainer.model.forward)):
            trainer.training_step(trainer.model, batch, torch.tensor(40))
        found.append(seen.count)
    assert found == [0, 0, 1]  # the losses of the step, before its last backward pass
    assert trainer.take_counts() == (2 * (10 + 12 + 10), 9 + 10 + 11 + 12 + 9 + 10)


def without(seen: Reads, forward: Any) -> Any:
    """The model's forward pass, uncounted: it is not ours, and varlen attention asks once for the documents."""

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        before = seen.count
        found = forward(*args, **kwargs)
        seen.count = before
        return found

    return uncounted


def test_where_micro_batches_may_be_skipped_each_loss_is_read(tmp_path: Path) -> None:
    lab = Lab(tmp_path, "train.batch_size=6", "train.micro_batch_size=2", "train.on_loss_spike=skip")
    trainer = on_gpu(lab.trainer(dataset([PATTERN] * 6)))
    with mock.patch.object(trainer.guard, "learns", return_value=True) as learns:
        for batch in batches(trainer, 3):
            trainer.training_step(trainer.model, batch, torch.tensor(40))
    assert [call.args[0].number for call in learns.call_args_list] == [1, 2, 3]


@pytest.mark.parametrize("items", [None, torch.tensor(40)])
def test_the_loss_is_that_of_trl_bit_by_bit(items: Any, lab: Lab) -> None:
    trainer = on_gpu(lab.trainer(dataset([PATTERN] * 6)))
    batch, *_ = batches(trainer, 1)
    batch.pop(guarded_trainer.ROW_IDS)
    trainer.model.eval()  # the guard has no part in this
    grads = []
    for kind in (type(trainer), SFTTrainer):
        trainer.model.zero_grad()
        loss = kind.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in trainer.model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))


def test_copies_to_a_gpu_are_not_waited_for(tmp_path: Path) -> None:
    """A copy from pinned memory that the host waits for waits for all work launched before it, too."""
    for words, expected in ((("hw=h100",), True), (("hw=cpu",), False)):
        found = trainer_settings.shared_settings(spec_of("model=smollm2_135m", *words), RunDir(tmp_path), 10, [])
        assert (found["dataloader_pin_memory"], found["accelerator_config"]) == (expected, {"non_blocking": expected})


def test_row_ids_stay_with_the_host(lab: Lab) -> None:
    trainer = lab.trainer(dataset([PATTERN] * 6))
    assert all(isinstance(batch[guarded_trainer.ROW_IDS], list) for batch in trainer.get_train_dataloader())
