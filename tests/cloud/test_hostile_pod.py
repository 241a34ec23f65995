"""A pod is a stranger's machine: what it sends is written as plain files, below the run directory, and nowhere else."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from runner.cli import pod_verbs, remote_verbs
from runner.cloud import download, fleet, payload, remote_run
from runner.cloud.agent import tail
from runner.cloud.follow import Display, Follower
from runner.cloud.ssh import RunnerError
from runner.cloud.transfer import PodRunFolder
from runner.errors import Problem, RequestError, RunFailedError
from runner.hub.upload import S3, push_model
from runner.report.text import print_problems, without_control_sequences
from runner.rundir import checkpoints, plain_files
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.support.emulated import needs_sshd
from tests.support.front import runner, spec_of
from tests.support.sshd import Server, server


class Pod:
    """A run's folder in a pod whose owner is an enemy, and the run directory here, with a secret beside it."""

    def __init__(self, root: Path, there: Server) -> None:
        self.folder, self.outside = root / "workspace" / "runs" / "run-h", root / "outside"
        self.run, self.spec = RunDir(root / "here" / "runs" / "run-h"), spec()
        for folder in (self.folder / "model", self.folder / "logs", self.outside, self.run.path / "logs"):
            folder.mkdir(parents=True)
        (self.outside / "secret").write_text("owner's")
        (self.folder / "model" / "config.json").write_text("{}")
        (self.folder / "agent.py").write_text("")
        self.run.write("spec.json", self.spec.model_dump(mode="json"))
        self.at, self.told = PodRunFolder(there.connection(), str(root / "workspace"), "run-h"), list[str]()
        self.before = self.run.spec_file.read_bytes()

    def bring(self) -> dict[str, Any]:
        return download.download_run(self.at, self.run, self.spec, self.told.append)

    def check(self) -> None:
        """What must hold whatever the pod does."""
        assert [file.name for file in self.outside.iterdir()] == ["secret"]
        assert (self.outside / "secret").read_text() == "owner's"
        assert self.run.spec_file.read_bytes() == self.before
        for path, folders, files in os.walk(self.run.path):
            for name in (*folders, *files):
                mode = Path(path, name).lstat().st_mode
                assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), name
        assert not (self.run.path / download.ARRIVED).exists()


def spec() -> RunSpec:
    return spec_of("where=runpod", "model=mistral7b", "method=qlora4", "hw=rtx4090")


@pytest.fixture
def pod(tmp_path: Path, laptop: None, here: Path) -> Iterator[Pod]:
    with server(tmp_path / "sshd") as there:
        found = Pod(tmp_path, there)
        yield found
        found.at.connection.close()


def sealed(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    checkpoints.seal(folder, {"step": 4})
    return folder


@needs_sshd
def test_links_and_devices_stay_there_and_are_named(pod: Pod) -> None:
    (pod.folder / "model" / "tokenizer.model").symlink_to("/etc/shadow")
    (pod.folder / "model" / "inner").symlink_to(pod.outside)
    (pod.folder / "tensorboard").symlink_to(pod.outside)
    os.mkfifo(pod.folder / "logs" / "pipe.log")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(pod.folder / "s"))
    (pod.folder / "summary.json").symlink_to(pod.outside / "secret")
    pod.bring()
    pod.check()
    assert (pod.run.path / "model" / "config.json").read_text() == "{}"
    assert not (pod.run.path / "summary.json").exists() and not (pod.run.path / "model" / "tokenizer.model").exists()
    said = "\n".join(pod.told)
    assert "model/tokenizer.model" in said and "no plain file of the run" in said


