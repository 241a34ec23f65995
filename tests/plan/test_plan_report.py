"""What a plan looks like: in words and bars on any terminal, as tables, and as a picture."""

from __future__ import annotations

import io
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.color import Color, ColorSystem
from rich.console import Console
from rich.text import Text

from runner.config import deepspeed_json
from runner.errors import RequestError
from runner.plan.autograd.tape import KINDS
from runner.plan.choose_stage import StageSearch, allowed_stages
from runner.plan.plan import Plan, plan_of
from runner.plan.run_time import RunFacts
from runner.report.plan_tables import print_fit, print_memory_table
from runner.report.plan_terms import FAMILIES, PHASES, TERMS, cells, heading, present, recomputed, segments, term_of
from runner.report.plan_text import print_plan
from runner.report.plots import plot_plan
from runner.resolve import fit
from runner.spec import DeepSpeedSpec
from tests.conftest import spec_of
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

METHODS = ("full", "freeze", "lora", "qlora4", "qlora8")
STAGES = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FACTS = RunFacts(num_steps=100, tokens_total=3_200_000, usd_per_gpu_hour=2.5, price_source="conf/hw, 2026-11-09")
# A model's shape, so that a test does not depend on what a catalogue's plan comes to.
PLAN: dict[str, Any] = {
    "model": "mistral7b", "method": "full", "hw": "h100x3", "where": "local", "fits": True, "reasons": [],
    "peak_gib": {"low": 42.3, "expected": 43.0, "high": 44.6}, "capacity_gib": 79.65, "peak_phase": "step",
    "phases": {
        "load": {"weights": 4.5, "process": 0.7},
        "forward": {"weights": 4.5, "master_weights": 9.0, "optimizer": 18.0, "activations": 0.5, "process": 0.7},
        "backward": {"weights": 4.5, "master_weights": 9.0, "optimizer": 18.0, "gradients": 4.7, "head_and_loss": 1.5},
        "step": {"weights": 4.5, "master_weights": 9.0, "optimizer": 18.0, "gradients": 4.5, "zero_step": 7.0},
        "eval": {"weights": 4.5, "master_weights": 9.0, "optimizer": 18.0, "kv_cache": 0.3},
        "save": {"weights": 4.5, "master_weights": 9.0, "optimizer": 18.0},
    },
    "host_ram_gib": 21.0, "host_ram": {"processes": 7.5, "saving": 13.5},
    "disk_gib": 121.4, "disk": {"weights": 13.5, "checkpoints": 94.4, "final_model": 13.5},
    "zero_stage": "zero3", "deepspeed": {}, "max_length": 256, "data": "commands", "precision": "bf16",
    "attention": "varlen: a flash kernel, no mask", "checkpointing": 2, "compiled": False,
    "micro_batch": 1, "accumulation": 2, "batch": 6, "num_gpus": 3,
    "trainable_parameters": 7_241_732_096, "num_steps": 100, "tokens_total": 3_200_000,
    "step_seconds": 0.1483, "tokens_per_second": 5178.0, "hours": 0.05, "usd": 0.33, "usd_per_hour": 7.5,
    "hours_parts": {"setup": 0.01, "download": 0.02, "load": 0.0, "training": 0.02, "evaluation": 0.0, "save": 0.0},
    "price_source": "conf/hw, 2026-11-09", "command": ["torchrun"], "env": {},
    "notes": ["deepspeed=auto took zero3: zero2 needs 90.1 GiB with headroom", "speed: an assumption",
              "train.gradient_checkpointing=auto took 2: without it a micro batch of 1 needs 80.2 GiB with headroom"],
}  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    return deepcopy(PLAN) | values


TOO_BIG = changed(
    fits=False, capacity_gib=24.0, hw="rtx4090x2", num_gpus=2, batch=4,
    reasons=["needs 43.0 GiB at its peak; each GeForce RTX 4090 has 24.0 GiB"],
)  # fmt: skip


