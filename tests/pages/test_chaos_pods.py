"""What benchmarks/chaos_pods.py counts as a crash of a command line."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.bench import ROOT
from benchmarks.chaos_pods import crashes

BROKEN = """\
from runner.resolve import steps

def resolved(request):
    raise RuntimeError("broken")

steps.resolved = resolved
from runner.cli.main import main
main()
"""


def said(*words: str) -> str:
    command = [sys.executable, *words, "show"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    return done.stdout + done.stderr


def test_a_stack_trace_of_a_command_is_a_crash_and_its_message_is_none() -> None:
    assert crashes(said("-c", BROKEN)) == 1
    assert crashes(said("-m", "runner", "show", "model=none")) == 0


def test_what_a_pod_repeats_is_no_crash_of_the_command() -> None:
    trace = (
        'Traceback (most recent call last):\n  File "/workspace/x/runner/train/worker.py", line 3, in main\nKeyError\n'
    )
    assert crashes(f"pod: training\n{trace}") == 0
    assert crashes(f"{trace}{trace.replace('train/worker', 'cli/pod_verbs')}") == 1
