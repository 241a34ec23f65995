"""docs/reliability.md: what is promised, and what the chaos benchmarks found."""

from __future__ import annotations

import json

from benchmarks import chaos, chaos_agents, chaos_cloud, chaos_pods
from benchmarks.bench import ROOT

PAGE = ROOT / "docs" / "reliability.md"
INTRO = """\
<!-- Written by `python -m benchmarks chaos`, `chaos_cloud`, … from benchmarks/results/: edit nothing. -->

# Reliability

What a run keeps and what a pod may cost, whatever happens to them, and how that was tried.

## What is promised

- **A checkpoint counts when it is whole.** Its files are flushed to the disk, then `COMPLETE` is written, atomically,
  with the size and the SHA-256 of each. That happens beside the training: the next step does not wait for it. The old
  checkpoint is deleted after that, never before. (runner/rundir/checkpoints.py)
- **One is written every 15 minutes** (`train.save_every_minutes`; less often where writing takes more than a twentieth
  of the time), every `train.save_every_steps`, and always after the last step: a run that is killed while it measures
  or saves its model does that again, and nothing else. It stays, so that `resume runs/<id> train.max_steps=…` can make
  a finished run longer; `train.keep_checkpoints=0` deletes it when the run is done. A finished run is never begun anew.
- **`python -m runner resume runs/<id>`** takes the newest checkpoint whose sums are right, says which ones it passed
  over, and goes on: weights or adapter, optimiser, learning rate, random numbers of every process, place in the data.
  On a CPU the end is the same, to the last bit, as if nothing had happened. On another number of processes
  DeepSpeed's universal checkpoints are used, and sums are taken in another order: the losses are the same to 1e-5 in
  fp32 (tests/launcher/test_launch.py).
- **Ctrl-C and SIGTERM** finish the step, write a checkpoint and exit with 130; every process stops after the same
  step. A measurement is cut short, and made up for by resume. Before the first step and after the last one they end the
  run at once: everything is saved. So does a second one, within seconds, always: 3 s later whoever is still there,
  stopped or busy in C, is killed; a third does not wait. Signals within 0.2 s are one (make and uv pass a terminal's
  on). If the launcher is killed, the kernel tells the workers (PR_SET_PDEATHSIG), and they do the same.
- **Who reads what a run says may go**: a closed terminal (SIGHUP), `| head`, a killed `tee`, a full disk under
  `> file`. The run goes on, its exit code is its own, and `logs/run.log` has every line. A reader that stops reading
  (Ctrl-S, a pager) is waited for for 20 s, then lines are dropped until it reads again. To stop a run: Ctrl-C, or
  `kill` its process. Answers of other verbs end quietly where nobody reads on, and with exit code 1 where they cannot
  be written. (runner/report/terminal.py)
- **One process fails: all end within seconds**, and the one that failed is named, with its log and, where the cause is
  known (runner/report/failure_causes.py), the remedy. One that hangs is found by its missing sign of life
  (`train.hang_minutes`; four times that while it starts, loads, or writes a checkpoint or the model), and the stacks of
  all are kept in `logs/rank<k>.stack.txt`. Time that nobody lived through, of a suspended laptop or a stopped process,
  is no silence, and a wall clock that is set changes nothing.
- **A run goes on with what it was trained on, or not at all**: where rows, held-out rows, chat template, reward file,
  tokenizer or a base model in a folder have changed since the checkpoint, `resume` refuses before anything starts, by
  the files' content (`inputs.json`), and the worker before the first step, by all rows and the tokenizer, wherever they
  come from (their fingerprints are kept with each checkpoint). A file that was moved and is the same is named with its
  key: `resume runs/<id> data.path=NEW`. `run.on_changed_inputs=continue` permits the change, for that resume. Paths in
  `spec.json` are absolute: a run is resumed, merged or talked to from any folder.
- **What is saved at the end is tried before the first step**: configuration, generation config, tokenizer, chat
  template, shared weights, adapter, trainer state and the room on the disk; all but the bytes of the weights. Values of
  a published generation_config.json that have no effect, which transformers loads and then refuses to save
  (`do_sample: false` with a temperature), are left out and named. A checkpoint without weights or trainer state never
  counts. (runner/train/model_saving.py)
- **A run has one owner**: `resume` refuses while any of its processes is alive. The launcher holds a lock that its
  worker inherits and the kernel lets go with the last of them (runner/rundir/lock.py), so neither two resumes at once
  nor a launcher that got SIGKILL make two owners. A process number that another process has by now (a reboot, a
  container) does not count; a run at work on another host, as far as is known, is refused with what to do if that host
  is no more.
- **A rented pod ends**: what cannot happen with money is in [runpod.md](runpod.md#what-cannot-happen).

## Sweeps

Every point of `-m` is checked before the first run. Points that cannot run (a value out of bounds, a choice that does
not exist, wrong data, too little memory) are told first, and are rows of the table with their reason; the others run,
and the exit code is 1. Where no point can run, nothing is started: 2 or 3, as for one run. `hydra.sweeper.params` of
a recipe is read like words that were typed, and a typed word wins.

Runs on this machine's CPU are forked, one after the other, from one process that has the libraries loaded
([measured](benchmarks.md#sweeps)); process, log, seed and exit code are each run's own, and a run that is killed costs
only itself. The model before training is measured once, and its save tried once, by the runs that would do the same,
also on GPUs: settings other than those of the optimiser, versions, and the contents of data, tokenizer and model have
to be equal, and the log says by which run. Runs on GPUs, of several processes, or many at once
(`hydra/launcher=joblib`) start from nothing, for a CUDA context does not survive a fork.

With `hydra/sweeper=optuna` (`pip install hydra-optuna-sweeper`) the ends of each range and all choices have to be
valid before the first trial. A trial that fails, does not fit, or whose metric is no number counts as the worst, and
the study goes on. The direction follows `run.metric_mode`. Whole numbers are
`train.max_steps='int(interval(10,100))'`. Trials cannot be pruned, for Hydra's Optuna sweeper hears of whole runs
only; `eval.every_steps=50 eval.early_stopping_patience=3` ends a run that gets no better.
"""

PARTS = (
    (chaos.BENCHMARK, "How runs were tried"),
    (chaos_cloud.BENCHMARK, "How renting was tried"),
    (chaos_agents.BENCHMARK, "How the end of pods was tried"),
    (chaos_pods.BENCHMARK, "How whole runs in pods were tried"),
)


def page() -> str:
    """The whole page, from the results that are there."""
    parts = [INTRO]
    for benchmark, title in PARTS:
        shown = f"Not measured yet: `python -m benchmarks {benchmark.name}`.\n"
        if benchmark.file.is_file():
            shown = benchmark.show(json.loads(benchmark.file.read_text("utf-8")))
        parts.append(f"## {title}\n\n{shown}")
    return "\n".join(parts)
