"""Who holds a pod: a dead owner is found out whatever the machine is called by now; a living one is never taken for
dead, in whatever container or on whatever machine it lives."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runner.cloud import process_identity
from runner.cloud.ledger import Ledger
from runner.emulator.container import namespaces
from tests.cloud.test_ledger import FACTS
from tests.conftest import ROOT
from tests.support.processes import until

HOLDER = """
import os, sys
from runner.cloud import process_identity as owner
from runner.cloud.ledger import Ledger
from tests.cloud.test_ledger import FACTS
for name, value in [word.split("=") for word in sys.argv[1:]]:
    setattr(owner, name, lambda value=value: value)
Ledger().plan("runner-a-1", run_id="a", **FACTS)
print(os.getpid(), flush=True)
sys.stdin.read()
"""
ELSEWHERE: dict[str, tuple[list[str], list[str]]] = {
    "here": ([], []),
    "a hostname from before": (["unshare", "--uts", "sh", "-c", 'hostname before; exec "$@"', "sh"], []),
    "a container": (["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"], []),
    "a container without a machine-id": (
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
        ["machine_id="],
    ),
    "before a reboot": ([], ["boot_id=another"]),
    "before a reboot, without a machine-id": ([], ["boot_id=another", "machine_id="]),
    "a virtual machine with the same folder": ([], ["boot_id=another", "machine_id=another"]),
}
Held = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def held(state: Path) -> Iterator[Held]:
    """A process somewhere that holds the pod `runner-a-1`."""
    processes: list[subprocess.Popen[str]] = []

    def start(where: list[str], facts: list[str]) -> subprocess.Popen[str]:
        if where and not namespaces():
            pytest.skip("no right to make namespaces")
        process = subprocess.Popen(
            [*where, sys.executable, "-c", HOLDER, *facts], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in processes:
        with suppress(OSError):
            process.kill()
        process.wait()


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_living_owner_keeps_its_pod_and_a_dead_one_is_found_out(held: Held, where: str) -> None:
    process = held(*ELSEWHERE[where])
    ledger = Ledger()
    entry = ledger.entry("runner-a-1")
    assert entry is not None and entry.owned and not ledger.take("runner-a-1")
    process.kill()
    process.wait()
    until(lambda: not (entry := ledger.entry("runner-a-1")) or not entry.owned, 10)  # unshare is gone before its child
    assert ledger.take("runner-a-1")


def test_a_hostname_that_changes_under_a_living_owner_changes_nothing(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger().plan("runner-b-1", run_id="b", **FACTS)
    held([], [])
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed-by-dhcp")
    own, other = Ledger().entry("runner-b-1"), Ledger().entry("runner-a-1")
    assert own is not None and own.owned_here
    assert other is not None and other.owned and not other.owned_here


@pytest.mark.parametrize(
    ("facts", "dead"),
    [
        (["boot_id=another", "machine_id=another"], False),
        (["boot_id=another", "machine_id="], False),
        (["boot_id=another"], True),
    ],
    ids=["another machine", "no machine-id", "the same machine, started again"],
)
def test_on_a_network_file_system_the_owner_of_another_machine_is_never_taken_for_dead(
    held: Held, facts: list[str], dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks may be its own affair there."""
    if dead and not process_identity.machine_id():
        pytest.skip("this machine has no machine-id")
    process = held([], facts)
    monkeypatch.setattr(process_identity, "is_on_network", lambda file: True)
    monkeypatch.setattr(process_identity, "_is_held", lambda file: False)  # `nolock`
    entry = Ledger().entry("runner-a-1")
    assert entry is not None and entry.owned == (not dead)
    process.kill()
    process.wait()
    assert Ledger().take("runner-a-1") == dead


def test_an_owner_whose_lock_is_gone_is_taken_for_alive(held: Held, state: Path) -> None:
    process = held([], ["boot_id=another", "machine_id=another"])
    process.kill()
    process.wait()
    shutil.rmtree(state / "owners")
    assert not Ledger().take("runner-a-1")


def test_the_hostname_alone_as_an_earlier_version_wrote_it(state: Path) -> None:
    ledger = Ledger()
    ledger.plan("runner-a-1", run_id="a", **FACTS)
    for host, started, owned in (
        (socket.gethostname(), process_identity.start_ticks(os.getpid()), True), (socket.gethostname(), 1.0, False),
        ("elsewhere", 1.0, True),
    ):  # fmt: skip
        ledger.set("runner-a-1", host=host, pid_started=started)
        entry = ledger.entry("runner-a-1")
        assert entry is not None and entry.owned == owned


def test_without_room_for_a_lock_a_process_still_holds_its_pod(state: Path) -> None:
    state.mkdir(parents=True)
    (state / "owners").write_text("a file")
    Ledger().plan("runner-a-1", run_id="a", **FACTS)
    entry = Ledger().entry("runner-a-1")
    assert entry is not None and entry.owned_here


def test_where_a_file_lies(tmp_path: Path) -> None:
    assert not process_identity.is_on_network(tmp_path / "x" / "y")
