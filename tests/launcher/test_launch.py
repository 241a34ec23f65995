"""Several processes for real: what goes wrong is said once, and whatever stopped a run, resuming ends like no stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runner.launcher import torchrun
from runner.report.failure_causes import CAUSES, cause_of
from runner.resolve import plan_inputs
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, is_alive
from runner.spec import RunSpec
from tests.conftest import ROOT, run_cli, spec_of
from tests.support.processes import losses, only_run, sign, start, tiny_model, until, words

TWO = ("hw.num_processes=2", "deepspeed=zero2", "train.save_every_steps=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("a model"))  # with a space in its path


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = run_cli(*words(model, out, *TWO), code=0, OMP_NUM_THREADS="1")
    found = only_run(out)
    assert found is not None
    assert done.stdout.count("Training …") == 1  # one rank speaks
    return found


def step_of(run: Path, rank: int = 0) -> int:
    return int(sign(run, rank).get("step", 0))


def at_step(out: Path, step: int) -> Path:
    """Wait until the run has done so many steps."""
    run: Path = until(lambda: only_run(out))
    until(lambda: step_of(run) >= step)
    return run


FAULT = """
import os, sys, time
if os.environ.get("RANK") == "1" and "runner.train" in " ".join(sys.orig_argv):
    from runner.train.heartbeat import Heartbeat
    beat = Heartbeat.on_step_begin
    def at_step(self, args, state, control, **kwargs):
        if state.global_step >= 5:
            {fault}
        beat(self, args, state, control, **kwargs)
    Heartbeat.on_step_begin = at_step
"""


def faulty(folder: Path, fault: str) -> dict[str, str]:
    """An environment in which rank 1 does something from step 5 on."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT.format(fault=fault), "utf-8")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def slow(folder: Path) -> dict[str, str]:
    """An environment in which a run is not over before it is hit, however fast its machine is."""
    return faulty(folder, "time.sleep(0.6)")  # a sign of life is written every 0.5 s


def resumed_like(run: Path, undisturbed: Path) -> None:
    """Resume ends with the same losses and the same weights, to the last bit."""
    run_cli("resume", str(run), code=0, OMP_NUM_THREADS="1")
    assert losses(run) == losses(undisturbed)
    name = "model/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_at_once_and_resume_ends_like_no_kill(
    model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    front = start(*words(model, tmp_path, *TWO), **slow(tmp_path / "site"))
    run = at_step(tmp_path, 6)
    os.kill(sign(run, 1)["pid"], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = front.communicate(timeout=60)
    assert front.returncode == 1
    assert time.monotonic() - killed < 20
    assert errors.count("rank 1 was ended by SIGKILL") == 1 and "Traceback" not in errors
    assert f"python -m runner resume {run}" in " ".join(errors.replace("'", "").split())
    assert RunDir(run).read("status.json")["state"] == "failed"
    resumed_like(run, undisturbed)


@pytest.mark.slow
def test_sigterm_to_the_front_saves_a_checkpoint_and_exits_130(model: Path, tmp_path: Path, undisturbed: Path) -> None:
    front = start(*words(model, tmp_path, *TWO), **slow(tmp_path / "site"))
    run = at_step(tmp_path, 5)
    front.send_signal(signal.SIGTERM)
    front.communicate(timeout=60)
    assert front.returncode == 130
    status = RunDir(run).read("status.json")
    assert status["state"] == "interrupted" and status["step"] >= 5
    assert checkpoints.newest(RunDir(run)) == status["step"]
    resumed_like(run, undisturbed)


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_the_run_with_it(model: Path, tmp_path: Path, undisturbed: Path) -> None:
    front = start(*words(model, tmp_path, *TWO), **slow(tmp_path / "site"))
    run = at_step(tmp_path, 5)
    pids = [sign(run, rank)["pid"] for rank in (0, 1)]
    front.kill()
    front.wait()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), 60)
    assert checkpoints.complete(RunDir(run))
    resumed_like(run, undisturbed)


CLOCKS = """
import itertools, os, sys
if "RANK" in os.environ and "runner.train" in sys.orig_argv:
    from runner.train import checkpoint_saving
    checkpoint_saving.LARGEST_SHARE = 1.0
    times = itertools.count(0.0, 60.0 if os.environ["RANK"] == "0" else 0.0)
    checkpoint_saving.time = type("Clock", (), {"monotonic": staticmethod(lambda: next(times))})
"""


