"""Whoever reads what a run says may go at any time: the run goes on, and its log has every line."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from runner.report import terminal
from runner.report.terminal import Outlet
from runner.rundir.directory import RunDir
from tests.conftest import ROOT
from tests.support.processes import losses, only_run, until, words

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")


def runner(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "runner", *arguments], env=env, text=True, **options)


def is_whole(run: Path, steps: int) -> None:
    """Nothing is missing: steps, model, state, and the words that nobody read."""
    assert RunDir(run).read("status.json")["state"] == "done" and (run / "model").is_dir()
    assert len(losses(run)) == steps
    log = (run / "logs" / "run.log").read_text("utf-8")
    for words_ in ("Run     ", "GiB at the peak", "Loading torch", f"  {steps}/{steps}  loss", "Try it:  "):
        assert log.count(words_) == 1
    assert "\x1b" not in log and "Traceback" not in log


@pytest.mark.slow
@needs_full
def test_a_reader_that_goes_and_a_full_disk_end_nothing(model: Path, tmp_path: Path) -> None:
    """`2> on-a-full-disk | head -1`: stderr takes nothing from the start, stdout nothing after the first line."""
    with FULL.open("w") as full:
        front = runner(*words(model, tmp_path), stdout=subprocess.PIPE, stderr=full)
        assert front.stdout is not None and front.stdout.readline().startswith("Run ")
        front.stdout.close()
        assert front.wait(timeout=240) == 0
    run = only_run(tmp_path)
    assert run is not None
    is_whole(run, 12)


def test_a_terminal_that_is_closed_ends_nothing(model: Path, tmp_path: Path) -> None:
    """SIGHUP, and EIO for every write, on stdin, stdout and stderr, with the live bar on screen."""
    ours, theirs = os.openpty()
    front = runner(
        *words(model, tmp_path, "train.max_steps=60"), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    reader = threading.Thread(target=_read_all, args=(ours, closing := threading.Event()), daemon=True)
    reader.start()
    run: Path = until(lambda: only_run(tmp_path))
    until(lambda: (run / "metrics.jsonl").exists())
    closing.set()
    reader.join()
    os.close(ours)
    assert front.wait(timeout=240) == 0
    is_whole(run, 60)


def _read_all(number: int, closing: threading.Event) -> None:
    os.set_blocking(number, False)
    while not closing.is_set():
        try:
            os.read(number, 65536)
        except BlockingIOError:
            time.sleep(0.01)


@pytest.mark.parametrize("verb", [("plan",), ("list", "models"), ("show",), ("runs", "--json"), ("--help",)])
def test_an_answer_of_which_the_reader_wants_no_more_ends_quietly(verb: tuple[str, ...], tmp_path: Path) -> None:
    front = runner(*verb, stdout=subprocess.PIPE, cwd=tmp_path)
    assert front.stdout is not None and front.stderr is not None
    front.stdout.close()
    errors = front.stderr.read()
    assert (front.wait(timeout=60), errors) == (0, "")


@needs_full
@pytest.mark.parametrize("verb", [("plan",), ("list", "models"), ("show", "--json")])
def test_an_answer_that_cannot_be_written_is_an_error(verb: tuple[str, ...], tmp_path: Path) -> None:
    with FULL.open("w") as full:
        front = runner(*verb, stdout=full, cwd=tmp_path)
        _, errors = front.communicate(timeout=60)
    assert front.returncode == 1
    assert errors == "Error\n  • standard output cannot be written to: No space left on device\n"


def test_closed_streams_are_dev_null(tmp_path: Path) -> None:
    """`>&- 2>&-`: no file of ours gets their numbers."""
    command = f"exec {sys.executable} -m runner plan train.max_stepz=1 <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 2


def test_training_waits_for_no_reader_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-S, a pager, a stopped tee: lines are dropped, and come again when they are read."""
    monkeypatch.setattr(terminal, "STALLED_SECONDS", 0.2)
    there, here = os.pipe()
    outlet = Outlet(here)
    outlet.goes_on = True
    began = time.monotonic()
    for _ in range(1000):
        assert outlet.write(b"x" * 500) == 500  # 500 kB into 64 kB
    assert time.monotonic() - began < 10 and outlet.lost is None
    while len(os.read(there, 65536)) == 65536:
        pass
    outlet.write(b"again")
    assert os.read(there, 65536).endswith(b"again")


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    """Some parents hand one on (ssh, node): a write to a full one is EAGAIN, no loss."""
    there, here = os.pipe()
    os.set_blocking(here, False)
    got = bytearray()

    def read() -> None:
        while len(got) < 300_000:
            got.extend(os.read(there, 1000))

    thread = threading.Thread(target=read)
    thread.start()
    outlet, sent = Outlet(here), 0
    while sent < 300_000:
        sent += outlet.write(b"y" * min(100_000, 300_000 - sent))
    thread.join(timeout=30)
    assert len(got) == 300_000 and outlet.lost is None