def text_of(plan: dict[str, Any], width: int = 100, **console: Any) -> str:
    file = io.StringIO()
    print_plan(Console(file=file, width=width, **({"color_system": None} | console)), Plan(**plan))
    return file.getvalue()


def real_plans(hw: str = "h100x3") -> dict[tuple[str, str], dict[str, Any]]:
    """Every method with every stage that works."""
    options, plans = StageSearch(deepspeed_json.deepspeed_templates()), {}
    for method in METHODS:
        spec = spec_of("model=llama2_7b", f"method={method}", f"hw={hw}", "deepspeed=none", "train.batch_size=12")
        for stage in STAGES:
            one = spec.model_copy(update={"deepspeed": DeepSpeedSpec(name=stage)})
            try:
                allowed_stages(one)
            except RequestError:
                continue
            plans[method, stage] = plan_of(one, options, FACTS, []).as_dict()
    return plans


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, str], dict[str, Any]]:
    return real_plans()


def test_every_term_of_every_real_plan_has_words_and_a_family(plans: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert {method for method, _ in plans} == set(METHODS)
    assert {stage for _, stage in plans} == set(STAGES)
    seen = {term for plan in plans.values() for terms in plan["phases"].values() for term in terms}
    assert {"weights", "frozen_weights", "zero_gathered", "zero_step", "kv_cache", "allocator_slack"} <= seen
    assert (seen | set(KINDS)) - set(TERMS) == set()
    assert all(set(plan["phases"]) == set(PHASES) for plan in plans.values())


def test_a_term_that_nobody_listed_is_shown_as_other() -> None:
    assert term_of("new_thing") == ("new thing", FAMILIES[-1])
    assert segments({"new_thing": 2.0}) == {FAMILIES[-1]: 2.0}


def test_the_segments_of_a_bar_add_up_to_its_phase(plans: dict[tuple[str, str], dict[str, Any]]) -> None:
    for plan in plans.values():
        for terms in plan["phases"].values():
            total = sum(terms.values())
            assert sum(segments(terms).values()) == pytest.approx(total)
            shares = cells(list(segments(terms).values()), 100.0, 50)
            assert sum(shares) == round(total / 2) and min(shares) >= 0
        assert sum(plan["phases"][plan["peak_phase"]].values()) == pytest.approx(plan["peak_gib"]["expected"], abs=0.02)


def test_families_are_told_apart_with_and_without_colour() -> None:
    for trait in ("name", "colour", "fill", "letter"):
        assert len({getattr(family, trait) for family in FAMILIES}) == len(FAMILIES)
    of_256 = {Color.parse(family.colour).downgrade(ColorSystem.EIGHT_BIT).number for family in FAMILIES}
    assert len(of_256) == len(FAMILIES)


def test_the_first_line_answers_the_question() -> None:
    lines = text_of(PLAN).splitlines()
    assert lines[0] == "Mistral 7B, full, 3 × H100, ZeRO-3" == heading(Plan(**PLAN))
    assert lines[1] == ("Fits: 43.0 of 79.7 GiB expected on each GPU at the peak, in the optimiser step (42.3–44.6)")
    assert text_of(TOO_BIG).splitlines()[1] == (
        "Does not fit in 24.0 GiB: 43.0 expected on each GPU at the peak, in the optimiser step (42.3–44.6)"
    )
    assert "Does not fit in main memory: 43.0 of" in text_of(
        changed(fits=False, reasons=["needs 900 GiB of main memory"])
    )
    assert "Fits, but is refused: 43.0 of" in text_of(changed(reasons=["costs $9, more than where.max_usd=1"]))
    assert "Not known whether it fits: 43.0 GiB" in text_of(changed(capacity_gib=None))


def test_a_plan_that_is_refused_says_why_at_its_end() -> None:
    assert "Refused\n• needs 43.0 GiB at its peak; each GeForce RTX 4090 has 24.0 GiB" in text_of(TOO_BIG)
    assert "Refused" not in text_of(PLAN)


def bars(text: str) -> dict[str, str]:
    """The line of every phase."""
    return {line.split()[0]: line for line in text.splitlines() if line.split(" ")[0] in PHASES}


@pytest.mark.parametrize("width", [60, 100])
def test_bars_stand_against_the_capacity(width: int) -> None:
    fitting, over = bars(text_of(PLAN, width)), bars(text_of(TOO_BIG, width))
    assert list(fitting) == list(over) == list(PHASES)
    for lines in (fitting, over):
        assert len({line.index("│") for line in lines.values()}) == 1
    assert fitting["step"].endswith("43.0 GiB peak") and fitting["load"].endswith("5.2 GiB")
    assert all(line.split("│")[1].split()[1:2] == ["GiB"] for line in fitting.values())  # nothing beyond the mark
    assert "▒" in over["step"].split("│")[1] and "▒" not in over["load"]
    cell = (width if width < 76 else 76) - 26
    for phase, line in fitting.items():
        filled = sum(line.count(family.fill) for family in FAMILIES)
        assert filled == round(cell * sum(PLAN["phases"][phase].values()) / 79.65)


def test_a_bar_of_unknown_hardware_has_no_mark() -> None:
    assert "│" not in text_of(changed(capacity_gib=None))


def test_the_mark_is_seen_even_where_little_is_lacking() -> None:
    step = bars(text_of(changed(fits=False, capacity_gib=42.9)))["step"]
    assert step.split("│")[1].strip().startswith("·")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int, plans: dict[tuple[str, str], dict[str, Any]]) -> None:
    for plan in (PLAN, TOO_BIG, *plans.values()):
        assert max(cell_len(line) for line in text_of(plan, width).splitlines()) <= width