@needs_sshd
def test_a_link_in_a_checkpoint_and_a_false_tail_write_nothing_outside(pod: Pod) -> None:
    folder = sealed(pod.folder / "checkpoints" / "checkpoint-4", weights="w")
    (folder / "x").symlink_to(pod.outside)
    pod.bring()
    lines = [
        {"file": f"checkpoints/checkpoint-4/{name}", "at": 0, "data": "eA=="} for name in ("x/authorized_keys", "y")
    ]
    (pod.folder / "tail.py").write_text(
        f"import sys; sys.stdin.readline(); print({chr(10).join(map(json.dumps, lines))!r})"
    )
    follower = Follower(pod.at, pod.run, lambda: None)
    list(follower._connected())
    follower._hang_up()
    pod.check()
    assert checkpoints.complete(pod.run) == [4]
    assert not (pod.run.path / "checkpoints" / "checkpoint-4" / "y").exists()


@needs_sshd
@pytest.mark.parametrize("name", [
    "spec.json", "status.json", "../../evil", "/etc/evil", "a/../../../evil", "logs/../../../evil.log", "logs//e.log",
    "logs/" + "x" * 5000 + ".log", "logs/a\nb.log", "logs/\x1b[2J.log", "model/config.json", "pod.json", ".arrived/x",
    "tensorboard/../events.1", "logs/link/e.log", "logs/link.log", "logs/pipe.log", "logs/folder.log", "", ".", "logs",
])  # fmt: skip
def test_only_the_files_that_are_followed_are_written_and_through_no_link(pod: Pod, name: str) -> None:
    logs = pod.run.path / "logs"
    (logs / "link").symlink_to(pod.outside)
    (logs / "link.log").symlink_to(pod.outside / "secret")
    (logs / "folder.log").mkdir()
    os.mkfifo(logs / "pipe.log")
    before = sorted(pod.run.path.rglob("*"))
    follower = Follower(pod.at, pod.run, lambda: None)
    for line in ({"file": name, "at": 0, "data": "eA=="}, {"whole": name, "data": "eA=="}):
        assert list(follower._take(json.dumps(line).encode())) == []
    assert sorted(pod.run.path.rglob("*")) == before
    for file in ("link", "link.log", "pipe.log"):
        (logs / file).unlink()
    pod.check()


@needs_sshd
def test_what_is_followed_is_written(pod: Pod) -> None:
    follower = Follower(pod.at, pod.run, lambda: None)
    for name in ("metrics.jsonl", "logs/worker.log", "tensorboard/events.1", "tensorboard/a/b/events.1"):
        list(follower._take(json.dumps({"file": name, "at": 0, "data": "eA=="}).encode()))
        assert (pod.run.path / name).read_text() == "x"
    for name in ("summary.json", "logs/rank0.json"):
        list(follower._take(json.dumps({"whole": name, "data": "e30="}).encode()))
        assert (pod.run.path / name).read_text() == "{}"


@needs_sshd
def test_lines_of_no_shape_are_passed_over(pod: Pod) -> None:
    follower = Follower(pod.at, pod.run, lambda: None)
    whole = [
        "Welcome!", "[]", "3", "null", '{"file": 3}', '{"file": "metrics.jsonl"}', '{"checkpoints": ["x"]}', "[" * 9999,
        '{"checkpoints": 7}', '{"file": "metrics.jsonl", "at": 99, "data": "eA=="}', "\xff",
        '{"file": "metrics.jsonl", "at": -1, "data": "eA=="}', '{"file": "metrics.jsonl", "at": 1e400, "data": "eA=="}',
        '{"whole": "agent-status.json", "data": "W10="}', '{"whole": "status.json", "data": "eA=="}',
    ]  # fmt: skip
    for line in whole:
        assert list(follower._take(line.encode("latin-1"))) == [], line
    assert not (pod.run.path / "metrics.jsonl").exists() or (pod.run.path / "metrics.jsonl").stat().st_size == 0


