"""A run that dies for want of memory says in which phase, of what, and what would have fitted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config.command_line import Request
from runner.launcher.explain_failure import report_ending
from runner.launcher.oom_report import OomReport, diagnose_oom, write_report
from runner.launcher.supervisor import Ending
from runner.machine.processes import OomKills, killer, oom_kills
from runner.resolve import plan_inputs
from runner.resolve.steps import resolved
from runner.rundir.directory import RunDir, all_runs
from runner.train.__main__ import main
from runner.train.memory_stats import out_of_memory
from tests.conftest import ROOT, SHORT
from tests.runs.test_run_life import start, wait_for_step
from tests.support.front import spec_of, write

GPU = {"kind": "cuda", "message": "CUDA out of memory. Tried to allocate 2.00 GiB", "outside_gib": 0.6}


def died(*words: str, plan: bool = True, **status: Any) -> tuple[RunDir, Any]:
    """A planned run whose worker has left `status` behind."""
    spec = spec_of(*words)
    run = RunDir.create(spec)
    if plan:
        run.write("plan.json", plan_inputs.plan(spec, []).as_dict())
    run.set_status(status.pop("state", "failed"), **status)
    return run, spec


def of(*words: str, killed: Any = None, **status: Any) -> OomReport:
    return diagnose_oom(*died(*words, **status), killed)


def needs(*words: str) -> dict[str, Any]:
    """The plan of the run with a suggestion taken."""
    return plan_inputs.plan(resolved(Request(overrides=words))[0], []).as_dict()


# ── the worker's note ──────────────────────────────────────────────────────────────────────────


def raised(error: Exception) -> BaseException:
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "cuda"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "cuda"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "cuda"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), "
                "NCCL version 2.29.3\nncclUnhandledCudaError: Call to CUDA function failed.\n"
                "Last error:\nCuda failure 2 'out of memory'"
            ),
            "cuda",
        ),
        (RuntimeError("Last error:\nCuda failure 'out of memory'"), "cuda"),  # NCCL before 2.24
        (RuntimeError("CUDA driver error: out of memory"), "cuda"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "cuda"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "cuda"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), "cuda"),
        (RuntimeError("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling"), "cuda"),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), "cuda"),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "cuda"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"), "cpu"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: x.cpp:3384, unhandled cuda error\nncclUnhandledCudaError: Call failed.\n"
                "Last error:\nFailed to CUDA calloc async 8912896 bytes"
            ),
            "cuda",
        ),
        (RuntimeError("Last error:\nFailed to CUDA host alloc 4194304 bytes"), "cpu"),
        (
            RuntimeError(
                "CUDA error (/tmp/pip-install-x8jz1/flash-attn_5f0ab3/csrc/flash_attn/src/flash_fwd_launch_template.h"
                ":64): out of memory"
            ),
            "cuda",
        ),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "cuda"),
        (RuntimeError("cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"), "cuda"),
        (
            RuntimeError(
                'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131, please'
            ),
            "cuda",
        ),
        (RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nCUDA error: out of memory"), "cpu"),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), None),
        (RuntimeError("out of resource: shared memory, Required: 180224, Hardware limit: 101376"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:134] DefaultCPUAllocator: can't allocate memory: you"), "cpu"),
        (MemoryError(), "cpu"),
        (OSError(12, "Cannot allocate memory"), "cpu"),
        (RuntimeError("The size of tensor a (3) must match"), None),
        (FileNotFoundError(2, "No such file"), None),
    ],
)
def test_an_error_that_means_no_memory_is_known_from_others(error: Exception, kind: str | None) -> None:
    found = out_of_memory(raised(error))
    assert (found and found["kind"]) == kind


def test_memory_that_cuda_pins_for_an_offload_is_the_machines() -> None:
    """DeepSpeed's `pin_memory` gets CUDA's plain "out of memory", though the GPU may be empty."""

    def pin_memory() -> None:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")

    with pytest.raises(RuntimeError) as caught:
        pin_memory()
    found = out_of_memory(caught.value)
    assert found is not None and (found["kind"], found["message"]) == ("cpu", "CUDA error: out of memory")


def test_of_many_lines_the_one_that_speaks_of_memory_is_kept() -> None:
    error = RuntimeError("NCCL error in: x.cpp\nLast error:\nCuda failure 2 'out of memory'")
    found = out_of_memory(raised(error))
    assert found is not None and found["message"] == "Cuda failure 2 'out of memory'"


@pytest.mark.parametrize(
    "line",
    [
        "[rank1]:[E1129 ProcessGroupNCCL.cpp:1984] terminate called: Cuda failure 2 'out of memory'",
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp",  # bitsandbytes, which then exits
    ],
)
def test_a_process_that_could_not_say_so_leaves_its_words_in_the_launchers_log(
    line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, spec = died("model=llama3_8b", "hw=h100x3", "deepspeed=zero3", state="training")
    (run.path / "logs" / "launcher.log").write_text(f"W1129 torchrun\n{line}\n")
    sign = {"rank": 1, "pid": 1, "host": "here", "state": "alive"}
    assert report_ending(run, spec, Ending(1, ranks=[sign]), lambda: "somebody else") == 1
    assert "out of GPU memory" in capsys.readouterr().err
    assert (run.read("autopsy.json")["memory"], run.read("autopsy.json")["message"]) == ("gpu", line)


def test_the_allocators_own_words_are_kept_and_the_cause_is_looked_for() -> None:
    try:
        try:
            torch.empty(1 << 60)
        except RuntimeError as error:
            raise ValueError("cannot load the model") from error
    except ValueError as error:
        found = out_of_memory(error)
    assert found is not None and found["kind"] == "cpu"
    assert "DefaultCPUAllocator" in found["message"] and "\n" not in found["message"]
    assert found["resident_gib"] > 0.1 and found["reserved_gib"] is None


class Exhausting(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 60)


def test_the_stack_shows_the_part_of_the_step() -> None:
    def compute_loss() -> None:
        torch.empty(1 << 60)

    def train() -> None:
        Exhausting.apply(torch.ones(2, requires_grad=True)).sum().backward()

    for act, phase in ((compute_loss, "forward"), (train, "backward")):
        with pytest.raises(RuntimeError) as caught:
            act()
        found = out_of_memory(caught.value)
        assert found is not None and found["phase"] == phase


@pytest.mark.usefixtures("here")
def test_the_worker_leaves_a_note_and_no_stack_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runner.train.worker

    def work(spec: Any, run: RunDir, *others: Any) -> None:
        run.set_status("evaluating")
        torch.empty(1 << 60)

    monkeypatch.setattr(runner.train.worker, "work", work)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run = RunDir.create(spec_of("hw=cpu"))
    try:
        assert main([str(run.spec_file)]) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    status = run.read("status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert (status["oom"]["kind"], status["oom"]["phase"]) == ("cpu", "eval")
    assert "Traceback" not in "".join(capsys.readouterr())
    assert "DefaultCPUAllocator" in (run.path / "logs/traceback.txt").read_text("utf-8")


# ── the autopsy ────────────────────────────────────────────────────────────────────────────────

BIG = ("model=mistral7b", "method=lora", "hw=rtx4090", "train.max_length=2048", "train.batch_size=4",
       "train.micro_batch_size=1", "train.gradient_checkpointing=true")  # fmt: skip


@pytest.mark.usefixtures("here")
def test_it_names_phase_term_and_numbers_of_the_plan() -> None:
    found = of(*BIG, oom={**GPU, "phase": "backward", "reserved_gib": 22.9})
    plan = needs(*BIG)
    terms = plan["phases"]["backward"]
    assert found.dominant_term == max(terms, key=lambda name: terms[name]) == "frozen_weights"
    assert found.predicted_gib == plan["peak_gib"]["expected"] and found.capacity_gib == plan["capacity_gib"]
    assert found.held_gib == pytest.approx(22.9 + terms["process"])
    assert found.what.startswith("out of GPU memory; it happened in the backward pass; the largest part there is")
    assert f"planned were {plan['peak_gib']['expected']:.1f} of {plan['capacity_gib']:.1f} GiB" in found.what


@pytest.mark.usefixtures("here")
def test_what_it_suggests_needs_less_than_what_was_there() -> None:
    found = of(*BIG, oom={**GPU, "phase": "backward", "reserved_gib": 22.9})
    before = needs(*BIG)["peak_gib"]["expected"]
    *here_, elsewhere = found.suggestions
    assert here_, "something can be changed on the same machine"
    for suggestion in here_:
        peak = needs(*BIG, *suggestion.words.split())["peak_gib"]["expected"]
        assert peak == pytest.approx(suggestion.gib, abs=0.01)
        assert peak <= 0.9 * before
    assert elsewhere.words.startswith("hw=") and elsewhere.words != "hw=rtx4090"
    assert found.suggestions[0].words in found.remedy and "spec.json" in found.remedy


@pytest.mark.usefixtures("here")
def test_a_change_that_does_not_help_the_failed_phase_is_not_suggested() -> None:
    words = ("model=phi2", "method=lora", "hw=rtx4090", "train.max_length=2048", "train.gradient_checkpointing=false")
    step = of(*words, oom={**GPU, "phase": "forward", "reserved_gib": 22.0})
    load = of(*words, oom={**GPU, "phase": "load", "reserved_gib": 22.0})
    assert step.suggestions[0].words == "train.gradient_checkpointing=true"
    assert all("checkpointing" not in suggestion.words for suggestion in load.suggestions)


@pytest.mark.usefixtures("here")
def test_fewer_prompts_at_once_where_answering_them_failed() -> None:
    words = ("model=phi2", "method=lora", "hw=rtx4090", "eval.batch_size=64", "eval.num_prompts=64")
    found = of(*words, oom={**GPU, "phase": "eval", "reserved_gib": 22.0})
    assert found.suggestions[0].words == "eval.batch_size=1"


@pytest.mark.usefixtures("here")
def test_memory_of_other_processes_is_told() -> None:
    found = of(*BIG, oom={**GPU, "phase": "forward", "reserved_gib": 5.0, "outside_gib": 17.65})
    assert found.others_gib == pytest.approx(17.0, abs=0.2)
    assert "other processes held 17.0 GiB of the GPU" in found.what
    assert all(s.gib <= 0.9 * (24.0 - 17.0) for s in found.suggestions if not s.words.startswith("hw="))


@pytest.mark.usefixtures("here")
def test_main_memory_of_a_gpu_run_is_another_matter() -> None:
    found = of(*BIG, state="loading", killed="kernel")
    assert (found.memory, found.phase, found.suggestions) == ("main", "load", [])
    assert "a machine with more main memory" in found.remedy


@pytest.mark.usefixtures("here")
def test_without_a_plan_it_still_says_where_and_what_to_try() -> None:
    found = of("hw=cpu", plan=False, state="training", killed="probably the kernel")
    assert found.dominant_term is None and "in training" in found.what
    assert "train.micro_batch_size=1" in found.remedy


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("who", ["kernel", "probably the kernel", "somebody else"])
def test_a_kill_is_told_by_what_the_kernel_counted(who: Any) -> None:
    run, spec = died("hw=cpu", state="training")
    (run.path / "metrics.jsonl").write_text('{"step": 3, "memory_gib": 1.1}\n', "utf-8")
    error = write_report(run, spec, who)
    written = run.read("autopsy.json")
    assert (written["killer"], written["step"], written["held_gib"]) == (who, 3, 1.1)
    assert written["suggestions"] and written["what"] == run.read("status.json")["error"] == str(error)
    assert "SIGKILL" in str(error) and "after step 3" in str(error)
    assert ("if memory was the reason" in written["remedy"]) == (who == "somebody else")


# ── who killed it ──────────────────────────────────────────────────────────────────────────────


def machine(root: Path, group: int | None, whole: int | None, version: int = 2) -> Path:
    if group is not None:
        line = "0::/job\n" if version == 2 else "4:memory:/job\n0::/\n"
        write(root / "proc/self/cgroup", line)
        file = "memory.events" if version == 2 else "memory/memory.oom_control"
        write(root / "sys/fs/cgroup" / file, f"oom 5\noom_kill {group}\n")
    if whole is not None:
        write(root / "proc/vmstat", f"nr_free_pages 7\noom_kill {whole}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_the_groups_count_is_read_in_both_versions(tmp_path: Path, version: int) -> None:
    assert oom_kills(machine(tmp_path, 3, 8, version)) == OomKills(3, 8)


def test_nothing_to_read_is_not_zero(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == OomKills(None, None)


@pytest.mark.parametrize(
    ("before", "after", "who"),
    [
        (OomKills(0, 0), OomKills(1, 1), "kernel"),
        (OomKills(0, 0), OomKills(0, 1), "somebody else"),  # the kernel's kill was in another group
        (OomKills(None, 0), OomKills(None, 1), "probably the kernel"),
        (OomKills(None, 0), OomKills(None, 0), "somebody else"),
        (OomKills(None, None), OomKills(None, None), "probably the kernel"),
    ],
)
def test_the_killer_is_who_the_counts_say(before: OomKills, after: OomKills, who: str) -> None:
    assert killer(before, after) == who


# ── for real ───────────────────────────────────────────────────────────────────────────────────


LIMIT = 5 * 2**30
"""Of addresses, not of pages: torch and its libraries take three, and unpacking the model one more."""
LARGE = ("train.max_length=1024", "train.batch_size=8", "train.micro_batch_size=8", "data.max_examples=600")
"""A step that takes about ten GiB."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits nothing elsewhere")
def test_a_real_run_in_too_little_memory_ends_in_words(tmp_path: Path) -> None:
    limited = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT})); "
        "runpy.run_module('runner', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "hw=cpu", *SHORT, *LARGE, f"run.output_dir={tmp_path / 'runs'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (run,) = all_runs(tmp_path / "runs")
    status, found = run.read("status.json"), run.read("autopsy.json")
    assert (run.state(), status["oom"]["kind"], found["memory"]) == ("failed", "cpu", "main")
    assert found["suggestions"] and found["phase"] in ("load", "eval", "forward", "backward", "step", "train")
    assert "Traceback" not in done.stdout + done.stderr
    assert f"• {found['what']}" in done.stderr and f"→ {found['remedy']}" in done.stderr
    assert (run.path / "logs/traceback.txt").is_file()


@pytest.mark.slow
def test_a_worker_that_is_killed_for_real_gets_an_autopsy(tmp_path: Path) -> None:
    process = start(tmp_path, "hw=cpu", "train.max_steps=400")
    run = wait_for_step(tmp_path, 1)
    os.kill(run.read("status.json")["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    found = run.read("autopsy.json")
    assert process.returncode == 1
    # Where the kernel's count can be read it did not move; where it cannot, nobody knows.
    expected = "probably the kernel" if oom_kills() == OomKills(None, None) else "somebody else"
    assert found["killer"] == expected
    assert (found["phase"], found["held_gib"] > 0.5) == ("train", True)
    assert f"• {found['what']}" in err and f"→ {found['remedy']}" in err and "SIGKILL" in found["what"]
    assert run.read("status.json")["error"] == found["what"]
