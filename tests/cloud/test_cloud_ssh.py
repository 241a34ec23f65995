"""The connection to a pod: nothing of the user's own, nothing in arguments, and errors that say what broke."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner.cloud import ssh, ssh_keys, transfer
from runner.cloud.runpod.account_key import api_key
from runner.cloud.runpod.api import Api
from runner.cloud.ssh import CommandError, HostKeyError, LostError
from runner.errors import CannotRunError, RequestError
from tests.support.emulated import needs_sshd
from tests.support.sshd import Server, server


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "sshd") as found:
        yield found


@needs_sshd
def test_commands_input_and_exit_codes(there: Server) -> None:
    link = there.connection()
    assert link.run("echo $((6*7))").strip() == "42"
    assert link.run("cat", stdin=b"over standard input") == "over standard input"
    assert link.attempt("exit 3")[0] == 3
    with pytest.raises(CommandError, match="no such thing"):
        link.run("echo no such thing >&2; exit 4")
    folder = link._folder
    assert link.known_hosts.read_text().startswith("pod1 ")
    link.close()
    assert not folder.exists()


@needs_sshd
def test_a_pod_that_moved_is_found_at_its_new_port(there: Server) -> None:
    link = there.connection()
    link.run("true")
    there.cut()
    with pytest.raises(LostError, match="cannot be reached"):
        link.run("true")
    there.new_host_key()
    there.start(there.port + 1)
    link.moved("127.0.0.1", there.port)
    assert link.run("echo here").strip() == "here"
    link.close()


@needs_sshd
def test_another_host_at_the_same_address_is_not_trusted(there: Server) -> None:
    link = there.connection()
    link.run("true")
    there.cut()
    there.new_host_key()
    there.start()
    with pytest.raises(LostError):
        link.run("true")
    link.close()


@needs_sshd
def test_a_host_key_that_has_changed_since_an_earlier_login_is_refused_before_anything_is_sent(there: Server) -> None:
    first = there.connection()
    first.run("true")
    first.close()  # and days later, in another process:
    there.cut()
    there.new_host_key()
    there.start()
    heard, later = there.root / "heard", there.connection()
    with pytest.raises(HostKeyError) as caught:
        later.run(f"cat > {heard}", stdin=b"a secret")
    assert not heard.exists()
    with pytest.raises(HostKeyError):
        later.put([there.root / "key.pub"], f"{heard}/")
    (problem,) = caught.value.problems
    assert f"pod1 at 127.0.0.1:{there.port} shows another host key" in problem.what
    assert str(problem.remedy).endswith(f"rm {later.known_hosts}")
    subprocess.run(str(problem.remedy).rpartition(": ")[2], shell=True, check=True)
    assert later.run("echo here").strip() == "here"
    later.close()


@needs_sshd
def test_any_folders_of_state_and_temporary_files_will_do(there: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a long folder " * 6, "with 100%h and 'quotes'"):
        folder = there.root / name
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        link = there.connection()
        link.hosts = folder / "hosts"
        link.run("true")
        assert link.known_hosts.is_file()
        assert (
            "Master running"
            in subprocess.run(
                [*link.words("-O", "check"), f"{link.user}@{link.host}"], capture_output=True, text=True
            ).stderr
        )
        link.close()


@needs_sshd
def test_no_token_of_this_process_is_in_the_variables_of_ssh(there: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    link = there.connection()
    process = link.open("sleep 30")
    try:
        assert b"hf_secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.kill()
        process.communicate()
        link.close()


@needs_sshd
def test_a_shell_that_greets_is_said_to_do_so(tmp_path: Path) -> None:
    script = tmp_path / "greets"
    script.write_text('#!/bin/sh\necho "Welcome to the pod!"\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    script.chmod(0o755)
    with server(tmp_path / "sshd", str(script)) as there:
        link = there.connection()
        with pytest.raises(CannotRunError, match="prints 'Welcome to the pod!' before the output of every command"):
            transfer.probe_pod(link, "run-1")
        with pytest.raises(CommandError, match="the pod's shell prints something"):
            link.get(f"{tmp_path}/greets", tmp_path / "here")
        link.close()


@needs_sshd
def test_files_go_and_come_and_a_broken_transfer_goes_on(there: Server, tmp_path: Path) -> None:
    link = there.connection()
    source = tmp_path / "some file.bin"
    source.write_bytes(b"x" * 3_000_000)
    link.put([source], f"{tmp_path}/a folder/", options=["--mkpath"])
    link.get(f"{tmp_path}/a folder/some file.bin", tmp_path / "back.bin")
    assert (tmp_path / "back.bin").read_bytes() == source.read_bytes()
    with pytest.raises(CommandError, match="rsync failed"):
        link.get(f"{tmp_path}/nothing", tmp_path / "x")
    there.cut()
    with pytest.raises(LostError):
        link.put([source], f"{tmp_path}/b/")
    link.close()


@needs_sshd
def test_a_command_that_hangs_is_given_up(tmp_path: Path) -> None:
    with server(tmp_path / "sshd") as there:
        link = there.connection()
        with pytest.raises(LostError, match="within 1 s"):
            link.run("sleep 60", seconds=1)
        link.close()


def test_without_ssh_or_rsync_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh.shutil, "which", lambda name: None if name == "rsync" else "/usr/bin/x")
    with pytest.raises(CannotRunError) as caught:
        ssh.check_installed()
    assert "apt-get install rsync" in str(caught.value.problems[0].remedy)


def test_the_key_is_made_from_the_account_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_ONE")
    made = []
    for machine in ("here", "elsewhere"):
        monkeypatch.setenv("RUNNER_STATE", str(tmp_path / machine))
        made.append(ssh_keys.key_pair("run-1"))
    assert made[0].public == made[1].public and made[0].private != made[1].private
    assert made[0].private.stat().st_mode & 0o777 == 0o600
    said = subprocess.run(["ssh-keygen", "-y", "-f", str(made[0].private)], capture_output=True, text=True, check=True)
    assert said.stdout.split()[1] == made[0].public.split()[1]
    assert ssh_keys.key_pair("run-2").public != made[0].public
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_TWO")
    assert ssh_keys.key_pair("run-1").public == made[0].public  # the copy, after the account's key was exchanged
    ssh_keys.delete_key("run-1")
    assert ssh_keys.key_pair("run-1").public != made[0].public
    assert b"rpa_" not in made[1].private.read_bytes()


@pytest.mark.parametrize("harm", [lambda key: b"", lambda key: key[: len(key) // 2], lambda key: bytes(len(key))])
def test_a_key_file_that_a_broken_disk_left_empty_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path))
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_ONE")
    made = ssh_keys.key_pair("run-1")
    made.private.write_bytes(harm(made.private.read_bytes()))
    assert ssh_keys.key_pair("run-1") == made and made.private.stat().st_mode & 0o777 == 0o600
    said = subprocess.run(["ssh-keygen", "-y", "-f", str(made.private)], capture_output=True, text=True, check=True)
    assert said.stdout.split()[1] == made.public.split()[1]


def test_without_an_api_key_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path))
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    with pytest.raises(RequestError, match="RUNPOD_API_KEY is not set"):
        ssh_keys.key_pair("run-1")


@pytest.mark.parametrize("key", ["rpa_é", "rpa_ключ", "rpa_one\nrpa_two", "rpa_xy zz", "rpa_\x00"[:-1] + "\x07"])
def test_an_api_key_that_no_header_can_carry_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path))
    monkeypatch.setenv("RUNPOD_API_KEY", key)
    for call in (Api, lambda: ssh_keys.key_pair("run-1")):
        with pytest.raises(RequestError) as caught:
            call()
        (problem,) = caught.value.problems
        assert problem.what.startswith("RUNPOD_API_KEY is no key") and key[4:] not in str(problem)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_ONE\n")  # a line break at its end is cut off
    assert api_key() == "rpa_ONE"
