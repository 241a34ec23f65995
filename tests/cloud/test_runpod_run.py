"""A run on a rented pod, whole: official SDK, emulated RunPod, real sshd and rsync, a real training, and home."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_pods import LAUNCHER, pods_python
from benchmarks.pod_training import MODEL
from runner.cloud.ledger import Ledger
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.conftest import SHORT
from tests.support.emulated import Emulator, needs_sshd, rest
from tests.support.hub import Hub
from tests.support.leaks import Watch
from tests.support.processes import ROOT, losses, only_run, start, until, words
from tests.support.rented import creates, rented_spec

pytestmark = [needs_sshd, pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync: apt-get install rsync")]
SECRETS = {"HF_TOKEN": "hf_" + "sEcReT" * 5, "WANDB_API_KEY": "w4ndb" * 8}


class Typed:
    """What a user types on a machine whose state is the test's own."""

    def __init__(self, root: Path, model: Path, emulator: Emulator) -> None:
        self.root, self.model, self.emulator = root, model, emulator
        self.env = {
            **emulator.env, **SECRETS, "RUNNER_STATE": str(root / "state"), "RUNNER_POD_PYTHON": sys.executable,
            "RUNNER_CLOUD_PACE": "0.1",
        }  # fmt: skip

    def run(self, *more: str, yes: bool = True) -> subprocess.Popen[str]:
        own = words(self.model, self.root / "runs", "where=runpod", "hw.num_cpus=1", *more)
        return start(*own, *["--yes"] * yes, **self.env)

    def verb(self, *words: str) -> subprocess.Popen[str]:
        return start(*words, **self.env)

    @property
    def path(self) -> Path:
        return until(lambda: only_run(self.root / "runs"))

    @property
    def folder(self) -> RunDir:
        return RunDir(self.path)

    def steps(self) -> int:
        return len(list(self.folder.metrics()))


@pytest.fixture
def typed(tmp_path: Path, model: Path, emulator: Emulator) -> Typed:
    return Typed(tmp_path, model, emulator)


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 300) -> str:
    """What a command has said that ends with that exit code."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, out + err
    return out + err


@pytest.mark.slow
def test_the_whole_way(typed: Typed) -> None:
    """With tokens that were prepared here: there is nothing to tokenise in the pod."""
    typed.env["RUNNER_CACHE"] = str(typed.root / "cache")
    own = words(typed.model, typed.root / "runs", "data.max_eval_examples=4")
    said = ended(typed.verb("data", "prepare", *own))
    assert "from the cache" not in said, said
    typed.env |= {name: secret + uuid.uuid4().hex for name, secret in SECRETS.items()}  # no other test's processes
    hidden = [*(typed.env[name] for name in SECRETS), typed.emulator.key]
    places = [typed.root / name for name in ("runs", "state", "emulator", "cache")]
    with Watch(hidden, places, typed.root / "state" / "keys") as watch:
        process = typed.run("train.save_every_steps=6", "where.max_usd=5")
        until(lambda: typed.steps() > 0, 240)
        assert process.poll() is None  # the metrics came while it ran
        assert len(watch.hidden()) > len(hidden)  # there is an SSH key
        said = ended(process)
        watch.look("output", said)
        for e in typed.emulator.exchanges:
            watch.look(e.path, f"{e.path} {e.query} {e.body} {e.answer}")
    assert any("runner.launcher.on_pod" in words for words in watch.arguments)  # it did see the pod's processes
    assert any(words.startswith("ssh ") for words in watch.arguments) and watch.looks > 20
    assert not watch.found
    run = typed.folder
    assert typed.emulator.pods() == {}
    assert len(losses(run.path)) == 12 and run.state() == "done"
    summary = run.read("summary.json")
    assert summary["model_dir"] == str(run.path / "model")
    assert summary["cost"]["usd"] > 0 and summary["cost"]["predicted_hours"] > 0
    assert "Cost    $" in said and "gone, which was confirmed" in said
    assert said.count("Sends   tokens") == 2 and "(tokens from the cache)" in said
    adapter_loads(typed.model, run.path / "model")
    adapter = json.loads((run.path / "model" / "adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == str(typed.model)  # here, and not where it was in the pod


def adapter_loads(model: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)


GPU = "where.gpu_types=[NVIDIA L4]"
"""A GPU pod, which has a volume disk; the training in it takes the CPU."""
LONG = ("train.max_steps=100000", "train.save_every_steps=4", "train.keep_checkpoints=2")


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [True, False])
def test_an_install_that_fails_is_told_and_the_pod_is_gone(
    typed: Typed, isolated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the emulator has no right to make namespaces, and the workspace is elsewhere."""
    if not isolated:
        monkeypatch.setattr("runner.emulator.container.namespaces", lambda: False)
    typed.env["RUNNER_POD_PYTHON"] = "/usr/bin/false"
    said = ended(typed.run(), 1)
    assert "installing failed" in said
    assert "does not run in the pod" in (typed.path / "logs" / "install.log").read_text("utf-8")
    assert typed.emulator.pods() == {} and typed.folder.state() == "failed"


