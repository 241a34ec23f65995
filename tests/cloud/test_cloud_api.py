"""The API adapter against an emulated RunPod, through the official SDK: what an answer means, and what is repeated."""

from __future__ import annotations

import threading
import time

import pytest

from runner.cloud.provider import PodRequest
from runner.cloud.provider_errors import (
    ApiDownError,
    NoBalanceError,
    NoCapacityError,
    NoKeyError,
    RefusedError,
    UnclearError,
    WrongKeyError,
)
from runner.cloud.runpod.api import _said
from runner.cloud.runpod.runpod_provider import RunPod
from tests.support.emulated import IMAGE, Emulator
from tests.support.rented import creates

L4 = "NVIDIA L4"


def wanted(name: str = "runner-a-0001", **more: object) -> PodRequest:
    return PodRequest(name, IMAGE, "secure", gpu_id=L4, **more)


def test_a_pod_is_created_read_listed_and_ended(emulator: Emulator) -> None:
    api = RunPod()
    made = api.create_pod(wanted(volume_gb=12, env={"A": "1"}))
    assert (made.name, made.cloud, made.gpu_id, made.usd_per_hour) == ("runner-a-0001", "secure", L4, 0.49)
    assert made.env["A"] == "1" and made.volume_gb == 12
    assert [pod.id for pod in api.pods()] == [made.id]
    api.terminate(made.id)
    api.terminate(made.id)  # one that is gone is no error
    assert api.pod(made.id) is None and api.pods() == []


def test_a_list_is_read_to_its_last_page(emulator: Emulator) -> None:
    emulator.world.settings.page_size = 2
    api = RunPod()
    made = {api.create_pod(wanted(f"runner-a-{i}")).id for i in range(5)}
    assert {pod.id for pod in api.pods()} == made