@needs_sshd
def test_words_of_a_pod_do_not_command_the_terminal(pod: Pod) -> None:
    follower = Follower(pod.at, pod.run, lambda: None)
    words = "\x1b]52;c;ZXZpbA==\x07\x1b[31mred\x1b[0m\ttab\x1b[2J\x9b2J\r\n".encode()
    line = {"file": "logs/worker.log", "at": 0, "data": base64.b64encode(words).decode()}
    (news,) = follower._take(json.dumps(line).encode())
    assert news.value == "red\ttab2J" and without_control_sequences("grün 你好\n") == "grün 你好\n"


def test_what_a_pod_says_of_itself_commands_the_terminal_neither_in_errors_nor_in_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A status' message, the last words of a command in the pod, `logs`, `pods logs` and `status`."""
    evil, console = "\x1b]52;c;ZXZpbA==\x07\x1b[2Jred", Console(record=True, file=io.StringIO())
    print_problems(console, RunFailedError(Problem(evil, evil, evil)))
    Display(console).say(evil)
    monkeypatch.setattr(remote_run, "logs", lambda *_: [evil])
    monkeypatch.setattr(remote_run, "status", lambda *_: {"message": evil})
    monkeypatch.setattr(fleet, "find_pod", lambda *_: ("", "pod1", "run-1"))
    monkeypatch.setattr(pod_verbs, "_ready", lambda run: (SimpleNamespace(logs=lambda *_, **__: [evil]), None))
    typed = [CliRunner().invoke(verb, ["run-1"]) for verb in (remote_verbs.logs, remote_verbs.status, pod_verbs.logs)]
    said = [console.file.getvalue(), *(done.output for done in typed)]  # type: ignore[attr-defined]  # a StringIO
    assert all("red" in text and not re.search(r"[\x07\x1b]", text) for text in said), said


@needs_sshd
def test_files_that_are_ours_are_not_overwritten_even_by_an_rsync_that_cheats(pod: Pod, tmp_path: Path) -> None:
    (pod.folder / "spec.json").write_text('{"model": 7}')
    (pod.folder / "status.json").write_text("[1]")
    (pod.folder / "bad\nname").write_text("x")
    for name in ("checkpoint-x", "checkpoint-99999999999999999999", "other"):
        (pod.folder / "checkpoints" / name).mkdir(parents=True)
        (pod.folder / "checkpoints" / name / "COMPLETE").write_text("{}")
    pod.bring()
    pod.check()
    assert any("bad\\nname" in line for line in pod.told)
    assert not list(pod.run.path.glob("bad*")) and checkpoints.complete(pod.run) == []
    (pod.folder / "model" / "x").symlink_to(pod.outside)
    cheat = tmp_path / "cheat"
    cheat.write_text(f'#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in rsync*) exec rsync --server --sender -lLrtDe.LsfxC . '
                     f'{pod.folder}/;; esac\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')  # fmt: skip
    cheat.chmod(0o755)
    with server(tmp_path / "cheating", str(cheat)) as there:
        at = PodRunFolder(there.connection(), pod.at.workspace, "run-h")
        with pytest.raises(RunnerError):
            download.download_run(at, pod.run, pod.spec, pod.told.append)
        at.connection.close()
    for file in (pod.run.path / download.ARRIVED).rglob("*"):
        assert not file.is_symlink()
    pod.bring()
    pod.check()


def test_what_arrived_with_a_link_on_its_way_goes_nowhere(tmp_path: Path, laptop: None, here: Path) -> None:
    run, outside = RunDir(tmp_path / "run"), tmp_path / "outside"
    for folder in (run.path / download.ARRIVED / "model", outside):
        folder.mkdir(parents=True)
    (run.path / download.ARRIVED / "model" / "weights").write_text("w")
    (run.path / download.ARRIVED / "spec.json").write_text("evil")
    (run.path / "model").symlink_to(outside)
    told: list[str] = []
    download._take(run, [], {}, told.append)
    assert not list(outside.iterdir()) and not (run.path / "spec.json").exists()
    assert "model/weights" in told[0]