@pytest.mark.slow
def test_all_write_a_checkpoint_when_the_first_one_s_clock_says_so(
    model: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Rank 0's clock goes on by a minute whenever it is read, rank 1's stands still: were each to go by its own, one
    would wait for the other for ever."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOCKS, "utf-8")
    often = ("train.save_every_minutes=2.5", "train.keep_checkpoints=20")
    done = run_cli(
        *words(model, tmp_path / "runs", *TWO[:2], *often), OMP_NUM_THREADS="1", PYTHONPATH=str(tmp_path / "site")
    )
    run = only_run(tmp_path / "runs")
    assert done.returncode == 0 and run is not None, done.stderr
    written = checkpoints.complete(RunDir(run))
    assert written[-1] == 12 and len(written) > 1
    assert all(checkpoints.damage(checkpoints.folder(RunDir(run), step)) == [] for step in written)
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
def test_a_rank_that_fails_is_shown_once_with_its_cause(model: Path, tmp_path: Path) -> None:
    env = faulty(tmp_path / "site", "raise OSError(28, 'No space left on device')")
    front = start(*words(model, tmp_path / "runs", *TWO), **env)
    _, errors = front.communicate(timeout=240)
    assert front.returncode == 1
    assert errors.count("rank 1: the disk is full: OSError: [Errno 28] No space left on device") == 1
    assert "train.keep_checkpoints=1" in errors and "rank1.traceback.txt" in errors
    assert "rank 0" not in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_its_stack_is_kept(model: Path, tmp_path: Path) -> None:
    env = faulty(tmp_path / "site", "time.sleep(1000)")
    front = start(*words(model, tmp_path / "runs", *TWO, "train.hang_minutes=0.1"), **env)
    _, errors = front.communicate(timeout=240)
    run = only_run(tmp_path / "runs")
    assert front.returncode == 1 and run is not None
    assert errors.count("rank 1 hangs: no heartbeat") == 1
    assert "after step 5" in errors or "after step 4" in errors
    stack = (run / "logs" / "rank1.stack.txt").read_text("utf-8")
    assert "at_step" in stack and "sitecustomize.py" in stack
    until(lambda: not any(is_alive(sign(run, rank)["pid"]) for rank in (0, 1)), 10)


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_short_is_passed_over(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    front = start(*words(model, tmp_path, *TWO), **slow(tmp_path / "site"))
    run = at_step(tmp_path, 9)
    front.send_signal(signal.SIGKILL)
    front.communicate(timeout=60)
    until(lambda: sign(run, 0)["state"] != "alive" and sign(run, 1)["state"] != "alive", 60)
    directory = RunDir(run)
    last = checkpoints.complete(directory)[-1]
    victim = max(checkpoints.folder(directory, last).rglob("*.pt"), key=lambda file: file.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    done = run_cli("resume", str(run), code=0, OMP_NUM_THREADS="1")
    assert f"checkpoint {last} is damaged" in done.stdout and "skipped" in done.stdout
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["hw.num_processes=1", "deepspeed=zero1"])
def test_resume_on_another_number_of_processes_or_stage(undisturbed: Path, tmp_path: Path, change: str) -> None:
    """DeepSpeed's universal checkpoint; the sums are taken in another order: 1e-5 of the loss."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    RunDir(run).set_status("failed")
    done = run_cli("resume", str(run), change, code=0, OMP_NUM_THREADS="1")
    assert "Resumes after step 8" in done.stdout
    assert losses(run)[:8] == losses(undisturbed)[:8]
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    resumes = RunDir(run).read("resumes.json")["resumes"]
    assert resumes == [{"after_step": 8, "overrides": [change]}]


@pytest.mark.slow
def test_what_cannot_be_gone_on_with_is_refused_before_anything_starts(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    RunDir(run).set_status("failed")
    before = (run / "spec.json").read_bytes()
    refused = run_cli("resume", str(run), "deepspeed=none")
    assert refused.returncode == 2 and "cannot be read with deepspeed=none" in refused.stderr
    refused = run_cli("resume", str(run), "deepspeed=zero3")
    assert (
        refused.returncode == 2 and "write deepspeed=zero1, deepspeed=zero2, deepspeed=zero2_offload" in refused.stderr
    )
    refused = run_cli("resume", str(run), "hw.num_processes=3")
    assert refused.returncode == 2 and "makes the global batch 9, and the first 12 steps took 8" in refused.stderr
    assert (run / "spec.json").read_bytes() == before


# ── without processes ──────────────────────────────────────────────────────────────────────────


def on(hw: str, *more: str) -> RunSpec:
    """A spec for hardware that this machine need not have."""
    spec: Any = spec_of(f"hw={hw}", "model=mistral7b", "method=lora", *more)
    assert isinstance(spec, RunSpec)
    return spec


def test_the_command_keeps_arguments_whole_and_has_one_process_per_gpu(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my runs" / "a run")
    command = torchrun.torchrun_command(run, on("h100x3"))
    assert command[command.index("--nproc-per-node") + 1] == "3"
    assert command[command.index("--rdzv-backend") + 1] == "c10d"
    assert command[-3:] == ["-m", "runner.train", str(tmp_path / "my runs" / "a run" / "spec.json")]


def test_one_process_without_deepspeed_needs_no_torchrun(tmp_path: Path) -> None:
    assert "torch.distributed.run" not in torchrun.torchrun_command(RunDir(tmp_path), on("h100", "deepspeed=none"))
    assert "torch.distributed.run" in torchrun.torchrun_command(RunDir(tmp_path), on("h100", "deepspeed=zero2"))


def test_the_profile_decides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    found = torchrun.process_environment(on("rtx4090x2"))
    assert found["NCCL_P2P_DISABLE"] == "1" and found["NCCL_IB_DISABLE"] == "1"
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert int(found["OMP_NUM_THREADS"]) >= 1


def test_a_run_on_the_cpu_sees_no_gpu_and_does_not_ask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = torchrun.process_environment(on("cpu"))
    assert (found["CUDA_VISIBLE_DEVICES"], found["PYTORCH_NVML_BASED_CUDA_CHECK"]) == ("", "1")
    assert torchrun.process_environment(on("h100"))["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(
    "words",
    [
        ("h100x3",), ("rtx4090x2",), ("h100",), ("h100", "deepspeed=zero2"), ("cpu",), ("cpu", "hw.num_processes=2"),
        ("h100x8", "hw.num_nodes=2", "hw.rendezvous=first:29500"),
    ],
)  # fmt: skip
def test_the_plan_names_the_command_and_environment_of_the_launch(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = on(*words)
    planned = plan_inputs.plan(spec, [])
    launched = torchrun.torchrun_command(RunDir(Path("runs/ID")), spec)
    assert planned.command == ["python", *launched[1:]]
    for name in planned.env:
        monkeypatch.delenv(name, raising=False)
    environment = torchrun.process_environment(spec)
    assert planned.env and planned.env == {name: environment[name] for name in planned.env}
    assert {name for name in environment if name not in os.environ} - {*planned.env} <= {
        "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME",  # of a machine that only the launch has seen
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("RuntimeError: [enforce fail at inline_container.cc] file write failed", "the disk is full"),
        ("DistNetworkError: The server socket has failed to bind to [::]:29500 EADDRINUSE", "the port"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)", "the GPUs waited"),
        ("AssertionError: Unable to find nvcc, CUDA_HOME is not set", "a DeepSpeed kernel has to be compiled"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'x.jsonl'", "a file is missing"),
    ],
)
def test_known_causes_are_recognised(words: str, what: str) -> None:
    cause = cause_of(words)
    assert cause is not None and cause.what.startswith(what)
    assert all(one.remedy for one in CAUSES)


@pytest.mark.slow
def test_a_resume_that_is_refused_leaves_nothing_behind(undisturbed: Path) -> None:
    done = run_cli("resume", str(undisturbed))
    assert done.returncode == 2 and "is done: all 12 steps" in done.stderr
    assert not (undisturbed / "resumes.json").exists()
    refused = run_cli("resume", str(undisturbed), "train.learning_rate=1e-5", "--json")
    assert "train.learning_rate was 0.001" in json.loads(refused.stdout)["problems"][0]["what"]
