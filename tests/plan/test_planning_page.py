"""docs/planning.md says what the code does: every generated part, every formula that is worked out by pencil."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from docs.generate import planning_examples as examples
from docs.generate import planning_page
from docs.generate import planning_published as published
from docs.generate.planning_facts import RUNS as REPORTED_RUNS
from docs.generate.planning_speed import RENTED, money_example
from runner.config.command_line import Request
from runner.plan import host_memory
from runner.plan.memory import GIB
from runner.plan.plan import Plan
from runner.report.plan_terms import TERMS
from runner.resolve.steps import resolved

TOKENS = 2048


@pytest.fixture(scope="module")
def text() -> str:
    """The page as it should be."""
    return planning_page.page()


def test_the_page_is_up_to_date(text: str) -> None:
    assert planning_page.PAGE.read_text("utf-8") == text, "docs/planning.md drifted: run `make docs`"


def test_every_part_is_used_and_nothing_is_left_open(text: str) -> None:
    used = set(re.findall(r"\{\{(\w+)\}\}", planning_page.TEXT.read_text("utf-8")))
    assert used == set(planning_page.PARTS)
    assert "{{" not in text


def test_it_needs_no_torch() -> None:
    code = "import sys, docs.generate.planning_page as p; p.page(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the contract ------------------------------------------------------------------------------------------------


def test_every_key_of_the_json_is_documented() -> None:
    plan = examples.planned("method=full", *examples.RUN)
    documented = planning_page.fields_of(Plan)
    assert list(documented) == list(plan.as_dict())
    assert [name for name, (_, meaning) in documented.items() if not meaning] == []


RUNS: list[tuple[str, ...]] = [(f"method={method}", *examples.RUN) for method in examples.METHODS]
RUNS += [(*examples.EIGHT, f"deepspeed={stage}") for stage in ("none", "zero1", "zero2", "zero3", "zero3_offload")]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_every_term_of_a_plan_is_documented(words: tuple[str, ...]) -> None:
    plan = examples.planned(*words)
    found = examples.phases_of_terms()
    for phase, terms in plan.phases.items():
        for name in terms:
            assert name in TERMS
            assert phase in found[name]
    assert plan.host_ram.keys() <= planning_page.HOST_TERMS.keys()
    assert plan.disk.keys() <= planning_page.DISK_TERMS.keys()


def test_every_term_of_main_memory_and_disk_is_documented() -> None:
    trained = host_memory.WeightBytes("full", 10, 10)
    everything: dict[str, Any] = {"data_tokens": 1, "pageable": 1.0, "training": 1.0, "held": 1.0}
    found = set(host_memory.host_ram(trained, 1, processes=1, accelerator="cpu", **everything))
    everything |= {"data_tokens": 0, "largest_matrix": 1}
    found |= set(
        host_memory.host_ram(trained, 1, processes=1, accelerator="cuda", **(everything | {"largest_matrix": 9}))
    )
    found |= set(host_memory.host_ram(trained, 1, processes=1, accelerator="cuda", **(everything | {"held": 999.0})))
    assert found == set(planning_page.HOST_TERMS)
    written = host_memory.disk(trained, 1, source="hub", checkpoints=1, data_tokens=1, nvme=1.0, shards=1.0, data=1.0)
    assert set(written) == set(planning_page.DISK_TERMS)


@pytest.mark.parametrize("words", [*RUNS[3:7], RENTED, *REPORTED_RUNS], ids=" ".join)
def test_the_runs_of_the_page_are_what_one_would_type(words: tuple[str, ...]) -> None:
    own, typed = examples.spec_of(*words).model_dump(), resolved(Request(overrides=words))[0].model_dump()
    for content in (own, typed):  # a method's file takes one of the model's: nothing that a plan reads
        del content["train"]["learning_rate"]
    assert own == typed


# --- by pencil -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "term", "formula", "size"), examples.pencil(), ids=lambda value: str(value))
def test_the_pencil_and_the_plan_agree(phase: str, term: str, formula: str, size: float) -> None:
    phases = examples.planned("method=full", *examples.RUN).phases
    for name in phases if phase == "always" else (phase,):
        if phase != "always" or (name, term) != ("load", "optimizer"):
            assert phases[name][term] == pytest.approx(size, abs=0.0011), formula


def test_the_terms_of_the_peak_add_up() -> None:
    plan = examples.planned("method=full", *examples.RUN)
    assert plan.peak_phase == "backward"
    total = sum(size for phase, _, _, size in examples.pencil() if phase in ("always", "backward"))
    assert total == pytest.approx(plan.peak_gib["expected"], abs=0.002)


@pytest.mark.parametrize("method", examples.METHODS)
def test_the_parts_of_a_layer_are_all_that_the_tape_keeps(method: str) -> None:
    by_part = examples.kept_by(method)
    by_kind = examples.kept_per_layer(method, checkpointing=False)
    copies = by_part.get(examples.COPIES, 0.0)
    assert sum(by_part.values()) - copies == pytest.approx(by_kind["activations"])
    assert copies == pytest.approx(by_kind["weight_casts"])


def test_what_a_layer_keeps_by_pencil() -> None:
    h, k, f, heads = 4096, 1024, 14336, 32
    full = 2 * (4 * h + 4 + 4 * h) + 3 * 2 * h + 2 * (2 * h + 2 * k) + 4 * heads + 2 * 2 * h + 3 * 2 * f + 2 * f
    assert sum(examples.kept_by("full").values()) / TOKENS == full + 2 * 218_103_808 / TOKENS
    assert examples.kept_per_layer("full", checkpointing=True)["activations"] / TOKENS == 4 * h
    assert examples.kept_per_layer("lora", checkpointing=True)["activations"] / TOKENS == 2 * h


@pytest.mark.parametrize(
    ("attention", "more"),
    [("sdpa", 2 * TOKENS + 2 * 2 * (4096 - 1024)), ("eager", 6 * 32 * TOKENS)],
)
def test_attention_with_a_mask_or_all_scores_keeps_more(attention: str, more: float) -> None:
    flash, other = (
        examples.kept_per_layer("full", False, attention=kernel)["activations"] / TOKENS
        for kernel in ("flash", attention)
    )
    assert other - flash == pytest.approx(more, rel=0.05)


def test_zero_by_pencil() -> None:
    p, h, v, world = 7_241_732_096, 4096, 32000, 8
    largest = v * h
    expected = {
        "zero1": {"weights": 2 * p, "gradients": 2 * p + 2 * p / world, "zero_buckets": 2 * h * h},
        "zero2": {"weights": 2 * p, "gradients": 2 * p / world + 2 * largest, "zero_buckets": 2 * 2 * h * h},
        "zero3": {
            "weights": 2 * p / world + 2 * 65 * h,
            "gradients": 2 * p / world + 2 * largest,
            "zero_buckets": 2 * h * h,
            "zero_gathered": 2 * (1_000_000_000 + largest + int(0.9 * h * h)),
        },
    }
    for stage, terms in expected.items():
        phases = examples.planned(*examples.EIGHT, f"deepspeed={stage}").phases
        for name, size in terms.items():
            assert phases["backward"][name] == pytest.approx(size / GIB, abs=0.001), (stage, name)
        assert phases["step"]["master_weights"] == pytest.approx(4 * p / world / GIB, abs=0.001)
        assert phases["step"]["optimizer"] == pytest.approx(8 * p / world / GIB, abs=0.001)
    step = examples.planned(*examples.EIGHT, "deepspeed=zero2").phases["step"]["zero_step"]
    assert step == pytest.approx(6 * p / world / GIB, abs=0.001)


def test_the_answers_cache_by_pencil() -> None:
    spec = examples.spec_of("method=full", *examples.RUN)
    size = 2 * 32 * 1024 * 2 * (512 + spec.eval.max_new_tokens) * spec.eval.batch_size
    assert examples.planned("method=full", *examples.RUN).phases["eval"]["kv_cache"] == pytest.approx(
        size / GIB, abs=0.001
    )


def test_money_by_pencil() -> None:
    plan = examples.planned(*RENTED)
    assert plan.usd is not None
    assert money_example().endswith(f"**${plan.usd:.2f}**.")
    parts = [float(number) for number in re.findall(r"\$(\d+\.\d+)", money_example())]
    hours_times_price, storage = parts[1], parts[3]
    assert hours_times_price + storage == pytest.approx(plan.usd, abs=0.01)


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_the_accuracy_shows_the_results_that_are_kept(text: str) -> None:
    rows = json.loads(planning_page.ACCURACY.read_text("utf-8"))["measured"]["rows"]
    assert f"over {len(rows)} runs" in text
    worst = max(abs(row["error"]) for row in rows)
    assert f"{worst:.2f}%" in text
    assert sum(abs(row["error"]) for row in rows) / len(rows) < 0.01
    assert worst < 0.2  # percent: 0.13 for Phi-2 with frozen layers, 0.05 for all others


# --- the table that is passed on -----------------------------------------------------------------------------------


def test_every_cell_that_differs_from_the_published_table_has_its_reason_and_no_other() -> None:
    differing = [(m, name) for m in published.PUBLISHED for name in published.MODELS if published.differs(m, name)]
    assert differing == [(method, name) for method, names, _ in published.REASONS for name in names]


def test_the_published_table_is_compared_with_what_table_prints(text: str) -> None:
    found = published.fit.memory_table(published._run(), published.MODELS.values())
    printed = {row["method"]: row["cells"] for row in found["rows"]}
    for method in published.PUBLISHED:
        ours = [published.gigabytes(method, name) * 1e9 / GIB for name in published.MODELS]
        assert ours == pytest.approx(printed[method], abs=0.051)
    assert "| QLoRA, 4 bits |" in text
