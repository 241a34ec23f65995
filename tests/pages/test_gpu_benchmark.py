"""`python -m benchmarks gpu` runs whole on a CPU at tiny size: what a GPU's owner runs is not run there first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, turns
from benchmarks.__main__ import page


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_options(parser)
    return parser.parse_args(list(words))


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("begun")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    monkeypatch.setattr(gpu, "KEPT", folder)
    return folder


@pytest.mark.slow
def test_a_case_is_run_measured_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    words = options("--tiny", "--models", "mistral7b", "--methods", "qlora4", "--lengths", "1024")
    measured = gpu.measure(words)
    (row,) = measured["rows"]
    assert row.get("reason") is None
    assert row["tokens_per_second"] > 0 and row["bare_tokens_per_second"] > 0 and row["model_tflops"] > 0
    assert row["plan"]["peak_gib"]["predicted"] > 0 and row["plan"]["peak_gib"]["measured"] > 0
    names = [name for name, _ in row["kernels"]]
    assert any(name.startswith("aten::") for name in names), names
    assert 0 < sum(share for _, share in row["kernels"]) <= 1.001
    assert "| mistral7b | qlora4 | 1024 |" in gpu.section(measured)

    monkeypatch.setattr(gpu, "_measure", never)
    assert gpu.measure(words)["rows"] == [row]


@pytest.mark.slow
def test_a_case_that_fails_is_a_line_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BATCH", 0)
    measured = gpu.measure(options("--tiny", "--models", "phi2", "--methods", "lora", "--lengths", "512", "--no-bare"))
    (row,) = measured["rows"]
    assert row["exit_code"] == 2 and "train.batch_size" in row["reason"], row
    assert f"- phi2 lora 512: {row['reason']}" in gpu.section(measured)


def test_time_that_is_up_begins_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_measure", never)
    monkeypatch.setattr(gpu, "_matmul_peak", lambda size: {"device": "NVIDIA X", "cuda": "13.0", "tflops": 1.0})
    assert gpu.measure(options("--minutes", "-1"))["rows"] == []


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_matmul_peak", lambda size: {"device": "CPU", "cuda": None, "tflops": 1.0})
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.measure(options())


def test_most_valuable_first() -> None:
    first = list(gpu.cases(options()))
    assert first[0] == gpu.Case("mistral7b", "lora", 4096)
    assert {case.length for case in first if case.model == "phi2"} == {2048, 1024}  # its context ends there


def test_the_page_says_that_nothing_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.bench.RESULTS", tmp_path)
    assert gpu.NOT_MEASURED in page()


def test_what_libraries_print_as_they_load_is_no_answer_of_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed warns on standard output when it is imported on a machine without a GPU."""
    loop = tmp_path / "loop"
    loop.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "print('[2026-11-30 17:28:28,325] [WARNING] no accelerator', flush=True)\n"
        f"sys.path.insert(0, {str(turns.ROOT)!r})\n"
        "from benchmarks.turns import Finished, Step, Turns\n"
        "turns = Turns(int(sys.argv[-1]))\n"
        "try:\n"
        "    turns.begin()\n"
        "    while True:\n"
        "        turns.step_done(Step(1.0, 2.0, 3, 4))\n"
        "except Finished:\n"
        "    print('ended')\n"
    )
    loop.chmod(0o755)
    monkeypatch.setattr(turns.sys, "executable", str(loop))
    (tmp_path / "logs").mkdir()
    one = turns.Loop("one", "bare", tmp_path, {})
    turns.take_turns([one], total=3, block=2)
    assert one.steps == [turns.Step(1.0, 2.0, 3, 4)] * 3
    assert (tmp_path / "logs" / "benchmark.log").read_text().endswith("no accelerator\nended\n")