def test_one_legend_line_at_100_columns_names_all_families() -> None:
    everything = changed()
    everything["phases"]["step"] |= {"activations": 1.0, "head_and_loss": 1.0}
    (legend,) = [line for line in text_of(everything).splitlines() if "weights  ▓" in line]
    assert all(f"{family.fill} {family.name}" in legend for family in FAMILIES)
    assert present(Plan(**everything)) == list(FAMILIES)


def test_the_peaks_terms_come_largest_first() -> None:
    text = text_of(PLAN)
    table = text[text.index("At the peak") : text.index("ZeRO         ")]
    sizes = [float(line.split()[-1]) for line in table.splitlines()[1:] if line]
    assert sizes == [18.0, 9.0, 7.0, 4.5, 4.5]
    assert "ZeRO's copies in the step" in table


def test_the_layers_that_are_computed_again_are_counted_in_words() -> None:
    words = [recomputed(every) for every in (0, 1, 2, 3, 4, 11, 21, 112)]
    assert words[:2] == ["none", "all"]
    assert words[2:] == [f"every {nth}" for nth in ("2nd", "3rd", "4th", "11th", "21st", "112th")]


def test_batch_memory_disk_time_and_cost_are_told() -> None:
    text = text_of(PLAN)
    for line in (
        "ZeRO         ZeRO-3; deepspeed=auto took zero3: zero2 needs 90.1 GiB with headroom",
        "Recomputes   every 2nd of the layers in the backward pass; train.gradient_checkpointing=auto took 2:",
        "             without it a micro batch of 1 needs 80.2 GiB with headroom",
        "Batch        1 × 2 × 3 GPUs = 6 sequences of 256 tokens a step (micro batch × accumulation × GPUs)",
        "Trains       7,241,732,096 parameters",
        "Main memory  21.0 GiB: saving 13.5, processes 7.5",
        "Disk         121 GiB: checkpoints 94.4, weights 13.5, final model 13.5",
        "Work         100 steps, 3,200,000 tokens; 5,178 tokens/s, 0.15 s a step",
        "Time         3 min 0 s: set-up 36 s, download 1 min 12 s, training 1 min 12 s",
        "Cost         $0.33, at $7.50 an hour (price: conf/hw, 2026-11-09)",
        "• speed: an assumption",
    ):
        assert line in text
    assert text.count("deepspeed=auto") == text.count("checkpointing=auto") == 1


