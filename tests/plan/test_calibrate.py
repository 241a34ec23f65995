"""What was predicted stands beside what was measured, and past runs say what to believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.plan.memory import CONTEXT, GIB
from runner.report.plan_accuracy import calibration
from runner.report.summary import TRAINING, beside_plan, pair, plan_line
from runner.resolve import plan_inputs
from runner.rundir.directory import RunDir, all_runs
from runner.train.memory_stats import Peaks
from tests.conftest import SHORT, run_cli
from tests.support.front import here, laptop, runner, spec_of

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")


def planned(*words: str) -> dict[str, Any]:
    return plan_inputs.plan(spec_of(*words), []).as_dict()


def on_cpu(resident: float, **phases: float) -> dict[str, Any]:
    """As `Peaks.as_dict` has it without a GPU."""
    return {"resident": resident, "reserved": None, "allocated": None, "outside": None, "phases": phases}


def on_gpu(reserved: float, allocated: float, outside: float, **phases: float) -> dict[str, Any]:
    return {"resident": 3.0, "reserved": reserved, "allocated": allocated, "outside": outside, "phases": phases}


# ── beside the plan ────────────────────────────────────────────────────────────────────────────


def test_the_error_is_positive_where_too_much_was_predicted() -> None:
    assert pair(2.2, 2.0) == {"predicted": 2.2, "measured": 2.0, "error": 0.1}
    assert pair(None, 2.0) == {"predicted": None, "measured": 2.0, "error": None}


def test_on_a_cpu_the_resident_size_is_compared_with_the_whole_plan() -> None:
    plan = planned("hw=cpu")
    found = beside_plan(plan, on_cpu(2.0, train=1.5), tokens_per_second=400.0, seconds=300.0)
    assert found["peak_gib"]["predicted"] == plan["peak_gib"]["expected"]
    assert found["peak_gib"]["measured"] == 2.0
    highest = max(sum(plan["phases"][name].values()) for name in TRAINING)
    assert found["phases"]["train"]["predicted"] == pytest.approx(highest, abs=1e-3)
    assert found["seconds"]["predicted"] == pytest.approx(plan["hours"] * 3600)
    assert found["tokens_per_second"] == pair(plan["tokens_per_second"], 400.0)
    assert "outside_gib" not in found


def test_on_a_gpu_the_allocator_is_not_charged_for_the_context() -> None:
    plan = planned("hw=rtx4090", "model=phi2", "train.max_length=2048", "eval.num_prompts=0")
    assert plan["peak_phase"] in TRAINING
    terms = plan["phases"][plan["peak_phase"]]
    found = beside_plan(plan, on_gpu(9.0, 8.5, 0.6, train=9.0), tokens_per_second=400.0, seconds=300.0)
    peak = found["peak_gib"]
    assert peak["predicted"] == pytest.approx(plan["peak_gib"]["expected"] - terms["process"], abs=2e-3)
    assert peak["predicted_allocated"] == pytest.approx(peak["predicted"] - terms["allocator_slack"], abs=2e-3)
    assert (peak["measured"], peak["measured_allocated"]) == (9.0, 8.5)
    assert peak["low"] == pytest.approx(plan["peak_gib"]["low"] - CONTEXT["low"] / GIB, abs=2e-3)
    assert peak["low"] <= peak["predicted"] <= peak["high"]
    assert found["outside_gib"] == pair(terms["process"], 0.6)
    assert found["host_ram_gib"] == pair(plan["host_ram_gib"], 3.0)
    assert found["phases"]["train"]["predicted"] == pytest.approx(peak["predicted"], abs=2e-3)


def test_a_plan_without_time_leaves_the_time_open() -> None:
    found = beside_plan(planned("hw=cpu") | {"hours": None}, on_cpu(2.0), 400.0, 281.0)
    assert found["seconds"] == {"predicted": None, "measured": 281.0, "error": None}
    assert "measured 2.0 GiB, 4 min 41 s" in plan_line(found)


def test_the_closing_line_has_both() -> None:
    found = {"peak_gib": pair(2.1, 2.2), "seconds": pair(250.0, 281.0)}
    assert plan_line(found) == "predicted 2.1 GiB, 4 min 10 s; measured 2.2 GiB, 4 min 41 s"


def test_a_phase_has_the_peak_of_its_own_time() -> None:
    peaks = Peaks(on_gpu=False)
    if not peaks.resets:
        pytest.skip("this system cannot reset the peak of a process")
    big = bytearray(300 << 20)
    del big
    peaks.end("first")
    small = bytearray(30 << 20)
    del small
    peaks.end("second")
    first, second = peaks.phases["first"].held, peaks.phases["second"].held
    assert first - second == pytest.approx(270 / 1024, abs=0.03)
    assert peaks.as_dict()["resident"] == first and peaks.as_dict()["phases"] == {"first": first, "second": second}


# ── over past runs ─────────────────────────────────────────────────────────────────────────────


def past_run(method: str, memory: float, time: float, **changes: Any) -> RunDir:
    """A finished run, planned at 2 GiB, 100 tokens/s and 100 s; it took `memory` and `time` times as much."""
    run = RunDir.create(spec_of(f"method={method}", "hw=cpu"))
    plan = {
        "device": "CPU",
        "peak_gib": pair(2.0, 2.0 * memory),
        "tokens_per_second": pair(100.0, 100.0),
        "seconds": pair(100.0, 100.0 * time),
    }
    run.write("summary.json", {"model": "smollm2_135m", "method": method, "hw": "cpu", "plan": plan} | changes)
    return run


def test_every_run_with_a_plan_is_a_row_and_every_method_has_its_median() -> None:
    for memory in (1.5, 2.0, 1.7):
        past_run("lora", memory, 1.05)
    past_run("full", 1.0, 1.0)
    RunDir.create(spec_of()).write("summary.json", {"model": "phi2", "hw": "cpu"})  # from before there were plans
    found = calibration(Path("runs")).as_dict()
    assert sorted(row["peak_gib"]["measured"] for row in found["runs"]) == [2.0, 3.0, 3.4, 4.0]
    lora = next(group for group in found["groups"] if group["method"] == "lora")
    assert lora["count"] == 3
    assert lora["peak_gib"] == pytest.approx(1 / 1.7 - 1, abs=1e-3)
    assert lora["seconds"] == pytest.approx(1 / 1.05 - 1, abs=1e-3)


def test_the_sentence_tells_what_to_believe_and_what_to_multiply() -> None:
    for _ in range(3):
        past_run("lora", 1.7, 1.05)
    assert calibration(Path("runs")).says == (
        "On cpu, by the median of 3 runs: believe speed (+0%) and time (-5%), but memory is 1.7 × what the plan says"
    )


def test_one_run_is_called_little_to_go_by() -> None:
    past_run("lora", 1.0, 1.0)
    assert "by the median of 1 run (few to go by): believe memory" in calibration(Path("runs")).says


def test_local_is_named_by_its_device() -> None:
    past_run("lora", 1.0, 1.0, hw="local")
    assert [row.hw for row in calibration(Path("runs")).runs] == ["local (CPU)"]


def test_the_verb_prints_the_table_and_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = past_run("lora", 1.7, 1.0)
    result = runner("calibrate")
    assert result.exit_code == 0
    assert run.id in result.stdout and "3.40 (-41%)" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    monkeypatch.setenv("COLUMNS", "140")
    assert "2.00 → 3.40" in runner("calibrate").stdout
    assert "1.7 × what the plan says" in result.stdout
    assert json.loads(runner("calibrate", "--json").stdout)["runs"][0]["run_id"] == run.id


def test_a_plan_that_was_far_too_high_is_said_in_times() -> None:
    past_run("lora", 1 / 713.84, 1.0)
    said = runner("calibrate").stdout
    assert "(×714)" in said and "%" not in said.split("(×714)")[0].splitlines()[-1]


def test_without_runs_it_says_what_to_type() -> None:
    result = runner("calibrate", "--output-dir", "elsewhere")
    assert result.exit_code == 0
    assert "elsewhere" in result.stdout and "python -m runner" in result.stdout
    assert json.loads(runner("calibrate", "--output-dir", "elsewhere", "--json").stdout)["runs"] == []


# ── for real ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_real_run_records_both_and_can_be_calibrated(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    done = run_cli("hw=cpu", *SHORT, f"run.output_dir={folder}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (run,) = all_runs(folder)
    summary, plan = run.read("summary.json"), run.read("plan.json")
    part = summary["plan"]
    assert part["peak_gib"]["predicted"] == plan["peak_gib"]["expected"]
    assert part["peak_gib"]["measured"] == pytest.approx(summary["peak_memory_gib"], abs=1e-3)
    assert part["tokens_per_second"]["measured"] == pytest.approx(summary["train"]["tokens_per_second"], abs=1e-3)
    assert part["seconds"]["measured"] > summary["seconds"]  # the imports, too
    if part["phases"]:
        assert set(part["phases"]) == {"load", "eval", "train", "save"}
        assert max(p["measured"] for p in part["phases"].values()) == part["peak_gib"]["measured"]
    assert "Plan " in done.stdout and f"measured {part['peak_gib']['measured']:.1f} GiB" in done.stdout
    (row,) = json.loads(run_cli("calibrate", "--output-dir", str(folder), "--json").stdout)["runs"]
    assert (row["run_id"], row["peak_gib"]["error"]) == (run.id, part["peak_gib"]["error"])
