"""Which machines are asked for, in which order, and everything that is refused before one is."""

from __future__ import annotations

from typing import Any

import pytest

from runner.cloud.budget import Meter, deadline_of, stopped_usd_per_day
from runner.cloud.rent_pod import find_offers
from runner.cloud.runpod import offers
from runner.cloud.runpod.catalog import gpus_by_model_size, image_of
from runner.cloud.runpod.json_types import CpuType, GpuType, Volume
from runner.cloud.runpod.offers import candidates, cpu_candidates, runpod_place
from runner.cloud.runpod.runpod_provider import RunPod
from runner.cloud.runpod.volumes import usd_per_month
from runner.config.pod_packages import runpod_table
from runner.errors import RunnerError
from runner.spec import RunPodPlace
from tests.support.emulated import Emulator
from tests.support.front import spec_of
from tests.support.rented import A6000, PLAN, RTX4090, rented_spec

pytestmark = pytest.mark.usefixtures("state")

A100, A100_SXM = "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"
H100 = "NVIDIA H100 80GB HBM3"


def gpu(gpu_id: str, memory: int, secure: float | None, community: float | None = None, most: int = 8) -> GpuType:
    name = gpu_id.removeprefix("NVIDIA ").removeprefix("GeForce ")  # as RunPod's catalogue has it
    return GpuType(gpu_id, name, memory, secure, community, most, most, None)


GPUS = [
    gpu(RTX4090, 24, 0.74, 0.34), gpu(A6000, 48, 0.49, 0.33), gpu(A100, 80, 1.39, 1.19), gpu(A100_SXM, 80, 1.59, 1.39),
    gpu(H100, 80, 3.29, 2.69), gpu("NVIDIA H100 PCIe", 80, 2.89, 1.99), gpu("NVIDIA H100 NVL", 94, 3.19, 2.59, 4),
]  # fmt: skip


def names(*words: str, plan: dict[str, Any] = PLAN, volume: Volume | None = None) -> list[str]:
    return [str(c.gpu_id) for c in candidates(rented_spec(*words), plan, GPUS, volume)]


def test_the_hardware_that_was_planned_for_comes_first_then_the_lists_of_the_seeds() -> None:
    assert names("where.max_usd=20") == [RTX4090, A6000, A100]
    assert names() == [RTX4090, A6000]  # without a cap, none that costs over half more than was agreed to
    thirteen = ("model=llama2_13b", "hw=a100", "where.max_usd=20")
    assert names(*thirteen) == [A100_SXM, A100]  # an A6000 has less memory than the plan counts on
    assert gpus_by_model_size(70_000_000_000) == ["NVIDIA H100 PCIe", H100, "NVIDIA H100 NVL"]


def test_named_gpus_are_taken_as_they_are_and_data_centres_in_their_order() -> None:
    assert names(f"where.gpu_types=[{A100},{RTX4090}]") == [A100, RTX4090]
    spec = rented_spec("where.data_centers=[EU-RO-1,US-KS-2]", "hw=h100x3", "where.max_usd=50")
    found = candidates(spec, PLAN, GPUS, None)
    assert [(c.gpu_id, c.data_centers) for c in found[:3]] == [
        (H100, ("EU-RO-1",)), (H100, ("US-KS-2",)), (A100, ("EU-RO-1",)),
    ]  # fmt: skip
    assert found[0].gpu_count == 3 and found[0].usd_per_hour == pytest.approx(9.87)
    assert "3 × NVIDIA H100 80GB HBM3 in EU-RO-1 (secure cloud, $9.87 an hour)" in found[0].described
    volume = Volume("v1", "data", 100, "EU-RO-1", "STANDARD")
    assert {c.data_centers for c in candidates(rented_spec(), PLAN, GPUS, volume)} == {("EU-RO-1",)}