def test_what_is_not_known_is_said_in_words() -> None:
    nothing = dict.fromkeys(("hours", "hours_parts", "usd", "usd_per_hour", "price_source"))
    no_data = text_of(changed(num_steps=None, tokens_total=None, **nothing))
    assert "steps not known: the size of the data is not; 5,178 tokens/s" in no_data
    assert no_data.count("not known, as the number of steps is not") == 2
    no_speed = text_of(changed(tokens_per_second=None, step_seconds=None, **nothing))
    assert "3,200,000 tokens; speed not known: no figures for this hardware" in no_speed
    assert no_speed.count("not known, as the speed of this hardware is not") == 2
    no_price = text_of(changed(usd=None, usd_per_hour=None, price_source=None))
    assert "Cost         not known: no price for this hardware" in no_price
    assert not any("None" in text for text in (no_data, no_speed, no_price))


def test_a_cpu_has_processes() -> None:
    text = text_of(changed(num_gpus=0, hw="cpu", batch=2, zero_stage="none"))
    assert text.startswith("Mistral 7B, full, CPU\n")
    assert "1 × 2 × 1 process = 2 sequences of 256 tokens a step" in text and "on each GPU" not in text


def test_a_terminal_with_colours_gets_blocks_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = text_of(PLAN, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;47;111;176m" in text  # #2f6fb0
    assert "▒" not in text and "█" in bars(Text.from_ansi(text).plain)["step"]
    few = text_of(PLAN, force_terminal=True, color_system="standard")
    assert "▒" in few


def test_no_color_gets_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "▒" in text_of(PLAN, force_terminal=True, color_system="truecolor")
    assert "\x1b" not in text_of(PLAN)


def test_an_encoding_without_unicode_is_served() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(file=file, width=100, color_system=None)
    print_plan(console, Plan(**TOO_BIG))
    print_fit(console, ROWS, "A title")
    file.flush()
    lines = raw.getvalue().decode("ascii").splitlines()
    assert lines[0] == "Mistral 7B, full, 2 x RTX 4090, ZeRO-3"
    assert "OOOO" in bars("\n".join(lines))["step"] and "W weights  M master weights" in "\n".join(lines)
    assert "?" not in "\n".join(lines)


def row(**values: Any) -> dict[str, Any]:
    return {
        "model": "llama3_8b", "method": "lora", "hw": "h100x3", "num_gpus": 3, "zero_stage": "zero2", "micro_batch": 8,
        "accumulation": 2, "checkpointing": 4, "peak_gib": 43.2, "capacity_gib": 79.65, "tokens_per_second": 12345.6,
        "hours": 2.345, "usd": 28.14, "usd_per_million_tokens": 0.2341, "fits": True, "note": "",
    } | values  # fmt: skip


ROWS = [
    row(hw="t4", num_gpus=1, peak_gib=120.3, capacity_gib=14.56, fits=False, note="method=qlora4 or hw=rtx4090x2"),
    row(),
    row(hw="rtx4090", num_gpus=1, method="qlora4", hours=None, usd=None),
]


def fit_of(rows: list[dict[str, Any]], width: int, title: str = "Where it fits") -> list[str]:
    file = io.StringIO()
    print_fit(Console(file=file, width=width, color_system=None), rows, title)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_fit_shows_what_fits_first_and_what_to_change_for_the_rest() -> None:
    lines = fit_of(ROWS, 100)
    assert lines[0] == "Where it fits  model=llama3_8b"  # said once, not in every row
    first, rest = lines.index("Fits (2)"), lines.index("Does not fit (1)")
    assert first < rest
    assert lines[first + 2].endswith("43.2 of 79.7    12,346  2 h 20 min  $28.14       0.234")
    assert lines[first + 2].split()[:7] == ["lora", "h100x3", "3", "zero2", "8", "×", "2"]
    assert lines[first + 3].split()[-3:] == ["–", "–", "0.234"]
    assert lines[rest + 2].split(maxsplit=6) == ["lora", "t4", "zero2", "120", "of", "14.6", ROWS[0]["note"]]
    assert "batch: micro batch × accumulation on each GPU; –: not known" in lines


def test_fit_on_a_narrow_terminal_leaves_columns_out_and_breaks_none() -> None:
    lines = fit_of(ROWS, 60)
    assert max(map(cell_len, lines)) <= 60
    header = lines[lines.index("Fits (2)") + 1].split()
    assert header[:2] == ["method", "hw"] and {"GiB", "time", "cost"} <= set(header) and "GPUs" not in header
    assert any("2 h 20 min" in line and "$28.14" in line for line in lines)


def test_fit_says_once_what_is_known_of_no_row() -> None:
    lines = fit_of([row(hours=None, usd=None), row(hw="l4", hours=None, usd=None)], 100, "model=llama3_8b")
    assert lines[0].count("model=llama3_8b") == 1
    assert "batch: micro batch × accumulation on each GPU; time, cost: not known" in lines
    assert "Nothing to choose from" in fit_of([], 100)


def test_the_memory_table_turns_where_it_would_be_too_wide() -> None:
    table = {
        "title": "Memory",
        "columns": ["llama2_7b", "mistral7b", "llama2_13b", "llama2_70b"],
        "rows": [{"method": "full", "cells": [112.4, 116.0, 210.5, None]},
                 {"method": "lora", "cells": [14.2, 15.25, 26.4, 131.0]}],
        "assumptions": ["one sequence of 2048 tokens"],
    }  # fmt: skip
    shown = {}
    for width in (100, 40):
        file = io.StringIO()
        print_memory_table(Console(file=file, width=width, color_system=None), table)
        shown[width] = [line.split() for line in file.getvalue().splitlines()]
    assert shown[100][1:4] == [
        ["method", *table["columns"]], ["full", "112", "116", "210", "–"], ["lora", "14.2", "15.2", "26.4", "131"],
    ]  # fmt: skip
    assert shown[40][1:3] == [["model", "full", "lora"], ["llama2_7b", "112", "14.2"]]
    assert shown[40][5] == ["llama2_70b", "–", "131"]
    assert shown[100][-1] == shown[40][-1] == table["assumptions"][0].split()


@pytest.mark.usefixtures("here")
def test_the_memory_table_breaks_no_name_at_80_columns() -> None:
    result = runner("table")
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:14])) <= 80
    for name in fit.TABLE_MODELS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1, name


@pytest.mark.parametrize("plan", [PLAN, TOO_BIG, changed(capacity_gib=None)], ids=["fits", "too big", "no capacity"])
def test_the_picture_is_a_png_of_some_size_and_colour(plan: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib import image

    plot_plan(Plan(**plan), tmp_path / "plan.png")
    pixels = image.imread(tmp_path / "plan.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    for family in present(Plan(**plan)):
        rgb = [int(family.colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[:, :, :3] - rgb).max(axis=2) < 0.01).sum() > 100, family.name


def test_the_picture_needs_a_folder_a_format_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(file: Path) -> Any:
        with pytest.raises(RequestError) as caught:
            plot_plan(Plan(**PLAN), file)
        return caught.value.problems[0]

    assert "there is no folder" in problem(tmp_path / "missing" / "plan.png").what
    assert ".png" in problem(tmp_path / "plan.docx").remedy
    (tmp_path / "folder.png").mkdir()
    assert "cannot be written" in problem(tmp_path / "folder.png").what
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert problem(tmp_path / "plan.png").remedy == "pip install matplotlib"
    assert not (tmp_path / "plan.png").exists()