def test_no_key_and_a_wrong_one_are_told_apart_and_neither_means_gone(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = RunPod().create_pod(wanted())
    emulator.inject("answer", on="get", status=401)
    with pytest.raises(WrongKeyError, match="RUNPOD_API_KEY"):
        RunPod().pod(pod.id)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_wrong")
    with pytest.raises(WrongKeyError) as error:
        RunPod().pods()
    assert error.value.exit_code == 2 and "console.runpod.io" in str(error.value.problems[0].remedy)
    monkeypatch.delenv("RUNPOD_API_KEY")
    with pytest.raises(NoKeyError):
        RunPod()


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_read_is_repeated_and_a_create_never(emulator: Emulator, status: int) -> None:
    api = RunPod()
    emulator.inject("answer", on="list", status=status, times=2)
    assert api.pods() == []
    emulator.inject("answer", on="create", status=status, times=5)
    with pytest.raises(UnclearError, match="whether it was carried out is not known"):
        api.create_pod(wanted())
    assert creates(emulator) == 1


def test_a_lost_answer_to_a_create_is_unclear_and_the_pod_is_there(emulator: Emulator) -> None:
    emulator.inject("lost", on="create")
    with pytest.raises(UnclearError):
        RunPod().create_pod(wanted())
    assert creates(emulator) == 1 and len(emulator.pods()) == 1


def test_reads_end_when_nobody_answers(emulator: Emulator) -> None:
    emulator.inject("answer", on="get", status=502, times=0)
    with pytest.raises(ApiDownError, match="502"):
        RunPod().pod("nowhere")  # a page of HTML is not RunPod's word that there is none
    emulator.clear()
    emulator.inject("answer", on="get", status=404, times=0, detail="Not Found")
    assert RunPod().pod("nowhere") is None


def test_being_asked_too_often_waits_as_long_as_it_is_told(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep, here = time.sleep, threading.current_thread()

    def pause(seconds: float) -> None:  # threads that earlier tests have left sleep as before
        slept.append(seconds) if threading.current_thread() is here else sleep(seconds)

    monkeypatch.setattr("runner.cloud.runpod.transport.time.sleep", pause)
    emulator.inject("answer", on="list", status=429, retry_after=7)
    assert RunPod().pods() == [] and slept == [7.0]
    emulator.inject("answer", on="create", status=429, retry_after=3)
    assert RunPod().create_pod(wanted()).id  # RunPod itself said that it did nothing
    assert slept == [7.0, 3.0] and len(emulator.pods()) == 1


def test_no_capacity_no_balance_and_a_mistake_are_told_apart(emulator: Emulator) -> None:
    api = RunPod()
    emulator.inject("no_capacity", gpu=L4)
    with pytest.raises(NoCapacityError):
        api.create_pod(wanted())
    with pytest.raises(RefusedError, match="not found"):
        api.create_pod(PodRequest("runner-a", IMAGE, "secure", gpu_id="NVIDIA H9000"))
    emulator.world.settings.balance_usd = 0.0
    with pytest.raises(NoBalanceError) as error:
        api.create_pod(wanted())
    assert error.value.exit_code == 3 and "billing" in str(error.value.problems[0].remedy)
    assert emulator.pods() == {}


@pytest.mark.parametrize(
    "said",
    [
        "There are no longer any instances available with the requested specifications.",
        "There are no instances currently available",
        "not enough free GPUs on the host machine",
        "There are no longer any instances available with enough disk space",
        "This machine does not have the resources to deploy your pod",
    ],
)
def test_every_known_wording_of_no_capacity(emulator: Emulator, said: str) -> None:
    emulator.inject("no_capacity", detail=said)
    with pytest.raises(NoCapacityError):
        RunPod().create_pod(wanted())


def test_the_address_may_end_with_v2(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", f"{emulator.url}/v2/")
    assert RunPod().pods() == [] and len(RunPod().gpus()) > 10


def test_catalogue_volumes_and_stock(emulator: Emulator) -> None:
    api = RunPod()
    gpus = {gpu.id: gpu for gpu in api.gpus(stock=True, cloud="secure")}
    assert gpus[L4].memory_gb == 24 and gpus[L4].usd("secure") == 0.49 and gpus[L4].usd("community") is None
    assert gpus[L4].stock == "HIGH"
    volume = api.create_volume("data", 50, "EU-RO-1")
    assert [(v.id, v.size_gb, v.data_center) for v in api.volumes()] == [(volume.id, 50, "EU-RO-1")]
    api.delete_volume(volume.id)
    assert api.volumes() == []


def test_spot_is_rented_by_a_bid_and_read_over_rest(emulator: Emulator) -> None:
    pod = RunPod().create_pod(wanted(bid_usd=0.4))
    assert pod.usd_per_hour == 0.4 and list(emulator.pods()) == [pod.id]
    with pytest.raises(NoCapacityError):
        RunPod().create_pod(wanted("runner-a-0002", bid_usd=0.01))


@pytest.mark.parametrize("pagination", [[], ["x"], "next", 7, True])
def test_a_list_whose_pages_are_not_as_described_is_whole_or_an_error(
    monkeypatch: pytest.MonkeyPatch, pagination: object
) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_x")
    monkeypatch.setattr("runner.cloud.runpod.api.request", lambda *_, **__: {"pods": [], "pagination": pagination})
    if not pagination:
        assert RunPod().pods() == []
        return
    with pytest.raises(ApiDownError, match="GET /v2/pods: its pages are not as described"):
        RunPod().pods()


@pytest.mark.parametrize(("data", "line"), [
    ('{"line": "pulls"}', "pulls"), ("pulls the image", "pulls the image"), ("[1, 2]", "[1, 2]"), ("7", "7"),
    ('{"line": "cut o', '{"line": "cut o'), ("[" * 20_000, "[" * 20_000), ('{"other": 1}', ""), ("", ""),
])  # fmt: skip
def test_a_line_of_a_log_that_is_no_json_is_shown_as_it_is(data: str, line: str) -> None:
    assert _said(data) == line


@pytest.mark.parametrize("bid", [None, 0.4])
def test_a_host_that_cannot_start_the_image_is_not_rented(bid: float | None, emulator: Emulator) -> None:
    """The emulated machines serve CUDA 12.6 to 13.0."""
    with pytest.raises(NoCapacityError):
        RunPod().create_pod(PodRequest("runner-a-1", "runpod/pytorch:1-cu1320", "secure", gpu_id=L4, bid_usd=bid))
    assert emulator.pods() == {}
