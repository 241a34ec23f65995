"""Where a run is and on what: a GPU is never silently a CPU, and time is weighed as well as memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cli.options import request_of
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.json_types import GpuType
from runner.errors import CannotRunError
from runner.machine.detect import HardwareSpec
from runner.plan.search import offers
from runner.report.text import duration
from runner.resolve.plan_inputs import hardware, stage_search
from runner.resolve.steps import resolved, with_facts
from runner.spec import RunPodPlace
from tests.support.emulated import Emulator, emulator
from tests.support.front import runner, spec_of

__all__ = ["emulator"]
LORA_7B = ("where=auto", "model=llama2_7b", "method=lora")
HERE = "EU-SE-1"
BIG = "hw.memory_gib=64"
"""This machine's memory, typed: the 7B model fits, and takes days."""


@pytest.fixture(autouse=True)
def _without_a_key(monkeypatch: pytest.MonkeyPatch, laptop: None, tmp_path: Path) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))


def note_of(*words: str) -> str:
    """The sentence about the place."""
    notes = resolved(request_of(words, ()))[1]
    return next(note for note in notes if note.startswith("where="))


# ── where=runpod without hw= ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["phi3_mini", "llama2_70b"])
def test_a_rented_run_without_hardware_is_on_the_cheapest_gpus_that_hold_it(model: str) -> None:
    words = ("where=runpod", f"model={model}", "method=qlora4")
    spec = spec_of(*words)
    assert spec.hw.accelerator == "cuda" and spec.hw.runpod_gpu_id
    rows = json.loads(runner("fit", f"model={model}", "method=qlora4", "data=commands", "--json").stdout)
    rows = rows["rows"] if isinstance(rows, dict) else rows
    cheapest = min((row for row in rows if row["fits"] and row["usd"] is not None), key=lambda row: row["usd"])
    note = note_of(*words)
    assert note.startswith(f"where=runpod: hw={spec.hw.name} (${spec.hw.usd_per_hour:g} per GPU-hour, about $")
    assert "costs least; next " in note and note.endswith("hw=NAME takes another, hw=cpu a CPU")
    assert cheapest["hw"] in (spec.hw.name, note.split("next ")[1].split()[0])  # set-up and download weigh here, too


@pytest.mark.parametrize("place", ["where=runpod", "where=auto"])
@pytest.mark.parametrize(("bound", "has"), [("where.country=[SE]", "SE"), ("where.data_centers=[EU-SE-1]", "EU-SE-1")])
def test_hardware_is_chosen_of_what_the_place_has(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, place: str, bound: str, has: str
) -> None:
    """For this test Sweden has H100s alone."""
    words = (place, "model=llama2_7b", "method=lora", "where.max_hours=2", "train.max_steps=500")
    anywhere = spec_of(*words)
    everything = Api.gpus

    def only(self: Api, **more: Any) -> list[GpuType]:
        return [
            gpu
            if "H100" in gpu.id
            else replace(gpu, data_centers={c: s for c, s in gpu.data_centers.items() if c != HERE})
            for gpu in everything(self, **more)
        ]

    monkeypatch.setattr(Api, "gpus", only)
    spec = spec_of(*words, bound)
    assert "H100" not in str(anywhere.hw.runpod_gpu_id) and str(spec.hw.runpod_gpu_id).startswith("NVIDIA H100")
    assert f"costs least of what {has} has; next " in note_of(*words, bound)
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert spec_of(*words, bound).hw == spec_of(*words).hw and "is not known: RUNPOD_API_KEY" in note_of(*words, bound)


def test_a_place_that_runpod_does_not_have_is_refused_while_planning(emulator: Emulator) -> None:
    for word, said in (("where.country=DE", "no GPU in DE"), ("where.data_centers=[EU-SE-7]", "did you mean EU-SE-1?")):
        result = runner("plan", "where=runpod", "model=llama2_7b", "method=lora", word)
        assert result.exit_code == 2 and said in " ".join(result.output.split())


@pytest.mark.parametrize("place", ["where=runpod", "where=auto"])
def test_the_note_names_the_sum_of_the_plan_disks_included(place: str) -> None:
    words = (place, "model=llama2_7b", "method=full", "train.max_steps=2000", "where.max_usd=500")
    planned = json.loads(runner("plan", *words, "--json").stdout)
    note = next(note for note in planned["notes"] if note.startswith("where="))
    assert planned["usd"] > round(planned["usd_per_hour"] * planned["hours"], 2)
    assert f"about ${planned['usd']:.2f} and {duration(3600 * planned['hours'])}) costs least" in note


