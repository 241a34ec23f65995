"""Two machines train one model: joined by hand, interrupted, broken, resumed, joined by ssh, and it is the same model.

The machines are network namespaces with one process each; the run's folder is the disk that they share.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.rundir.directory import RunDir, all_runs
from tests.conftest import ROOT, run_cli
from tests.support import machines, tiny_llama
from tests.support.machines import Machine

STEPS = 80
SAME = 1e-6
"""How far the losses of two machines may be from those of two processes on one, of about 4: gloo adds in one order."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    reason = machines.why_not()
    if reason:
        pytest.skip(reason)
    with machines.two(tmp_path_factory.mktemp("machines")) as pair:
        yield pair


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """ZeRO-2 over every weight of a tiny Llama, in fp32: the order of additions would show in bf16 only by chance."""
    return [
        *tiny_llama.words(tmp_path_factory.mktemp("tiny")), "method=full", "deepspeed=zero2", "train.precision=fp32",
        "train.learning_rate=1e-3", f"train.max_steps={STEPS}", "train.save_every_steps=20", "eval.num_prompts=0",
    ]  # fmt: skip


def wait_for(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def the_run(folder: Path) -> RunDir:
    wait_for(lambda: bool(all_runs(folder)))
    return all_runs(folder)[0]


def ended(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def losses(run: RunDir) -> list[float]:
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def sign(run: RunDir, rank: int) -> dict[str, Any]:
    return RunDir(run.path / "logs").read(f"rank{rank}.json")


@pytest.mark.slow
def test_two_machines_train_what_one_does(two: tuple[Machine, Machine], words: list[str], tmp_path: Path) -> None:
    first, second = two
    run_cli(*words, "hw.num_cpus=2", "hw.num_processes=2", f"run.output_dir={tmp_path / 'alone'}", code=0)
    expected = losses(the_run(tmp_path / "alone"))

    # The first one says what to type on the other. Ctrl-C on the first saves a checkpoint on both.
    runs = tmp_path / "runs"
    front = first.start(*words, "hw.num_nodes=2", f"hw.rendezvous={first.address}:29500", f"run.output_dir={runs}")
    run = the_run(runs)
    joiner = second.start("join", str(run.path))
    wait_for(lambda: front.poll() is not None or any(line["step"] >= 5 for line in run.metrics()))
    assert sign(run, 0)["host"] == "worker-1" and sign(run, 1)["host"] == "worker-2"
    front.send_signal(signal.SIGINT)
    (code, out, err), (code_2, out_2, err_2) = ended(front, joiner)
    assert (code, code_2) == (130, 130), err + err_2
    assert re.search(r"stopped after step \d+; checkpoint saved in", err) and "runner resume" in err
    assert re.search(r"waiting up to 10 minutes for the other machine; type there: .* join .*" + run.id, out)
    assert "machine 2 of 2" in out_2 and "Traceback" not in err + err_2
    assert run.state() == "interrupted"
    assert not list((run.path / "logs").glob("node*.json"))

    # Both are needed again. A process that is killed on the second, here while it loads and the first waits for it,
    # ends both; the first says which one it was.
    stray = second.start("join", str(run.path))
    (code, _, err), = ended(stray)  # fmt: skip
    assert code == 2 and "waits for no machine: it is interrupted" in err
    front = first.start("resume", str(run.path))
    wait_for(lambda: run.state() == "created")
    joiner = second.start("join", str(run.path))
    wait_for(lambda: sign(run, 1).get("state") == "alive")
    os.kill(sign(run, 1)["pid"], signal.SIGKILL)
    (code, _, err), (code_2, _, err_2) = ended(front, joiner)
    assert (code, code_2) == (1, 1), err + err_2
    assert "rank 1 was ended by SIGKILL" in err and "machine 2, worker-2" in err, err
    assert run.state() == "failed" and "Traceback" not in err + err_2

    # With a hostfile nothing is typed on the second.
    hosts = tmp_path / "hostfile"
    hosts.write_text(f"# the lab\n{first.address} slots=1\n\n{second.address} slots=1  # the new one\n", "utf-8")
    machines.reachable_by_ssh(first, second)
    paths = {"PYTHONPATH": str(ROOT)}
    front = first.start("resume", str(run.path), f"hw.hostfile={hosts}", "hw.rendezvous=null", **paths)
    ((code, out, err),) = ended(front)
    assert code == 0, out + err
    assert "machine 2 of 2" in (run.path / "logs" / "node1.log").read_text("utf-8")
    assert losses(run) == pytest.approx(expected, abs=SAME)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert sum(p.numel() for p in model.parameters()) == 115_136
