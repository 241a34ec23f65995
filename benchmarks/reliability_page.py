"""docs/reliability.md: the guarantees, and the results of the chaos benchmarks."""

from __future__ import annotations

import json

from benchmarks import chaos, chaos_agents, chaos_cloud, chaos_pods, fuzz_results
from benchmarks.bench import ROOT

PAGE = ROOT / "docs" / "reliability.md"
INTRO = """\
<!-- Written by `python -m benchmarks chaos`, `chaos_cloud`, … from benchmarks/results/: edit nothing. -->

# Reliability

The guarantees for runs and rented pods under failures, and how they were tested.

## Guarantees

- **Complete checkpoints only.** The files of a checkpoint are flushed to disk; then `COMPLETE` is written atomically,
  with the size and SHA-256 of each. Training continues meanwhile. The previous checkpoint is deleted afterwards.
  (runner/rundir/checkpoints.py)
- **A checkpoint every 15 minutes** (`train.save_every_minutes`; less often if writing takes more than a twentieth of
  the time), every `train.save_every_steps`, and after the last step. A run that is killed during the final evaluation
  or while saving the model therefore repeats only that. The last checkpoint is kept, so that `resume runs/<id>
  train.max_steps=…` can extend a finished run; `train.keep_checkpoints=0` deletes it.
- **Exact resume.** `python -m runner resume runs/<id>` takes the newest checkpoint with correct checksums, names those
  it skipped, and restores weights or adapter, optimiser, learning rate, random states of all processes, and the
  position in the data. On a CPU the result is bit for bit that of an uninterrupted run. With another number of
  processes, DeepSpeed's universal checkpoints are used, and losses agree to 1e-5 in fp32
  (tests/launcher/test_launch.py).
- **Ctrl-C and SIGTERM** finish the step, write a checkpoint and exit with 130; all processes stop after the same step.
  An evaluation is cut short and repeated by `resume`. Before the first and after the last step the run ends at once. A
  second signal also ends it at once, and processes that remain after 3 s are killed. Signals within 0.2 s count as one,
  because make and uv forward those of a terminal. If the launcher is killed, the kernel signals the workers
  (PR_SET_PDEATHSIG).
- **Output may fail.** A closed terminal (SIGHUP), `| head`, a killed `tee` or a full disk under `> file` does not stop
  a run or change its exit code; `logs/run.log` has every line. A blocked reader (Ctrl-S, a pager) is waited for at most
  20 s, then lines are dropped until it reads again. (runner/report/terminal.py)
- **Failure of one process ends all** within seconds. The message names the failed process, its log and, for known
  causes (runner/report/failure_causes.py), a remedy. A hang is detected by the missing heartbeat (`train.hang_minutes`;
  four times that while starting, loading or saving), and the stacks of all processes are saved in
  `logs/rank<k>.stack.txt`. Time while the machine or process was suspended, and changes of the clock, do not count.
- **Same inputs or no resume.** If rows, chat template, reward file, tokenizer or a local base model changed since the
  checkpoint, `resume` refuses: before the start by the content of files (`inputs.json`), and before the first step by
  the fingerprints of all rows and the tokenizer. A moved file is named with its key: `resume runs/<id> data.path=NEW`.
  `run.on_changed_inputs=continue` permits the change for one resume. Paths in `spec.json` are absolute.
- **Saving is tested before the first step**: configuration, tokenizer, chat template, shared weights, adapter, trainer
  state and disk space. Settings of a published generation_config.json that transformers loads but refuses to save
  (`do_sample: false` with a temperature) are removed and named. (runner/train/model_saving.py)
- **One owner.** `resume` refuses while a process of the run is alive. The launcher holds a lock that the workers
  inherit and that the kernel releases with the last of them (runner/rundir/lock.py). A reused process id does not
  count; a run that is active on another host is refused, with a remedy in case that host no longer exists.
- **A rented pod ends**: see the [guarantees for rented pods](runpod.md#guarantees).

## Sweeps

Every point of `-m` is checked before the first run. Points that cannot run are listed first and appear in the table
with their reason; the others run, and the exit code is 1. If no point can run, nothing is started: exit code 2 or 3, as
for one run. `hydra.sweeper.params` in a recipe is read like typed arguments, and a typed argument takes precedence.

On this machine's CPU, the runs are forked one after the other from a process that has loaded the libraries
([measured](benchmarks.md#sweeps)). Each has its own process, log, seed and exit code, and a killed run affects no
other. The evaluation before training and the test of saving are shared by runs in which they would be identical (same
data, tokenizer, model, versions and settings other than the optimiser's), and the log names the run they come from.
Runs on GPUs, with several processes, or in parallel (`hydra/launcher=joblib`) start separately, since a CUDA context
does not survive a fork.

With `hydra/sweeper=optuna` (`pip install hydra-optuna-sweeper`), the ends of each range and all choices must be valid
before the first trial. A trial that fails, does not fit or returns a non-finite metric counts as the worst, and the
study continues. The direction is that of `run.metric_mode`. Integers are written
`train.max_steps='int(interval(10,100))'`. Hydra's Optuna sweeper cannot prune trials; `eval.every_steps=50
eval.early_stopping_patience=3` ends a run that no longer improves.
"""

PARTS = (
    (chaos.BENCHMARK, "Test: interrupted runs"),
    (chaos_cloud.BENCHMARK, "Test: renting with faults"),
    (chaos_agents.BENCHMARK, "Test: the end of pods"),
    (chaos_pods.BENCHMARK, "Test: whole runs in pods"),
)


def page() -> str:
    """The whole page, from the results that are there."""
    parts = [INTRO]
    for benchmark, title in PARTS:
        shown = f"Not measured yet: `python -m benchmarks {benchmark.name}`.\n"
        if benchmark.file.is_file():
            shown = benchmark.show(json.loads(benchmark.file.read_text("utf-8")))
        parts.append(f"## {title}\n\n{shown}")
    parts.append(f"## {fuzz_results.TITLE}\n\n{fuzz_results.section()}")
    return "\n".join(parts)
