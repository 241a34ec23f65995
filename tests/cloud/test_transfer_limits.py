"""A pod that sends without end fills neither the disk nor the memory of whoever rents it."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cloud import download, ssh, untrusted_files
from runner.cloud.follow import TOO_MUCH, Follower
from runner.cloud.ssh import CommandError
from runner.cloud.transfer import PodRunFolder
from runner.cloud.untrusted_files import TooMuchError
from runner.rundir.directory import RunDir
from tests.cloud.test_hostile_pod import Pod, pod, sealed
from tests.support.emulated import needs_sshd
from tests.support.sshd import server

__all__ = ["pod"]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


@needs_sshd
def test_a_model_that_this_disk_has_no_room_for_is_refused_before_it_is_written(pod: Pod) -> None:
    os.truncate(os.open(pod.folder / "model" / "weights", os.O_CREAT | os.O_RDWR), 1 << 43)
    with pytest.raises(TooMuchError, match=r"the pod has 8,796\.1 GB to send, and there is room for .* GB here"):
        pod.bring()
    assert size_of(pod.run.path) < 1e5 and not (pod.run.path / download.ARRIVED).exists()
    (pod.folder / "model" / "weights").unlink()
    pod.bring()
    pod.check()


@needs_sshd
def test_a_run_is_not_larger_than_its_plan_allows(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "MORE_BYTES", 0)
    pod.run.write("plan.json", {"disk_gib": 0.001})
    (pod.folder / "model" / "weights").write_bytes(bytes(5_000_000))
    over = r"5\.0 MB to send, more than a run of this plan can hold \(4\.3 MB\)"
    with pytest.raises(TooMuchError, match=over) as refused:
        pod.bring()
    assert size_of(pod.run.path) < 1e5
    remedy = str(refused.value.problems[0].remedy)
    assert f"pods ssh {pod.run.id}," in remedy and f"pods terminate {pod.run.id} gives the pod up" in remedy
    pod.run.write("plan.json", {"disk_gib": 0.01})
    pod.bring()
    assert (pod.run.path / "model" / "weights").stat().st_size == 5_000_000


@needs_sshd
def test_a_checkpoint_is_held_to_the_same(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "max_bytes", lambda run: 1000)
    sealed(pod.folder / "checkpoints" / "checkpoint-4", weights="w" * 5000)
    with pytest.raises(TooMuchError):
        download.download_checkpoint(pod.at, pod.run, 4)
    assert size_of(pod.run.path / "checkpoints") == 0


@needs_sshd
def test_a_pod_that_says_little_and_sends_much_is_cut_off(
    pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted_files, "max_bytes", lambda run: 1_000_000)
    cheat, weights = tmp_path / "cheat", pod.folder / "model" / "weights"
    weights.write_bytes(bytes(100))
    cheat.write_text(
        f'#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in rsync*) [ -e {tmp_path}/asked ] && truncate -s 20G {weights};'
        f' touch {tmp_path}/asked;; esac\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    cheat.chmod(0o755)
    with server(tmp_path / "cheating", str(cheat)) as there:
        at = PodRunFolder(there.connection(), pod.at.workspace, "run-h")
        with pytest.raises(TooMuchError, match="the pod sends more than it announced"):
            download.download_run(at, pod.run, pod.spec, pod.told.append)
        at.connection.close()
    assert size_of(pod.run.path) < 1e5 and not (pod.run.path / download.ARRIVED).exists()


@needs_sshd
def test_complaints_without_end_stop_no_transfer(pod: Pod, tmp_path: Path) -> None:
    cheat = tmp_path / "cheat"
    cheat.write_text(
        '#!/bin/sh\ncase "$SSH_ORIGINAL_COMMAND" in rsync*) yes evil | head -c 3000000 >&2;; esac\n'
        'exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    cheat.chmod(0o755)
    with server(tmp_path / "cheating", str(cheat)) as there:
        download.download_run(PodRunFolder(there.connection(), pod.at.workspace, "run-h"), pod.run, pod.spec)
    pod.check()


@needs_sshd
def test_an_answer_without_end_is_no_answer(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "MAX_OUTPUT_BYTES", 1 << 20)
    with pytest.raises(CommandError, match="the pod says more than 1 MiB"):
        pod.at.connection.run("yes")
    assert pod.at.connection.run("head -c 1000 /dev/zero; yes | head -c 3000000 >&2", check=False)[:3] == "\0\0\0"
    assert pod.at.connection.run("cat", stdin=b"x" * 500_000) == "x" * 500_000


@needs_sshd
def test_logs_without_end_are_copied_so_far_and_no_further(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted_files, "FOLLOWED_BYTES", 10_000)
    monkeypatch.setattr(untrusted_files, "FOLLOWED_FILES", 20)
    follower, block, told = Follower(pod.at, pod.run, lambda: None), b"\n" * 3000, []
    lines = [{"file": f"logs/{name}.log", "at": 0, "data": base64.b64encode(block).decode()} for name in range(8)]
    lines += [{"file": f"logs/empty{name}.log", "at": 0, "data": ""} for name in range(100)]
    lines += [{"whole": "summary.json", "data": base64.b64encode(bytes(20_000)).decode()}]
    lines += [{"file": "logs/0.log", "at": 0, "data": ""}, {"whole": "summary.json", "data": "e30="}]
    for line in lines:
        told += [news.value for news in follower._take(json.dumps(line).encode())]
    assert told == [TOO_MUCH]
    logs = list((pod.run.path / "logs").iterdir())
    assert sum(file.stat().st_size for file in logs) == 6000 and len(logs) == 20
    assert not (pod.run.path / "summary.json").exists()  # a 21st file


@needs_sshd
def test_a_disk_without_room_hides_neither_where_the_run_stands_nor_that_it_is_over(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher whose disk filled up while its pod was armed followed a training that was done, until the deadline."""
    monkeypatch.setattr(untrusted_files, "free_bytes", lambda folder: 0)
    follower, said = Follower(pod.at, pod.run, lambda: None), {"state": "done", "exit_code": 0}
    data = base64.b64encode(json.dumps(said).encode()).decode()
    names = ("status.json", "agent-status.json")
    told = [news for name in names for news in follower._take(json.dumps({"whole": name, "data": data}).encode())]
    assert [(news.kind, news.value) for news in told] == [("words", TOO_MUCH), ("status", said), ("agent", said)]
    assert not (pod.run.path / "agent-status.json").exists()