@pytest.mark.slow
def test_a_training_that_dies_brings_its_checkpoint_home(typed: Typed) -> None:
    process = typed.run(*LONG)
    until(lambda: typed.steps() >= 6, 240)
    for pid in workers(typed.folder.id):
        os.kill(pid, signal.SIGKILL)
    said, run = ended(process, 1), typed.folder
    assert run.state() == "failed"
    assert "SIGKILL" in said or "killed" in said
    assert checkpoints.newest(run) is not None and (run.path / "logs" / "rank0.log").is_file()
    assert run.read("status.json")["cost"]["usd"] > 0
    assert typed.emulator.pods() == {}


def workers(run_id: str) -> list[int]:
    """Processes that train, in whatever pod."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_text("utf-8", errors="replace")
        except OSError:
            continue
        if "runner.train\0" in text and f"{run_id}/spec.json" in text:
            found.append(int(file.parent.name))
    return found


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on_in_another_pod(typed: Typed) -> None:
    process = typed.run(*LONG)
    until(lambda: typed.steps() >= 3, 240)
    process.send_signal(signal.SIGINT)
    said = ended(process, 130)
    run = typed.folder
    step = checkpoints.newest(run)
    assert step and typed.emulator.pods() == {} and run.state() == "interrupted"
    said = ended(typed.verb("resume", str(run.path), f"train.max_steps={step + 4}", "--yes"))
    assert len(losses(run.path)) == step + 4 and f"Resumes after step {step}" in said


@pytest.mark.slow
def test_a_training_that_runs_into_its_cap_saves_comes_home_and_ends_its_pod_in_time(typed: Typed) -> None:
    """The cap is reached 170 s after the order; the launcher stops the training 90 s before."""
    bounds = ("where.max_usd=1", "where.deadline_hours=24", "where.setup_minutes=0.75")
    own = words(typed.model, typed.root / "runs", "where=runpod", "hw.num_cpus=1", *bounds, *LONG[1:], "--yes")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "170", *own, "train.max_steps=100000"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **typed.env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ledger = Ledger(typed.root / "state" / "ledger.db")
    deadline = until(lambda: [entry.deadline for entry in ledger.entries() if entry.deadline], 60)[0]
    said = ended(process, 130)
    assert "where.max_usd" in said and "resume" in said, said
    assert time.time() < deadline
    assert typed.emulator.pods() == {} and typed.folder.state() == "interrupted"
    assert checkpoints.newest(typed.folder)


@pytest.fixture
def slow_python() -> Iterator[Path]:
    """One that takes a minute to answer, in a folder that emulated pods see (their `/tmp` is their own)."""
    file = Path(sys.prefix) / "bin" / f"slow-python-{os.getpid()}"
    file.write_text("#!/bin/sh\nsleep 60\n")
    file.chmod(0o755)
    yield file
    file.unlink()


def test_ctrl_c_while_installing_is_an_interrupt(typed: Typed, slow_python: Path) -> None:
    typed.env["RUNNER_POD_PYTHON"] = str(slow_python)
    process = typed.run()
    until(lambda: typed.path.is_dir() and typed.folder.read("agent-status.json").get("state") == "installing", 120)
    process.send_signal(signal.SIGINT)
    said = ended(process, 130)
    assert "interrupted by you" in said and "where.max_usd" not in said
    assert typed.folder.state() == "interrupted" and typed.emulator.pods() == {}


@pytest.mark.slow
@pytest.mark.parametrize("volume", [False, True])
def test_a_pod_that_vanishes_is_replaced_and_the_run_goes_on(typed: Typed, volume: bool) -> None:
    """From the checkpoint that was copied here meanwhile, or from the network volume that both pods have."""
    more = []
    if volume:
        made = rest("POST", "/v2/network-volumes", json={"name": "mine", "size": 20, "dataCenter": "EU-RO-1"})
        more = [f"where.volume={made['id']}"]
    process = typed.run("train.max_steps=20", "train.save_every_steps=4", *more)
    until(lambda: typed.steps() >= 6 if volume else checkpoints.complete(typed.folder), 300)
    (first,) = typed.emulator.pods()
    typed.emulator.inject("vanish", pod=first)
    said = ended(process)
    assert "in its place" in said and "Resumes after step" in said and len(losses(typed.path)) == 20
    assert typed.emulator.pods() == {}
    assert typed.folder.read("summary.json")["cost"]["pod_id"] != first


@pytest.mark.slow
def test_a_restart_of_the_container_costs_no_result(typed: Typed) -> None:
    process = typed.run(GPU, "train.max_steps=20", "train.save_every_steps=4")
    until(lambda: checkpoints.complete(typed.folder), 240)
    (only,) = typed.emulator.pods()
    typed.emulator.inject("restart", pod=only)
    said = ended(process)
    assert len(losses(typed.path)) == 20 and "The connection is back" in said
    assert typed.folder.read("summary.json")["cost"]["pod_id"] == only
    assert typed.emulator.pods() == {}


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_a_stopped_pod_and_fetch_brings_the_run_home(typed: Typed) -> None:
    process = typed.run(GPU, *LONG, "where.heartbeat_minutes=0.1")
    until(lambda: typed.steps() >= 5, 240)
    run = typed.folder
    process.kill()
    process.communicate()
    until(lambda: [pod.status for pod in typed.emulator.pods().values()] == ["EXITED"], 120)
    ended(typed.verb("fetch", run.id, "--output-dir", str(typed.root / "runs")), 130)
    assert checkpoints.newest(run) and run.state() == "interrupted"
    assert typed.emulator.pods() == {}


@pytest.mark.slow
def test_a_pod_of_ones_own_that_is_stopped_under_a_run_is_not_ended_with_its_disk(typed: Typed) -> None:
    typed.env["RUNNER_POD_PYTHON"] = str(pods_python(ROOT / ".pytest_cache" / "pods-python"))
    up = ("pods", "up", GPU, "hw=cpu", "where.max_usd=5", "where.volume_gb=20", "--hours", "3", "--yes", "--json")
    made = json.loads(typed.verb(*up).communicate(timeout=120)[0])
    process = typed.run(GPU, "train.max_steps=100000", f"where.pod={made['pod_id']}")
    until(lambda: typed.steps() >= 5, 240)
    typed.emulator.inject("preempt", warning=False)
    said = ended(process, 1)
    assert "no other one is rented in its place" in said, said
    assert f"runner resume {typed.folder.path} where.pod=null rents one" in said
    assert {id: pod.status for id, pod in typed.emulator.pods().items()} == {made["pod_id"]: "EXITED"}, said


@pytest.mark.slow
@pytest.mark.parametrize("steps", [30, 100_000])
def test_a_pod_that_stopped_itself_while_its_launcher_was_suspended_is_not_ended_for_another_one(
    typed: Typed, steps: int, tmp_path: Path
) -> None:
    """Of a training that is over the result comes home from its disk, of another one the newest checkpoint."""
    typed.env["RUNNER_POD_PYTHON"] = str(pods_python(ROOT / ".pytest_cache" / "pods-python"))  # a pod has its own /tmp
    process = typed.run(GPU, f"train.max_steps={steps}", "where.heartbeat_minutes=0.1", "where.max_replacements=0")
    until(lambda: typed.steps() >= 5, 240)
    os.kill(process.pid, signal.SIGSTOP)
    until(lambda: [pod.status for pod in typed.emulator.pods().values()] == ["EXITED"], 120)
    (file,) = typed.root.glob("emulator/pods/*/volume/runs/*/metrics.jsonl")
    there = checkpoints.newest(RunDir(file.parent))
    os.kill(process.pid, signal.SIGCONT)
    said = ended(process, 0 if steps == 30 else 1)
    assert typed.emulator.pods() == {} and creates(typed.emulator) == 1, said
    if steps == 30:
        assert "failed" not in said and typed.folder.state() == "done", said
        assert (typed.path / MODEL).stat().st_size == 1_000_000
    else:
        assert "max_replacements" in said and checkpoints.newest(typed.folder) == there, said


@pytest.mark.slow
def test_a_detached_run_comes_home_to_another_machine_and_what_its_pod_says_does_nothing_there(typed: Typed) -> None:
    said = ended(typed.run(GPU, "--detach"))
    run = typed.folder
    there = f"emulator/pods/*/*/runs/{run.id}"
    until(lambda: [pod.status for pod in typed.emulator.pods().values()] == ["EXITED"], 240)
    (file,) = typed.root.glob(f"{there}/spec.json")
    told = json.loads(file.read_text())
    told["push"]["to"], told["hw"]["env"] = "evil/model", {"LD_PRELOAD": "/tmp/x.so"}
    told["data"] |= {"source": "file", "path": "/etc/passwd"}
    file.write_text(json.dumps(told))
    typed.env["RUNNER_STATE"] = str(typed.root / "other-state")
    said = ended(typed.verb("fetch", run.id, "--output-dir", str(typed.root / "other")))
    home = RunDir(typed.root / "other" / run.id)
    assert home.state() == "done" and (home.path / "model" / "README.md").is_file(), said
    kept = home.read("spec.json")
    assert kept["push"]["to"] is None and kept["hw"]["env"] == {} and kept["data"]["path"].startswith("/of-pod-")
    assert said.count("what a pod says is not acted on here") == 3 and "evil" not in said
    assert kept["run"]["output_dir"] == str(typed.root / "other") and typed.emulator.pods() == {}


@pytest.mark.slow
def test_a_run_whose_launcher_was_killed_is_not_resumed_beside_its_pod_but_attached_to(typed: Typed) -> None:
    process = typed.run(GPU, "train.max_steps=30", "train.save_every_steps=4")
    until(lambda: typed.steps() >= 1, 240)
    process.kill()
    process.communicate()
    (only,) = typed.emulator.pods()
    said = ended(typed.verb("resume", str(typed.path), "--yes"), 2)
    assert f"python -m runner attach {typed.folder.id}" in said, said
    assert list(typed.emulator.pods()) == [only]
    said = ended(typed.verb("attach", typed.folder.id, "--output-dir", str(typed.root / "runs")))
    assert len(losses(typed.path)) == 30, said
    assert typed.emulator.pods() == {}


@pytest.mark.slow
def test_a_kept_pod_goes_on_with_the_run_that_is_resumed(typed: Typed) -> None:
    said = ended(typed.run(GPU, "where.keep=true", "train.save_every_steps=6"))
    (only,) = typed.emulator.pods()
    said = ended(typed.verb("resume", str(typed.path), "train.max_steps=16", "where.keep=false", "--yes"))
    assert f"Starts  pod {only}" in said, said
    assert len(losses(typed.path)) == 16 and typed.folder.state() == "done"
    assert typed.emulator.pods() == {}
    assert creates(typed.emulator) == 1


@pytest.mark.slow
def test_a_pod_of_ones_own_takes_runs_one_after_the_other(typed: Typed) -> None:
    """From `pods up`: a run takes it and hands it back, and so do the resumed run and, in the pod that was stopped
    and started again, another one; the last run starts and ends it."""
    up = ("pods", "up", GPU, "hw=cpu", "where.max_usd=5", "where.volume_gb=20", "--hours", "3", "--yes", "--json")
    made = json.loads(typed.verb(*up).communicate(timeout=120)[0])
    (only,) = typed.emulator.pods()
    said = ended(typed.run(GPU, f"where.pod={only}", "train.save_every_steps=6", "where.max_usd=4"))
    assert f"takes pod {only} (running)" in said and "is yours again, until " in said, said
    first = typed.folder
    assert [pod.status for pod in typed.emulator.pods().values()] == ["RUNNING"] and len(losses(first.path)) == 12

    def row() -> dict[str, Any]:
        (found,) = json.loads(ended(typed.verb("pods", "--json")))
        return dict(found)

    mine = row()
    assert (mine["state"], mine["held"]) == ("RUNNING", False) and mine["run_id"].startswith(made["run_id"])
    assert mine["deadline"] == pytest.approx(made["deadline"], abs=2)
    said = ended(typed.verb("pods", "ssh", made["run_id"], "ls", f"/workspace/runs/{first.id}/agent.json"))
    assert "agent.json" in said  # by the id that it had, and a key that is let in
    said = ended(typed.verb("resume", str(first.path), "train.max_steps=16", "--yes"))
    assert f"Takes   pod {only} (running)" in said and "Sends   the checkpoint" not in said, said
    assert len(losses(first.path)) == 16 and "is yours again, until " in said
    ended(typed.verb("pods", "stop", only))
    ended(typed.verb("pods", "start", only, "--hours", "2", "--yes"))
    said = ended(typed.run(GPU, f"where.pod={only}", "run.name=third"))
    assert f"Takes   pod {only} (running)" in said and "is yours again, until " in said, said
    assert row()["state"] == "RUNNING" and row()["deadline"] < made["deadline"]
    ended(typed.verb("pods", "stop", only))
    more = (GPU, f"where.pod={only}", "where.keep=false", "run.name=second")
    said = ended(typed.run(*more))
    assert "ENDED, with its disk" in said and "is gone, which was confirmed" in said, said
    assert typed.emulator.pods() == {}
    assert creates(typed.emulator) == 1


@pytest.mark.slow
def test_detached_looked_at_and_brought_home_on_another_machine(typed: Typed, tmp_path: Path) -> None:
    said = ended(typed.run("--detach"))
    assert "attach" in said
    run = typed.folder
    assert len(typed.emulator.pods()) == 1
    typed.env["RUNNER_STATE"] = str(tmp_path / "another" / "state")
    said = ended(typed.verb("status", run.id, "--json"))
    assert json.loads(said)["agent"] in ("installing", "training", "done")
    follower = typed.verb("logs", run.id, "-f")
    assert follower.stdout is not None and "Loading torch" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    ended(follower, 130)
    there = RunDir(tmp_path / "another" / "runs" / run.id)
    said = ended(typed.verb("attach", run.id, "--output-dir", str(there.path.parent)))
    assert len(losses(there.path)) == 12 and there.state() == "done"
    adapter_loads(typed.model, there.path / "model")
    assert typed.emulator.pods() == {}


@pytest.mark.slow
def test_a_pod_uploads_checkpoints_and_the_model_itself(typed: Typed, hub: Hub) -> None:
    typed.env |= hub.env()
    more = ("push.to=me/tuned", "push.every_steps=6", "train.save_every_steps=6", "where.max_usd=5")
    said = ended(typed.run(*more))
    assert f"Pushed  {hub.url}/me/tuned" in said, said
    assert "checkpoints/checkpoint-12/COMPLETE" in hub.files and "adapter_model.safetensors" in hub.files
    assert not any("checkpoint-6/" in name for name in hub.files)
    told = ("spec.json", "README.md", "adapter_config.json", "summary.json")
    assert b"/workspace" not in b"".join(hub.files[name] for name in told)
    assert typed.folder.read("pushed.json")["repo"] == "me/tuned" and typed.folder.state() == "done"
    assert typed.emulator.pods() == {}


def test_a_detached_run_is_refused_where_its_pod_may_not_end_itself(typed: Typed) -> None:
    typed.emulator.inject("no_right", times=0)
    said = ended(typed.run("--detach"), 1)
    assert "the pod has no permission to end itself" in " ".join(said.split())
    assert typed.emulator.pods() == {} and typed.folder.state() == "failed"
    assert "Sends" not in said  # nothing was uploaded


def test_without_anybody_to_ask_nothing_is_rented(typed: Typed) -> None:
    said = ended(typed.run(yes=False), 2)
    assert "add --yes" in said and typed.emulator.pods() == {}


def test_a_run_whose_pod_is_gone_can_be_resumed(typed: Typed, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "run-1")
    run.path.mkdir(parents=True)
    run.write("spec.json", rented_spec().model_dump(mode="json"))
    run.set_status("training", host="runner-run-1-abcd", pid=None, born="another-boot:1")
    said = ended(typed.verb("resume", str(run.path)), 2)
    assert "is in a pod" in said and "attach run-1" in said
    said = ended(typed.verb("fetch", str(run.path)), 2)
    assert "RunPod has no pod of run run-1" in said
    assert run.state() == "failed"


@pytest.mark.slow
def test_the_demo_model_learns_on_a_rented_pod(typed: Typed) -> None:
    """The main job's model, out of the package that carries it."""
    own = ("where=runpod", "hw=cpu", f"run.output_dir={typed.root / 'runs'}", *SHORT, "eval.num_prompts=0", "--yes")
    ended(start(*own, **typed.env), seconds=1000)
    assert (typed.path / "model" / "adapter_model.safetensors").is_file() and typed.emulator.pods() == {}
