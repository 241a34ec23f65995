"""What the tests share: one cache for the dequantised model, short runs of the real one."""

from __future__ import annotations

import atexit
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest_plugins = ("tests.support.front",)  # the fixtures `here`, `laptop` and `started`
ROOT = Path(__file__).resolve().parent.parent
# Kept between test runs: unpacking SmolLM2 takes 20 s.
os.environ.setdefault("RUNNER_CACHE", str(ROOT / ".pytest_cache" / "runner"))
os.environ["WANDB_MODE"] = "offline"
os.environ["RUNNER_PYTHON"] = "python"  # messages spell commands as in a shell with the environment active

# `make test` starts a worker per core, and each stays on its own: torch's threads then never wait for one another.
# (Two runs of two threads on two cores take ten times as long as one, not twice.)
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

LONGEST_FIRST = (
    "test_learning",
    "test_matrix",
    "test_runpod_run",
    "test_sweep_pool",
    "test_nodes",
    "test_launch",
    "test_run_life",
    "test_journey",
    "test_methods_end_to_end",
    "test_trl_parity",
    "test_memory_tape",
)
"""Files that take minutes: begun first, so that no core waits for one of them at the end."""


NEEDED = ("chromium", "ip", "rsync", "ssh", "sshd")
"""Programs without which tests of pods, machines and the web page are skipped: on CI for Linux a skip is a failure."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model of the real architecture, which tests read and do not change."""
    from tests.support.processes import tiny_model  # torch, for those alone that ask for it

    return tiny_model(tmp_path_factory.mktemp("model"))


def pytest_sessionstart() -> None:
    """Let SIGINT interrupt, keep tests off the user's ledger, and refuse to begin on CI where a program is missing."""
    # What a shell starts in the background ignores SIGINT, and hands that on to every process that a test interrupts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not even a test whose parameter shadows the fixture that moves the ledger uses the user's.
    os.environ["RUNNER_STATE"] = tempfile.mkdtemp(prefix="runner-state-")
    atexit.register(shutil.rmtree, os.environ["RUNNER_STATE"], ignore_errors=True)
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing and os.environ.get("CI") and sys.platform == "linux":
        pytest.exit(f"CI lacks {', '.join(missing)}: apt-get install chromium iproute2 openssh-server rsync", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others in their own order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End what a failed test began: one that misses its time limit would leave a training behind, and load."""
    before = {process.pid for process in psutil.Process().children()}
    try:
        return (yield)
    except pytest.skip.Exception:
        raise
    except BaseException:
        for process in psutil.Process().children():
            if process.pid not in before:
                for one in [*process.children(recursive=True), process]:
                    with suppress(psutil.Error):
                        one.kill()
        raise


# A run of the real model in seconds: five steps of 2 × 128 tokens, one prompt.
SHORT = (
    "train.max_steps=5",
    "train.max_length=128",
    "train.batch_size=2",
    "data.max_examples=40",
    "data.max_eval_examples=6",
    "eval.num_prompts=1",
    "eval.max_new_tokens=4",
)


def spec_of(*overrides: str) -> Any:
    """The resolved spec of a command line."""
    from runner.config.command_line import Request
    from runner.resolve.steps import resolved

    return resolved(Request(overrides=overrides))[0]


def run_cli(
    *words: str, cwd: Path | None = None, timeout: float = 560, code: int | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python -m runner …` as a user runs it, in a process of its own, which ends with `code` where one is given; an
    empty variable is taken away."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {k: v for k, v in {**os.environ, "PYTHONPATH": paths, "COLUMNS": "160", **env}.items() if v}
    done = subprocess.run(
        [sys.executable, "-m", "runner", *words], cwd=cwd, env=kept, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert code in (None, done.returncode), done.stderr
    return done


@cache
def _freeze_libraries() -> None:
    """Take what is imported out of garbage collection, once: a trainer's `gc.collect()` looks through two million
    objects of libraries otherwise, 0.4 s of a run of 2 s.

    A second time would keep the models of the tests before, whose cycles nobody has collected yet, for ever.
    """
    gc.collect()
    gc.freeze()


def train_here(spec: Any, run: Any = None) -> tuple[Any, Any]:
    """Train in this process, or go on with `run`: what the worker leaves, and the run directory."""
    from rich.console import Console

    from runner.report.progress import Progress
    from runner.rundir.directory import RunDir
    from runner.train.trainers.stop_on_signal import StopOnSignal
    from runner.train.worker import work

    _freeze_libraries()
    run = run or RunDir.create(spec)
    return work(spec, run, Progress(Console(file=io.StringIO())), StopOnSignal()), run


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    """Train in this process: `train("method=full") -> (finished, run_dir)`."""

    def start(*overrides: str) -> Any:
        return train_here(spec_of(*SHORT, *overrides, f"run.output_dir={tmp_path / 'runs'}"))

    return start