@pytest.mark.parametrize("verb", ["push", "merge", "chat", "export", "eval"])
def test_a_model_with_a_link_is_not_read_or_uploaded(verb: str, tmp_path: Path, laptop: None, here: Path) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    (run.path / "model" / "deep").mkdir(parents=True)
    run.write("spec.json", spec().model_dump(mode="json"))
    (run.path / "model" / "deep" / "tokenizer.model").symlink_to("/etc/shadow")
    more = {"push": ["org/name"], "chat": ["--prompt", "x"]}.get(verb, [])
    result = runner(verb, str(run.path), *more)
    assert result.exit_code == 2, result.output
    assert "tokenizer.model is a link to /etc/shadow, where only plain files belong" in " ".join(result.output.split())


def test_a_model_of_a_run_is_sent_to_a_pod_without_what_its_links_lead_to(
    tmp_path: Path, laptop: None, here: Path
) -> None:
    run, stray = tmp_path / "runs" / "r", tmp_path / "cache" / "model"
    for folder in (run / "model", run / "checkpoints" / "checkpoint-4", stray):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").symlink_to(__file__)
    (run / "spec.json").write_text("{}")
    for folder in (run / "model", run / "checkpoints" / "checkpoint-4"):
        with pytest.raises(RequestError, match=r"tokenizer\.model is a link to .*, where only plain files belong"):
            payload._payload_item("model.id", str(folder))
    found = payload._payload_item("model.id", str(stray))  # of the Hub's cache, for one, which is all links
    assert found is not None and found.files == ("tokenizer.model",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_what_a_checkpoint_has_pickled_is_not_run(name: str, tmp_path: Path) -> None:
    """transformers reads all three with `weights_only`; this holds it to that."""
    torch = pytest.importorskip("torch")
    from transformers import Trainer, TrainingArguments

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    arguments = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    trainer = Trainer(torch.nn.Linear(1, 1), arguments)
    trainer.create_optimizer_and_scheduler(1)
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    torch.save({"x": Evil()}, tmp_path / name)
    read = trainer._load_rng_state if name.startswith("rng") else trainer._load_optimizer_and_scheduler
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read(str(tmp_path))
    assert not (tmp_path / "evil").exists()


def test_an_upload_refuses_links_too(tmp_path: Path, laptop: None, here: Path) -> None:
    run, target = RunDir(tmp_path / "run"), S3("s3://nowhere/x")
    (run.path / "model").mkdir(parents=True)
    (run.path / "loss.png").symlink_to("/etc/passwd")
    with pytest.raises(RequestError, match=r"loss\.png is a link to /etc/passwd"):
        push_model(run, spec(), run.path / "model", target)
    (run.path / "loss.png").unlink()
    (run.path / "model").rmdir()
    (run.path / "model").symlink_to("/etc")
    with pytest.raises(RequestError, match="is a link to /etc,"):
        push_model(run, spec(), run.path / "model", target)
    assert plain_files.special_files(run.path / "nothing") == []


def test_a_checkpoint_with_a_link_is_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    sealed(checkpoints.folder(run, 4), weights="w")
    later = sealed(checkpoints.folder(run, 8), weights="w", optimizer="o")
    (later / "rng_state.pth").symlink_to("/dev/zero")
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 4
    assert "rng_state.pth is a link" in said[0]
    (later / "rng_state.pth").unlink()
    assert checkpoints.newest(run) == 8
    marker = json.loads((later / "COMPLETE").read_text())
    marker["files"]["../../../../../../../dev/zero"] = {"size": 0, "sha256": ""}
    (later / "COMPLETE").write_text(json.dumps(marker))
    assert checkpoints.newest(run) == 4


def test_a_run_is_found_as_long_as_its_files_are_plain(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "r")
    (run.path / "model").mkdir(parents=True)
    run.write("spec.json", {})
    assert RunDir.find(run.path).path == run.path
    assert tail.WHOLE and tail.GROWING