def test_the_last_of_a_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    for total, left, expected in ((100 << 30, 10 << 30, 9 << 30), (2 << 30, 1 << 30, (1 << 30) - (2 << 30) // 20),
                                  (100 << 30, 1 << 20, 0)):  # fmt: skip
        facts = SimpleNamespace(total=total, free=left)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, facts=facts: facts)
        assert untrusted_files.free_bytes(tmp_path / "not" / "there") == expected
        assert untrusted_files.max_bytes(RunDir(tmp_path)) == expected


def test_a_run_has_so_many_files_and_no_more(tmp_path: Path) -> None:
    untrusted_files.check_size(10, untrusted_files.MOST_FILES, 10, tmp_path)
    with pytest.raises(TooMuchError, match="200,001 files to send: no run has so many"):
        untrusted_files.check_size(10, untrusted_files.MOST_FILES + 1, 10, tmp_path)


@pytest.mark.parametrize("planned", [0, -5, 1e300, float("nan"), "many", None, [1]])
def test_a_plan_that_says_nothing_of_disks_leaves_the_room_that_there_is(tmp_path: Path, planned: object) -> None:
    run = RunDir(tmp_path)
    run.write("plan.json", {"disk_gib": planned})
    assert untrusted_files.max_bytes(run) == pytest.approx(untrusted_files.free_bytes(tmp_path), rel=0.05)


def test_of_complaints_the_end_is_kept() -> None:
    text = ssh.StderrTail(io.BytesIO(b"x" * 5_000_000 + b"at last")).text()
    assert len(text) <= 16 * 4096 and text.endswith("at last")


@needs_sshd
def test_a_full_disk_here_ends_no_training_there(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by benchmarks/chaos_pods.py: the launcher gave the pod back, with the only copy of what it had trained."""
    follower, told = Follower(pod.at, pod.run, lambda: None), []
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(untrusted_files, "write_at", raising(full))
    monkeypatch.setattr(untrusted_files, "write_whole", raising(full))
    status = base64.b64encode(b'{"state": "done"}').decode()
    for line in (
        {"file": "metrics.jsonl", "at": 0, "data": "e30K"},
        {"whole": "agent-status.json", "data": status},
    ) * 2:
        told += list(follower._take(json.dumps(line).encode()))
    assert [news.kind for news in told] == ["words", "agent", "agent"]
    assert "No space left on device; the run continues" in told[0].value and told[1].value == {"state": "done"}


@needs_sshd
def test_what_was_brought_is_on_the_disk_before_the_pod_may_end(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses power, or a disk that breaks down, has the names of files otherwise, and no content."""
    synced, real = set[Path](), os.fsync

    def fsync(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    sealed(pod.folder / "checkpoints" / "checkpoint-4", weights="w")
    monkeypatch.setattr(os, "fsync", fsync)
    pod.bring()
    model, step = pod.run.path / "model", pod.run.path / "checkpoints" / "checkpoint-4"
    assert {pod.run.path, model, model / "config.json", step / "weights", step / "COMPLETE"} <= synced
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        pod.bring()
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.EINVAL, "a file system without fsync")))
    pod.bring()
    pod.check()


def raising(error: OSError) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call
