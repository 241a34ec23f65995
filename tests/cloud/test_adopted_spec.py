"""A run whose order is on another machine: what its pod says of it is data, and nothing of that acts here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud import adopted_spec, remote_run
from runner.cloud.ledger import Ledger
from runner.errors import RequestError
from runner.rundir.directory import RunDir
from runner.spec import RunPodPlace, RunSpec
from runner.spec.input_paths import named_places
from tests.support.emulated import needs_sshd
from tests.support.front import runner, spec_of
from tests.support.sshd import server

pytestmark = pytest.mark.usefixtures("state", "here")


def values(*words: str) -> dict[str, Any]:
    """A spec as a pod has it: its own place, its own paths."""
    spec = spec_of("model=mistral7b", "method=qlora4", "hw=rtx4090", "where=runpod", *words)
    found = spec.model_dump(mode="json")
    return {**found, "where": {"name": "local"}, "run": {**found["run"], "output_dir": "/workspace/runs"}}


def adopt(told: dict[str, Any], root: Path) -> adopted_spec.AdoptedSpec:
    return adopted_spec.adopt_spec(json.dumps(told), "p0d", None, root / "runs", "runpod")


def test_an_honest_spec_is_taken_as_it_is_but_for_the_place(here: Path) -> None:
    told = values("data=hub", "data.id=tatsu-lab/alpaca")
    found = adopt(told, here)
    assert found.changes == []
    kept = found.spec.model_dump(mode="json")
    assert {k: v for k, v in kept.items() if k not in ("where", "run")} == {
        k: v for k, v in told.items() if k not in ("where", "run")
    }
    assert isinstance(found.spec.where, RunPodPlace) and found.spec.run.output_dir == str(here / "runs")
    assert found.spec.hw.env == {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}  # of conf/hw/rtx4090.yaml


def file(**more: Any) -> dict[str, Any]:
    return {"data": {"source": "file", **more}}


def grpo(*rewards: str) -> dict[str, Any]:
    train = {"train.packing": False, "train.batch_size": 8, "train.micro_batch_size": 8, "train.accumulation_steps": 1}
    return {"objective": {"name": "grpo", "rewards": list(rewards)}, **train}


def pretrain(**more: Any) -> dict[str, Any]:
    return {"objective": {"name": "pretrain", **more}, **file(path="https://example.org/x.txt")}


SCRATCH = {"model.from_scratch": True, "method": {"name": "full"}}
EVIL = "runs/run-h/model/evil.py:reward"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a file of this machine": (file(path="secret.jsonl"), '"secret.jsonl'),
    "a file by its absolute path": (file(path="/etc/passwd"), "/etc"),
    "a file of the home folder": (file(path="~/.ssh/id_ed25519"), ".ssh"),
    "a glob": (file(path="/home/*/.ssh/*"), "/home"),
    "a URL of this machine": (file(path="file:///etc/passwd"), "/etc"),
    "a chain of URLs": (file(path="https://a/b::file:///etc/passwd"), "/etc"),
    "a way out of the pod's disk": (file(path="/workspace/../etc/passwd"), "/etc"),
    "a source among several": (file(sources=[{"path": "/etc/passwd"}]), "/etc"),
    "held-out rows": (file(path="/workspace/x.jsonl", eval_path="/etc/passwd"), "/etc"),
    "a data set that is a folder here": ({"data": {"source": "hub", "id": "own/folder"}}, "own/"),
    "a template": ({"data": {"source": "commands", "chat_template": "../../secret"}}, ".."),
    "a model that is a folder here": ({"model.id": "own/folder"}, "own/"),
    "a model by its path": ({"model.id": "/etc"}, '"/etc"'),
    "a package": ({"model.package": "antigravity"}, "antigravity"),
    "a reward function that it sends": (grpo(EVIL), "runs/run-h"),
    "a reward function of this machine": (grpo("/tmp/x.py:f", "exact_match"), "/tmp"),
    "a reward function by a detour": (grpo("/workspace/runs/../../x.py:f"), ".."),
    "a tokenizer": (
        {**pretrain(tokenizer="/etc/passwd"), "model.from_scratch": True, "method": {"name": "full"}},
        "/etc",
    ),
    "a workspace": (pretrain(experiment="x", root="/home"), "/home"),
    "variables": ({"hw.env": {"LD_PRELOAD": "/tmp/x.so", "PATH": "/tmp", "NCCL_NET_PLUGIN": "/tmp/x.so"}}, "/tmp"),
    "hosts": ({"hw.hostfile": "/etc/hosts"}, "/etc"),
    "a meeting place": ({"hw.rendezvous": "evil.example:29500"}, "evil"),
    "DeepSpeed's file": ({"deepspeed": {"name": "zero2", "config": "/etc/passwd"}}, "/etc"),
    "a disk": ({"deepspeed": {"name": "zero3_offload", "nvme_path": "/home"}}, "/home"),
    "an upload": ({"push.to": "s3://evil/x"}, "evil"),
    "a tracker": ({"track": {"name": "wandb", "project": "x", "entity": "evil"}}, "evil"),
    "a permission": ({"run.on_changed_inputs": "continue"}, "continue"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_act_here_is_left_out_and_named(kind: str, here: Path) -> None:
    (here / "own" / "folder").mkdir(parents=True)
    (here / "secret.jsonl").write_text("{}")
    change, word = HOSTILE[kind]
    found = adopt(changed(values(), change), here)
    assert len(found.changes) == 1
    kept = found.spec.model_dump(mode="json")
    assert word not in json.dumps({**kept, "run": {**kept["run"], "output_dir": ""}})
    for key, place in named_places(found.spec):
        assert not Path(place).exists(), key
    assert adopt(kept, here).changes == found.changes[:0]  # what is left is read again as it is


def changed(told: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    for key, value in change.items():
        *parents, leaf = key.split(".")
        part = told
        for parent in parents:
            part = part[parent]
        part[leaf] = value
    return told


def test_places_on_a_pods_disk_stay_unless_the_run_itself_lies_there(here: Path) -> None:
    told = values()
    told["data"] = {"source": "file", "path": "/workspace/datasets/0123456789abcdef/my.jsonl"}
    assert adopt(told, here).changes == []
    told = changed(values(), grpo("/workspace/p/runs/run-h/model/evil.py:f"))
    assert adopted_spec.adopt_spec(json.dumps(told), "p0d", None, Path("/workspace/p/runs"), "runpod").changes == [
        "objective.rewards.0 is /of-pod-p0d/evil.py:f"
    ]


ODD = ["", "[1]", "null", "[" * 100_000, "{", '{"model": 7}', '{"model": {"id": "' + "x" * (1 << 21) + '"}}', "\x00"]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_spec_of_no_shape_is_refused_in_one_line(text: str, here: Path) -> None:
    with pytest.raises(RequestError, match=r"has no spec of a run: its spec\.json is damaged"):
        adopted_spec.adopt_spec(text, "p0d", None, here / "runs", "runpod")


def test_of_a_plan_numbers_are_taken() -> None:
    text = '{"usd": "x", "hours": 2, "disk_gib": NaN, "usd_per_hour": 1e400, "host_ram_gib": true, "phases": [[]]}'
    assert adopted_spec.adopt_plan(text) == {"hours": 2}
    assert adopted_spec.adopt_plan("[" * 100_000) == {}


@needs_sshd
def test_a_hostile_pod_is_adopted_and_the_run_reads_nothing_of_this_machine(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = values()
    told = changed(told, grpo(EVIL))
    told["push"]["to"] = "evil/model"
    folder = tmp_path / "workspace" / "runs" / "run-h"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(told))
    (folder / "plan.json").write_text('{"usd": "\\u001b[2J", "phases": 7}')
    run, said = RunDir(here / "runs" / "run-h"), list[str]()
    with server(tmp_path / "sshd") as there:
        pod = SimpleNamespace(id="p0d", name="runner-run-h-0001", volume_id=None)
        monkeypatch.setattr(remote_run, "_connected", lambda *_: _Connected(there.connection(), tmp_path / "workspace"))
        rented = SimpleNamespace(pod=pod, ledger=Ledger(), name=pod.name, api=SimpleNamespace())
        remote_run._adopted_spec(rented, run, said.append)
    kept = RunSpec.model_validate(run.read("spec.json"))
    assert kept.objective.rewards == ["/of-pod-p0d/evil.py:reward"] and kept.push.to is None
    assert run.read("plan.json") == {} and len(said) == 2
    (run.path / "model").mkdir()
    (run.path / "model" / "evil.py").write_text("raise SystemExit('run')")  # as it is brought here
    result = runner("resume", str(run.path), "--yes")
    assert result.exit_code == 2 and "is not known here: /of-pod-p0d/evil.py" in " ".join(result.output.split())


class _Connected:
    def __init__(self, connection: Any, workspace: Path) -> None:
        self.connection, self.folder = connection, f"{workspace}/runs/run-h"

    def __enter__(self) -> _Connected:
        return self

    def __exit__(self, *error: object) -> None:
        self.connection.close()


def test_what_this_machine_ordered_is_taken_wherever_it_lies_and_never_replaced(here: Path, tmp_path: Path) -> None:
    ordered = RunDir(tmp_path / "elsewhere" / "run-o")
    ordered.path.mkdir(parents=True)
    spec = spec_of("model=mistral7b", "method=qlora4", "hw=rtx4090", "where=runpod", "train.max_steps=7")
    ordered.write_spec(spec)
    ledger, name = Ledger(), "runner-run-o-0001"
    ledger.plan(
        name, run_id="run-o", run_dir=str(ordered.path), gpu=None, cloud="secure", usd_per_hour=1.0, disk_gb=1.0,
        keep=False, volume=None, base="x", account="y", heartbeat_s=None,
    )  # fmt: skip
    rented: Any = SimpleNamespace(ledger=ledger, name=name)
    here_now = RunDir(here / "runs" / "run-o")
    assert remote_run._ordered_spec(here_now, rented) == spec
    assert RunSpec.model_validate(here_now.read("spec.json")) == spec
    here_now.spec_file.write_text("{")
    with pytest.raises(RequestError, match=r"runs/run-o/spec.json cannot be read: it is no spec of a run"):
        remote_run._ordered_spec(here_now, rented)
    assert here_now.spec_file.read_text() == "{"