def test_a_cpu_pod_has_a_power_of_two_of_cores() -> None:
    flavours = [CpuType("cpu3c", "Compute", 2, 32, 0.03, 2.0)]
    (found,) = cpu_candidates(rented_spec("hw=cpu", "hw.num_cpus=5"), flavours, None)
    assert (found.cpu_id, found.num_vcpus, found.usd_per_hour) == ("cpu3c", 8, 0.24)
    with pytest.raises(RunnerError, match="no CPU flavour cpu9"):
        cpu_candidates(rented_spec("hw=cpu", "where.cpu_type=cpu9"), flavours, None)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["where.gpu_types=[NVIDIA RTX 4090]"], 2, f"did you mean {RTX4090!r}"),
        (["hw=t4"], 2, "where.gpu_types="),
        (["where.max_usd=0.3"], 3, "raise where.max_usd"),
        (["hw=h100x8", "where.gpu_types=[NVIDIA H100 NVL]"], 3, "at most 4"),
        (["where.cloud=community", "where.gpu_types=[NVIDIA L4]"], 3, "not in the community cloud"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_remedy(words: list[str], code: int, says: str) -> None:
    with pytest.raises(RunnerError) as error:
        candidates(rented_spec(*words), PLAN, [*GPUS, gpu("NVIDIA L4", 24, 0.49)], None)
    (problem,) = error.value.problems
    assert error.value.exit_code == code and says in f"{problem.what} → {problem.remedy}" and problem.remedy


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["where.volume=nowhere"], 2, "there is no network volume nowhere"),
        (["where.volume=data", "where.data_centers=[US-KS-2]"], 2, "write where.data_centers=[EU-RO-1]"),
        (["where.data_centers=[EU-RO-9]"], 2, "did you mean EU-RO-1?"),
        (["hw=h100", "hw.num_nodes=2"], 2, "rents one machine"),
    ],
)
def test_before_any_pod(emulator: Emulator, words: list[str], code: int, says: str) -> None:
    RunPod().create_volume("data", 50, "EU-RO-1")
    with pytest.raises(RunnerError) as error:
        find_offers(RunPod(), rented_spec(*words), PLAN)
    (problem,) = error.value.problems
    assert error.value.exit_code == code and says in f"{problem.what} → {problem.remedy}"
    assert emulator.pods() == {} and not any(e.method == "POST" and e.path == "/v2/pods" for e in emulator.exchanges)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["where.country=us"], [("US-KS-2", "US-TX-3")]),
        (["where.country=[us,ca]"], [("CA-MTL-3", "US-KS-2", "US-TX-3")]),
        (["where.country=US", "where.data_centers=[US-TX-3,US-KS-2]"], [("US-TX-3",), ("US-KS-2",)]),
        (["where.country=US", "where.spot=true", "where.bid_usd=0.5"], [("US-KS-2",), ("US-TX-3",)]),
        (["where.country=RO", "where.volume=data"], [("EU-RO-1",)]),
        (["where.country=SE", "where.cloud=community"], [("EU-SE-1",)]),
        (["where.country=null"], [()]),
    ],
)
def test_a_country_is_its_data_centres_by_the_catalogue(
    emulator: Emulator, words: list[str], expected: list[tuple[str, ...]]
) -> None:
    RunPod().create_volume("data", 50, "EU-RO-1")
    machines = find_offers(RunPod(), rented_spec(f"where.gpu_types=[{RTX4090}]", *words), PLAN)
    assert [machine.data_centers for machine in machines] == expected
    cpu = find_offers(RunPod(), rented_spec("hw=cpu", "where.country=CA"), PLAN)
    assert [machine.data_centers for machine in cpu] == [("CA-MTL-3",)]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["where.country=DE"], 2, "no GPU in DE in its secure cloud → it has data centres in CA, RO, SE, US"),
        (["where.country=[US,DE]"], 2, "no GPU in DE"),
        (
            ["where.country=[SE,CA]", "hw=b200"], 3,
            "no data centre in SE or CA has 1 × NVIDIA B200 → take what is there (hw=…, where.gpu_types), or another "
            "country: python -m runner gpus --country SE --country CA",
        ),
        (["where.country=US", "where.volume=data"], 2, "volume data is in EU-RO-1, which is not in US → leave out"),
        (["where.country=US", "where.data_centers=[EU-SE-1]"], 2, "where RunPod has US-KS-2, US-TX-3 → leave out"),
    ],
)  # fmt: skip
def test_a_country_that_cannot_be_is_refused_before_renting(
    emulator: Emulator, words: list[str], code: int, says: str
) -> None:
    RunPod().create_volume("data", 50, "EU-RO-1")
    with pytest.raises(RunnerError) as error:
        find_offers(RunPod(), rented_spec(*words), PLAN)
    (problem,) = error.value.problems
    assert error.value.exit_code == code and says in f"{problem.what} → {problem.remedy}"


def test_a_template_is_named_by_id_or_name(emulator: Emulator) -> None:
    assert offers.find_template(RunPod(), "RunPod PyTorch 2.8.0") == "runpod-torch-v280"
    find_offers(RunPod(), rented_spec("where.template=runpod-torch-v280"), PLAN)
    for word, says in (("runpod-vllm", "for serverless workers"), ("runpod pytorch 2.9", "did you mean runpod-torch")):
        with pytest.raises(RunnerError) as error:
            find_offers(RunPod(), rented_spec(f"where.template={word}"), PLAN)
        (problem,) = error.value.problems
        assert error.value.exit_code == 2 and says in f"{problem.what} → {problem.remedy}"


