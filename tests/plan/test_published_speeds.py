"""Every published speed of docs/planning.md has a source, and the plan of its run stays within what is said of it."""

from __future__ import annotations

from statistics import median

import pytest

from docs.generate import published_speeds as speeds
from runner.plan.model_shape import shape_of


def test_every_figure_names_a_source_with_address_software_and_date() -> None:
    sources = speeds.content()["sources"]
    assert {run["source"] for run in speeds.content()["runs"]} == set(sources)
    for source in sources.values():
        assert source["url"].startswith("https://") and source["software"] and source["date"][:3] == "202"
    for run in speeds.content()["runs"]:
        assert run["unit"] in speeds.TOKENS and run["published"] > 0, run


def test_a_figure_becomes_tokens_a_second_of_all_gpus() -> None:
    found = {
        (one.run["source"], one.run["model"], one.run["length"], one.run["method"]): one for one in speeds.compared()
    }
    assert found["qwen", "Qwen 7B", 1024, "full"].published == pytest.approx(2 * 8 * 1024 / 4.5)  # s for a step of two
    assert found["llm-foundry", "MPT 30B", 2048, "full"].published == pytest.approx(8 * 2002)  # the last: on H100s
    assert found["torchtune-3b", "llama3_2_3b", 4096, "lora"].published == 8210


def test_models_outside_the_catalogue_have_the_published_number_of_parameters() -> None:
    """llm-foundry's `NumParams`, less learned positions, which a rotary model has not; Qwen's names."""
    wanted = {"MPT 7B": 6.658e9, "MPT 13B": 12.85e9, "MPT 30B": 29.97e9, "MPT 3B": 2.657e9, "Qwen 7B": 7.72e9}
    for name, parameters in wanted.items():
        run = next(run for run in speeds.content()["runs"] if run["model"] == name)
        shape = shape_of(speeds.spec_for(run).model)
        assert shape.num_parameters == pytest.approx(parameters, rel=0.01), name


BOUNDS = {
    "transformers with PEFT or DeepSpeed": (0.8, 1.1),
    "other software, not compiled": (0.55, 0.9),
    "other software, `torch.compile`": (0.45, 0.8),
}
"""Of the median, planned over published."""


@pytest.mark.parametrize("group", speeds.GROUPS)
def test_the_plan_is_for_transformers_and_too_slow_for_what_is_tuned_or_compiled(group: str) -> None:
    low, high = BOUNDS[group]
    found = speeds.ratios(group)
    assert len(found) >= 4
    assert low < median(found) < high, f"{median(found):.2f}"
    assert all(0.5 < ratio < 2.05 for ratio in found), sorted(found)


def test_every_run_is_in_one_group() -> None:
    for run in speeds.content()["runs"]:
        assert sum(of(run) for of in speeds.GROUPS.values()) == 1, run
