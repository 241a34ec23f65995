"""`watch` shows a run as it grows, in every terminal and without one, ends with it, and leaves it alone."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from runner.errors import RunFailedError
from runner.report.braille_curve import curve
from runner.report.watch import Watcher, WatchOptions, exit_code, rendered, watch
from runner.rundir.directory import RunDir, process_birth
from runner.rundir.json_files import MetricsLine
from runner.rundir.metrics_tail import MetricsTail
from tests.conftest import ROOT, run_cli


def begun(out: Path, steps: int = 3, **facts: Any) -> RunDir:
    """A run that this process is at."""
    run = RunDir(out / "run")
    (run.path / "logs").mkdir(parents=True)
    run.write("spec.json", {})
    here = {"pid": os.getpid(), "host": socket.gethostname(), "born": process_birth(os.getpid())}
    run.write("status.json", {"state": "training", "num_steps": 10, "updated": time.time(), **here, **facts})
    for step in range(1, steps + 1):
        add(run, step)
    return run


def add(run: RunDir, step: int) -> None:
    line = {"step": step, "loss": 4 / step, "learning_rate": 1e-4, "grad_norm": 1.5, "tokens_per_second": 1234.5,
            "step_seconds": 2.0, "memory_gib": 3.25, "time": time.time()}  # fmt: skip
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def end(run: RunDir, state: str, code: int, error: str | None = None) -> None:
    run.write("status.json", {**run.status, "state": state, "exit_code": code, "error": error})


def test_a_curve_falls_from_the_left_to_the_right() -> None:
    lines = curve([(step, 10.0 - step) for step in range(10)], 24, 5, plain=True)
    assert lines[0].startswith("10 |*") and lines[-2].startswith(" 1 |") and lines[-2].endswith("*")
    assert lines[-1].split() == ["0", "step", "9"]
    assert [line.index("*") for line in lines[:-1]] == sorted(line.index("*") for line in lines[:-1])
    braille = curve([(0, 1.0), (1, 1.0)], 20, 3)
    assert braille[1] == "1 │" + "⠒" * 17 or "1 │" in "".join(braille)
    assert curve([], 20, 5) == curve([(1, math.nan)], 20, 5) == []
    assert "log scale" in curve([(1, 1e-3), (50, 1.0)], 60, 8)[-1]
    assert all(len(line) <= 40 for line in curve([(n, math.sin(n / 50)) for n in range(10000)], 40, 8))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("height", [6, 24, 60])
def test_what_is_shown_fits_the_terminal(width: int, height: int, tmp_path: Path) -> None:
    view = Watcher(begun(tmp_path, 9)).look()
    lines = rendered(view, width, height).plain.split("\n")
    text = " ".join(lines)
    assert "training" in text and "step 9 of 10" in text and "left 2 s" in text and "loss 0.4444" in text
    assert max(map(cell_len, lines)) <= width and (len(lines) <= height or width == 20)
    assert ("│" in text) is (height > 12 or (width == 200 and height > 6))


def test_a_file_is_read_on_and_anew_where_it_was_written_anew(tmp_path: Path) -> None:
    run = begun(tmp_path, 3)
    tail = MetricsTail(run.path / "metrics.jsonl", MetricsLine)
    assert [line["step"] for line in tail.update()] == [1, 2, 3]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')
        file.flush()
        assert len(tail.update()) == 3
        file.write(": 1.0}\n")
    assert tail.update()[-1] == {"step": 4, "loss": 1.0}
    run.cut_after(2)
    assert [line["step"] for line in tail.update()] == [1, 2]


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("failed", 3), ("interrupted", 130)])
def test_it_ends_with_the_run_and_its_exit_code(state: str, code: int, tmp_path: Path) -> None:
    run = begun(tmp_path, error=None)
    console = Console(file=io.StringIO(), width=80)
    ending = threading.Timer(0.3, lambda: (add(run, 4), end(run, state, code, "no \x1b[2Jroom" if code == 3 else None)))
    ending.start()
    assert watch(run, console, WatchOptions(interval=0.05)) == code
    ending.join()
    first, *_, last = console.file.getvalue().splitlines()
    assert (
        first.startswith("run · training · step 3 of 10 · left 14 s · loss 1.3333")
        and f"run · {state} · step 4" in last
    )
    assert "\x1b" not in console.file.getvalue()


def test_a_killed_run_and_one_without_an_exit_code_are_failures(tmp_path: Path) -> None:
    run = begun(tmp_path, pid=2**22 + 1)
    view = Watcher(run).look()
    assert view.state == "killed" and exit_code(view) == 1
    assert "resume" in rendered(view, 80, 24).plain


def test_a_run_that_is_deleted_meanwhile_is_told_with_the_way_back(tmp_path: Path) -> None:
    run = begun(tmp_path)
    threading.Timer(0.2, lambda: shutil.move(run.path, tmp_path / ".trash" / "run")).start()
    (tmp_path / ".trash").mkdir()
    with pytest.raises(RunFailedError, match="is gone") as gone:
        watch(run, Console(file=io.StringIO()), WatchOptions(interval=0.05))
    assert "runs restore" in str(gone.value.problems[0].remedy)


def test_once_json_and_a_typo(tmp_path: Path) -> None:
    run = begun(tmp_path / "runs", 3, pid=os.getpid())
    facts = json.loads(run_cli("watch", "run", "--once", "--json", cwd=tmp_path, code=0).stdout)
    assert (facts["state"], facts["step"], facts["seconds_left"], facts["exit_code"]) == ("training", 3, 14.0, None)
    assert (
        "did you mean --metric grad_norm?"
        in run_cli("watch", "run", "--metric", "gradnorm", cwd=tmp_path, code=2).stderr
    )
    assert "there is no run nothing" in run_cli("watch", "nothing", cwd=tmp_path, code=2).stderr
    end(run, "done", 0)
    assert "done" in run_cli("watch", "runs/run", "--metric", "grad_norm", cwd=tmp_path, code=0).stdout


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}])
def test_in_a_narrow_terminal_ctrl_c_leaves_the_run_alone(variables: dict[str, str], tmp_path: Path) -> None:
    begun(tmp_path / "runs", 9)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", "watch", "run"], cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **variables}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"step" not in said.partition(b"training")[2]:
        said += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    try:
        while block := os.read(ours, 65536):
            said += block
    except OSError:  # EIO: it has ended
        pass
    assert process.wait(timeout=30) == 130
    text = said.decode()
    assert f"Left    runs/run continues (training, 9 steps done); kill {os.getpid()} stops it" in re.sub(
        r"\s*\r\n", "\n", text
    )
    assert ("\x1b[1;36m" in text) is ("NO_COLOR" not in variables)
    assert ("│" in text) is ("PYTHONIOENCODING" not in variables)
