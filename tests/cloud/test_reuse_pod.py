"""A pod that is there already is taken by one run at a time, and only where it has what the run wants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cli.options import request_of
from runner.cloud import reuse_pod
from runner.cloud.ledger import NOBODY, Ledger
from runner.cloud.provider import PodRequest
from runner.cloud.reconcile import reconcile
from runner.cloud.rent_pod import acquire
from runner.cloud.runpod.runpod_provider import RunPod
from runner.errors import RequestError
from runner.resolve.steps import resolved
from runner.rundir.directory import RunDir
from tests.support.emulated import IMAGE, Emulator
from tests.support.front import only_problem
from tests.support.rented import KEY, PLAN, RTX4090, rented_spec, run_of

WORDS = ("where.setup_minutes=0.2", "where.bad_host_minutes=0.02", "where.volume_gb=20")


@pytest.fixture
def run(state: Path, here: Path, hello: None, tmp_path: Path) -> RunDir:
    return run_of(rented_spec(*WORDS), tmp_path / "runs")


def stopped(run: RunDir, status: str) -> str:
    """Its pod, kept after a run that ended so."""
    rented = acquire(run, rented_spec(*WORDS, "where.keep=true"), PLAN, KEY, print)
    rented.release(keep=True)
    run.set_status(status)
    return rented.pod.id


def found(*words: str) -> reuse_pod.ReusablePod:
    return reuse_pod.find_named(RunPod(), Ledger(), rented_spec(*WORDS, *words))


def test_a_stopped_pod_is_found_by_its_id_and_by_its_run(emulator: Emulator, run: RunDir) -> None:
    pod = stopped(run, "done")
    assert found(f"where.pod={pod}").pod.id == found(f"where.pod={run.id}").pod.id == pod


@pytest.mark.parametrize(
    ("status", "words", "said"),
    [
        ("training", (), r"has what is newest of .*, which is not here"),
        ("done", ("hw=h100",), r"has 1 × NVIDIA GeForce RTX 4090, and the run needs 1 × NVIDIA H100"),
        ("done", ("hw=rtx4090x2",), r"the run needs 2 × NVIDIA GeForce RTX 4090"),
    ],
)
def test_a_pod_with_a_result_that_is_not_home_or_other_gpus_is_refused(
    emulator: Emulator, run: RunDir, status: str, words: tuple[str, ...], said: str
) -> None:
    pod = stopped(run, status)
    with pytest.raises(RequestError, match=said):
        found(f"where.pod={pod}", *words)


def test_a_pod_of_another_run_or_machine_or_project_is_refused(emulator: Emulator, run: RunDir) -> None:
    rented = acquire(run, rented_spec(*WORDS), PLAN, KEY, print)
    rented.mark("RUNNING")
    with pytest.raises(RequestError, match=f"{run.id} is in pod {rented.pod.id}"):
        found(f"where.pod={rented.pod.id}")
    for name, said in (("runner-a-0001", "was rented from another machine"), ("theirs", "this project has no pod")):
        other = RunPod().create_pod(PodRequest(name, IMAGE, "secure", gpu_id=RTX4090)).id
        with pytest.raises(RequestError, match=said):
            found(f"where.pod={other}")


def test_a_run_that_names_no_hardware_is_planned_for_what_the_pod_has(
    emulator: Emulator, run: RunDir, tmp_path: Path
) -> None:
    def pod_of(*words: str) -> str:
        spec = rented_spec(*WORDS, "where.keep=true", "where.max_usd=90", *words)
        rented = acquire(done := run_of(spec, tmp_path / "more"), spec, PLAN, KEY, print)
        rented.release(keep=True)
        done.set_status("done")
        return rented.pod.id

    def planned(pod: str, *words: str) -> Any:
        return resolved(
            request_of(("where=runpod", f"where.pod={pod}", "model=mistral7b", "method=qlora4", *words), ())
        )

    spec, notes = planned(two := pod_of("hw=h100", "hw.num_gpus=2"))
    assert (spec.hw.runpod_gpu_id, spec.hw.num_gpus) == ("NVIDIA H100 80GB HBM3", 2)
    assert f"where.pod={two}: it has 2 × NVIDIA H100 80GB HBM3 (hw=h100)" in notes
    assert reuse_pod.find_named(RunPod(), Ledger(), spec).pod.id == two
    assert planned(pod_of("hw=rtx4090x2"))[0].hw.name == "rtx4090x2"
    cpu = planned(pod_of("hw=cpu", "hw.num_cpus=4"))[0].hw
    assert (cpu.accelerator, cpu.num_cpus) == ("cpu", 4)
    strange = pod_of("hw=l4", "where.gpu_types=[NVIDIA RTX A5000]")
    with pytest.raises(RequestError, match="has 1 × NVIDIA RTX A5000, of which conf/hw has no profile"):
        planned(strange)
    assert planned(strange, "hw=l4", "where.gpu_types=[NVIDIA RTX A5000]")[0].hw.name == "l4"
    with pytest.raises(RequestError, match="this project has no pod nowhere"):
        planned("nowhere")


def test_one_of_two_that_take_a_pod_gets_it(emulator: Emulator, run: RunDir, tmp_path: Path) -> None:
    pod = stopped(run, "done")
    ledger, (entry,) = Ledger(), Ledger().entries()
    words: dict[str, Any] = {"run_dir": str(tmp_path / "x"), "heartbeat_s": None}
    assert ledger.hand_over(entry.name, "runner-a-0001", run_id="a", **words) is not None
    assert ledger.hand_over(entry.name, "runner-b-0001", run_id="b", **words) is None
    assert [e.pod_id for e in ledger.entries()] == [pod]


def test_a_launcher_that_dies_as_it_takes_a_pod_leaves_it_stopped(
    emulator: Emulator, run: RunDir, tmp_path: Path
) -> None:
    pod = stopped(run, "done")
    ledger, (entry,) = Ledger(), Ledger().entries()
    ledger.hand_over(entry.name, "runner-b-0001", run_id="b", run_dir=str(tmp_path / "b"), heartbeat_s=None)
    RunPod().start(pod)
    ledger.set("runner-b-0001", **NOBODY)  # and then the launcher was killed
    (note,) = reconcile(RunPod(), ledger)
    assert f"pod {pod} of run b is stopped" in note
    assert [(e.state, e.run_id) for e in ledger.entries()] == [("STOPPED", "b")]
    assert {p.id: p.status for p in emulator.pods().values()} == {pod: "EXITED"}


def test_what_a_pod_has_already_cannot_be_asked_of_it(here: Path) -> None:
    problem = only_problem("where=runpod", "hw=rtx4090", "where.pod=x", "where.volume=data")
    assert problem.remedy == "leave out where.volume"
    assert rented_spec("where.pod=x").where.keeps and not rented_spec("where.pod=x", "where.keep=false").where.keeps


def test_a_pod_that_starts_at_another_price_ends_where_that_reaches_the_cap(
    emulator: Emulator, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(run, "interrupted")
    ready = reuse_pod.wait_until_ready
    monkeypatch.setattr(reuse_pod, "wait_until_ready", lambda *a, **kw: replace(ready(*a, **kw), usd_per_hour=100.0))
    rented = acquire(run, rented_spec(*WORDS, "where.max_usd=50"), PLAN, KEY, print)
    assert rented.deadline == rented.meter.ends() < rented.meter.started + 1800  # half an hour of $100, less the disk
    entry = Ledger().entry(rented.name)
    assert entry is not None and entry.deadline == pytest.approx(rented.deadline) and entry.usd_per_hour == 100
    rented.release()
