"""Guards for non-finite losses or gradients, and for loss spikes.

Judged before the optimiser changes a weight, and by all processes together: what one of them finds, all act on at the
same point, and none is left waiting for the others. Where micro batches may be skipped, each is judged before its
backward pass; else those of a step together before its last one, as every judgement waits for the GPU.
A loss is a mean per labelled token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NoReturn

from runner.errors import Problem, Rewind, RunFailedError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, display_path
from runner.spec import TrainSpec
from runner.train.distributed import Ranks

WINDOW = 50
"""Step losses of which the median is taken."""
MIN_STEPS = 20
"""Step losses before the first judgement: the loss of the first steps moves by itself."""
MAX_REWINDS = 3
REWIND_COVERS = 2
"""Steps left out after a rewind: the spike's own, and the one whose update it may come from. PaLM left out "the batches
that were seen before and during the spike" (arXiv 2204.02311 §5.1)."""
SHOWN_LOSSES = 20
SHOWN_ROWS = 8
MakeFacts = Callable[[list[int]], Mapping[str, object]]
"""Makes what else the dump of a broken loss of these rows should hold."""


def no_facts(rows: list[int]) -> Mapping[str, object]:
    """Nothing else."""
    return {}


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch of this process, to be judged."""

    step: int
    """Optimiser step it belongs to, from 1, as in `metrics.jsonl`."""
    number: int
    """Its place within the step, from 1."""
    loss: float
    rows: list[int]
    """Rows of the tokenised training set."""


@dataclass(frozen=True)
class Finding:
    """A broken or spiking loss of one process."""

    rank: int
    value: float
    rows: list[int]
    number: int = 0
    """Place of the micro batch within the step; 0 for a gradient norm."""


def is_spike(loss: float, losses: Sequence[float], factor: float) -> bool:
    """True if a loss is above `factor` × the median of the last step losses; never before there are enough."""
    recent = losses[-WINDOW:]
    return len(recent) >= MIN_STEPS and loss > factor * median(recent)


def step_losses(history: Sequence[dict[str, Any]]) -> list[float]:
    """The last step losses in transformers' `log_history`, which a checkpoint keeps; without the skipped steps'."""
    found: list[float] = []
    for line in reversed(history):
        if len(found) == WINDOW:
            break
        if "loss" in line and not line.get("skipped") and math.isfinite(line["loss"]):
            found.append(line["loss"])
    return found[::-1]


class LossGuard:
    """Stops, skips or rewinds. All its methods are called by all processes at the same point."""

    def __init__(
        self, train: TrainSpec, run: RunDir, ranks: Ranks | None = None, note: Callable[[str], None] = print
    ) -> None:
        self.run, self.ranks, self.note = run, ranks or Ranks(), note
        self.action, self.factor = train.on_loss_spike, train.spike_factor
        self.exact = train.precision == "fp32"
        kept = self.ranks.broadcast(run.read("rewinds.json"))  # nodes may not share a disk
        self.num_rewinds = int(kept.get("count", 0))
        self.left_out = {int(step) for step in kept.get("skipped_steps", [])}
        """Steps whose data made a spike before a rewind."""
        self.rewound_from = 0
        """First step that is to be left out after this process' rewind."""
        self.skipped: set[int] = set()
        """Steps of this process' life in which something was not learned."""

    @property
    def skips(self) -> bool:
        """Micro batches may be skipped, so each has to be judged before its backward pass."""
        return self.action != "ignore" or bool(self.left_out)

    def check_losses(
        self, batches: Sequence[MicroBatch], losses: Sequence[float], facts: MakeFacts = no_facts
    ) -> None:  # fmt: skip
        """RunFailedError where a loss of a step is no number: `batches` are all of the step's in this process."""
        broken = next((batch for batch in batches if not math.isfinite(batch.loss)), None)
        if self.ranks.any(broken is not None):
            self._stop(batches[-1].step, broken, losses, facts)

    def learns(
        self, batch: MicroBatch, losses: Sequence[float], facts: MakeFacts = no_facts
    ) -> bool:  # fmt: skip
        """True if this micro batch is to be learned from.

        `losses` are the step losses so far; `facts` makes what else the dump of a broken one should hold.
        RunFailedError for a loss that is no number, and for a spike after the last rewind; Rewind for a spike.
        """
        broken = not math.isfinite(batch.loss)
        judged = self.action != "ignore" and batch.step not in self.left_out
        spike = judged and is_spike(batch.loss, losses, self.factor)
        # One all-reduce of 16 bytes over gloo; TRL gathers its own numbers at every micro batch, too.
        num_broken, num_spikes = self.ranks.all_reduce_sum([float(broken), float(spike)])
        if num_broken:
            self._stop(batch.step, batch if broken else None, losses, facts)
        if batch.step in self.left_out:
            if batch.step not in self.skipped and self.ranks.main:
                self.note(f"  step {batch.step}: not learned from, its data made the loss jump before")
            self.skipped.add(batch.step)
            return False
        if num_spikes:
            self._handle_spike(batch, self._exchange(batch if spike else None), median(losses[-WINDOW:]))
            return False
        return True

    def check_norm(
        self, step: int, norm: float, rows: list[int], losses: Sequence[float], facts: MakeFacts
    ) -> None:  # fmt: skip
        """RunFailedError where the gradient of a step was no number; not for fp16, whose scaler passes over such steps.

        `rows` are all of the step's in this process. The step is done, but not yet in any checkpoint.
        """
        broken = not math.isfinite(norm)
        if self.ranks.any(broken):
            if broken:
                self._dump(step, rows, losses, grad_norm=norm, **facts(rows))
            found = self._exchange(MicroBatch(step, 0, norm, rows) if broken else None)
            self._fail("gradient norm", f"step {step}", found, step)

    def step_back(self) -> None:
        """After a rewind, delete the last checkpoint if there is an older one, since it may have learned from the
        skipped data."""
        done = checkpoints.complete(self.run)
        if self.ranks.main and any(step < self.rewound_from for step in done):
            checkpoints.discard(self.run, [step for step in done if step >= self.rewound_from])

    def _stop(self, step: int, broken: MicroBatch | None, losses: Sequence[float], facts: MakeFacts) -> NoReturn:
        """Dump this process's broken loss, if it is here, and fail."""
        if broken:
            self._dump(step, broken.rows, losses, micro_batch=broken.number, loss=broken.loss, **facts(broken.rows))
        found = self._exchange(broken)
        self._fail("loss", f"step {step}, micro batch {found[0].number}", found, step)

    def _exchange(self, mine: MicroBatch | None) -> list[Finding]:
        """The findings of all processes."""
        finding = None if mine is None else Finding(self.ranks.rank, mine.loss, mine.rows, mine.number)
        found = self.ranks.all_gather(finding)
        return [finding for finding in found if finding is not None]

    def _dump(self, step: int, row_ids: list[int], losses: Sequence[float], **facts: Any) -> None:
        """Write `nan/step-<k>-rank<r>.json`, numbers that JSON lacks as text."""
        (self.run.path / "nan").mkdir(exist_ok=True)
        facts = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        rank = self.ranks.rank
        last = list(losses[-SHOWN_LOSSES:])
        content = {"step": step, "rank": rank, "row_ids": row_ids, "last_losses": last, **facts}
        self.run.write(_dump_name(step, rank), content)

    def _fail(self, what: str, place: str, found: list[Finding], step: int) -> NoReturn:
        file = self.run.path / _dump_name(step, found[0].rank)
        raise RunFailedError(
            Problem(
                f"the {what} became {found[0].value} at {place}, in {self._rows(found)}",
                display_path(file),
                "look at these rows in that file; if they are sound, lower train.learning_rate"
                + (" or raise train.warmup_ratio" if self.exact else ", or use train.precision=fp32"),
            )
        )

    def _handle_spike(self, batch: MicroBatch, found: list[Finding], middle: float) -> None:
        """Skip the step, or write the steps to leave out and raise Rewind: the worker is then started again."""
        worst = max(finding.value for finding in found)
        what = (
            f"the loss jumped to {worst:.4g} at step {batch.step}, {worst / middle:.1f} × the median of the last "
            f"steps, in {self._rows(found)}"
        )
        if self.action == "skip":
            self.skipped.add(batch.step)
            if self.ranks.main:
                self.note(f"  {what}: not learned from")
            return
        if self.num_rewinds >= MAX_REWINDS:
            remedy = "lower train.learning_rate, raise train.spike_factor, or use train.on_loss_spike=skip"
            raise RunFailedError(Problem(f"{what}, after {MAX_REWINDS} rewinds", None, remedy))
        around = range(max(1, batch.step - REWIND_COVERS + 1), batch.step + 1)
        count = self.num_rewinds + 1
        if self.ranks.main:
            self.run.write("rewinds.json", {"skipped_steps": sorted(self.left_out | set(around)), "count": count})
            self.run.set_status("rewinding", step=batch.step, rewinds=count)
            self.note(f"  {what}: going back to a checkpoint, {count} of {MAX_REWINDS} times")
        self.rewound_from = around[0]
        raise Rewind(Problem(what, None, "the worker is started again from the last checkpoint"))

    def _rows(self, found: list[Finding]) -> str:
        """`rows 3, 17 of the tokenised training set`, with the process where there are several."""
        return "; ".join(
            f"row{'s' * (len(f.rows) > 1)} {', '.join(map(str, f.rows[:SHOWN_ROWS]))}"
            + (f" and {len(f.rows) - SHOWN_ROWS} more" if len(f.rows) > SHOWN_ROWS else "")
            + (f" (rank {f.rank})" if self.ranks.world > 1 else "")
            for f in found
        ) + " of the tokenised training set"  # fmt: skip


def _dump_name(step: int, rank: int) -> str:
    return f"nan/step-{step}-rank{rank}.json"