def test_a_cpu_is_rented_where_it_is_written() -> None:
    assert spec_of("where=runpod", "hw=cpu").hw.accelerator == "cpu"
    assert spec_of("where=runpod", "hw.num_gpus=0").hw.accelerator == "cpu"


def test_the_number_of_gpus_and_their_types_narrow_the_choice() -> None:
    two = spec_of("where=runpod", "model=llama2_7b", "hw.num_gpus=2")
    assert two.hw.num_gpus == 2 and two.hw.accelerator == "cuda"
    assert spec_of("where=runpod", "where.gpu_types=[NVIDIA L4]").hw.name == "l4"
    unpriced = ("where=runpod", "where.gpu_types=[NVIDIA GeForce RTX 3090]")
    assert spec_of(*unpriced).hw.name == "rtx3090" and "hw=rtx3090 is the first that is named" in note_of(*unpriced)


def test_what_no_hardware_holds_is_refused_and_not_rented() -> None:
    with pytest.raises(CannotRunError, match="which hardware to rent is not known") as error:
        spec_of("where=runpod", "model=llama2_70b", "method=full", "deepspeed=none")
    assert "hw=h100" in str(error.value.problems[0].remedy)


def test_rules_of_hardware_are_those_of_the_hardware_that_is_chosen() -> None:
    for place in ("where=runpod", "where=auto"):
        spec = spec_of(place, "model=llama3_2_1b", "method=full", "train.optimizer=adamw_8bit")
        assert spec.where.name == "runpod" and spec.hw.accelerator == "cuda"


def test_among_equals_the_list_by_model_size_decides() -> None:
    spec = with_facts(spec_of("model=llama2_7b", "method=lora"))
    options = stage_search(spec)
    assert options is not None
    a40 = next(hw for hw in hardware() if hw.name == "a40")
    twin = HardwareSpec.model_validate({**a40.model_dump(), "name": "twin", "runpod_gpu_id": "NVIDIA RTX A6000"})
    assert [offer.hw.name for offer in offers(spec, options, [a40, twin], 1000)] == ["a40", "twin"]
    preferred = ["NVIDIA RTX A6000"]
    assert [offer.hw.name for offer in offers(spec, options, [a40, twin], 1000, preferred)] == ["twin", "a40"]


# ── where=auto ──────────────────────────────────────────────────────────────────────────────────


def test_auto_is_here_where_it_fits_and_ends_in_time() -> None:
    assert spec_of("where=auto").where.name == "local"
    assert note_of("where=auto").startswith("where=auto: here, where it fits and takes ")


def test_auto_rents_what_would_take_days_here() -> None:
    words = (*LORA_7B, "data=guanaco", BIG)
    spec = spec_of(*words)
    assert spec.where.name == "runpod" and spec.hw.accelerator == "cuda" and spec.hw.memory_gib != 64
    note = note_of(*words)
    assert "more than where.max_hours_here=24; rented, hw=" in note and "; next " in note
    assert spec_of(*words, "where.max_hours_here=10000").where.name == "local"


def test_auto_rents_for_the_hours_that_are_allowed() -> None:
    spec = spec_of("where=auto", "where.max_hours=1", "model=llama3_2_3b", "method=lora", BIG, "train.max_steps=2000")
    assert spec.where.name == "runpod" and spec.where.max_hours == 1
    result = runner(
        "plan", "where=auto", "where.max_hours=1", "model=llama3_2_3b", "method=lora", BIG, "train.max_steps=2000"
    )
    assert result.exit_code == 0, result.output


def test_auto_stays_here_where_a_pod_would_cost_more_than_allowed() -> None:
    words = (*LORA_7B, "data=guanaco", BIG, "where.max_usd=0.1")
    assert spec_of(*words).where.name == "local"
    assert "costs more than where.max_usd" in note_of(*words)


def test_auto_accepts_what_a_pod_accepts_and_uses_it_if_it_rents() -> None:
    own = (
        "where.cloud=community", "where.spot=true", "where.bid_usd=0.2", "where.data_centers=[EU-RO-1]",
        "where.keep=true", "where.max_usd=9", "where.image=unsloth",
    )  # fmt: skip
    assert spec_of("where=auto", *own).where.name == "local"
    place = spec_of("where=auto", "model=mistral7b", "method=full", *own).where
    assert isinstance(place, RunPodPlace)
    assert (place.cloud, place.spot, place.bid_usd, place.keep) == ("community", True, 0.2, True)
    assert place.data_centers == ["EU-RO-1"] and place.max_usd == 9 and place.image == "unsloth"
    assert place.volume_gb != "auto"
    refused = runner("plan", "where=auto", "where.volume=a", "where.cloud=community")
    assert refused.exit_code == 2 and "where.cloud=secure" in refused.output