def test_without_ssh_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    spec = rented_spec()
    monkeypatch.setenv("PATH", "/nowhere")
    before = len(emulator.exchanges)
    with pytest.raises(RunnerError, match="ssh") as error:
        find_offers(RunPod(), spec, PLAN)
    assert error.value.exit_code == 3 and "apt-get install" in str(error.value.problems[0].remedy)
    assert len(emulator.exchanges) == before


# ── what a rented run is resolved to ───────────────────────────────────────────────────────────


def test_nothing_is_left_open_in_a_resolved_run() -> None:
    place = runpod_place(rented_spec())
    assert isinstance(place.volume_gb, int) and place.volume_gb > 30
    assert place.container_disk_gb == 20 and isinstance(place.deadline_hours, float)
    assert runpod_place(rented_spec("where.max_hours=2")).deadline_hours == 2.0
    assert runpod_place(rented_spec("where.max_hours=1e300")).deadline_hours == 8784.0
    assert runpod_place(rented_spec("where.volume_gb=77", "where.deadline_hours=9")).volume_gb == 77
    away = spec_of("where=auto", "model=mistral7b", "method=full").where
    assert isinstance(away, RunPodPlace) and away.volume_gb != "auto"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["where.spot=true"], "where.bid_usd"),
        (["where.bid_usd=0.3"], "where.spot=true"),
        (["where.volume=a", "where.cloud=community"], "where.cloud=secure"),
        (["where.volume_gb=0"], "more than 0"),
        (["where.country=Germany"], "'Germany' is no country code of two letters → write where.country=US, or [SE,RO]"),
        (["where.country=false"], "a bare NO is false in YAML → write where.country=NO when typed"),
    ],
)
def test_places_that_cannot_be(words: list[str], says: str) -> None:
    with pytest.raises(RunnerError) as error:
        rented_spec(*words)
    (problem,) = error.value.problems
    assert says in f"{problem.what} → {problem.remedy}" and "{" not in problem.what


def test_images_by_name() -> None:
    assert image_of(runpod_place(rented_spec("where.image=axolotl"))).startswith("axolotlai/")
    assert image_of(runpod_place(rented_spec("where.image=my/own:1"))) == "my/own:1"
    assert image_of(runpod_place(rented_spec())) == image_of(runpod_place(rented_spec("where.image=pytorch")))
    assert image_of(runpod_place(rented_spec())) == runpod_table("images")["pytorch"]["image"]


# ── money ──────────────────────────────────────────────────────────────────────────────────────


def test_a_pod_ends_at_its_deadline_or_its_cap_whichever_comes_first() -> None:
    place = runpod_place(rented_spec("where.deadline_hours=3", "where.max_usd=2"))
    assert deadline_of(place, Meter(1.0, 1000.0, cap_usd=2.0)) == 1000.0 + 2 * 3600
    assert deadline_of(place, Meter(0.1, 1000.0, cap_usd=2.0)) == 1000.0 + 3 * 3600
    assert deadline_of(place, Meter(1.0, 1000.0, cap_usd=2.0, before_usd=1.5)) == 1000.0 + 1800
    assert deadline_of(place, Meter(1.0, 1000.0)) == 1000.0 + 3 * 3600


def test_the_meter_counts_time_disks_and_earlier_pods_and_warns_once_a_mark() -> None:
    meter = Meter(1.0, 1000.0, disk_gb=73.0, cap_usd=2.0, before_usd=0.5)
    assert meter.rate == pytest.approx(1.01)
    assert meter.usd(1000.0 + 1800) == pytest.approx(0.5 + 0.505)
    assert meter.ends() == pytest.approx(1000.0 + 1.5 / 1.01 * 3600)
    said = [meter.warning(1000.0 + minutes * 60) for minutes in (0, 30, 31, 70, 71, 90, 91)]
    assert [text is not None for text in said] == [False, True, False, True, False, True, False]
    assert "the pod is ended" in str(said[5])
    assert Meter(1.0, 0.0).ends() is None and Meter(1.0, 0.0).warning(1e9) is None
    assert Meter(0.0, 0.0, cap_usd=5.0).ends() is None  # a price that is not known
    assert stopped_usd_per_day(730) == pytest.approx(4.8) and usd_per_month(1100) == 75.0
