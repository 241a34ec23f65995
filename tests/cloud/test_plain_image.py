"""An image that is not made for RunPod, as pytorch/pytorch, has no ssh server: the start command brings one."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cloud import rent_pod, ssh_keys
from runner.cloud.runpod import runpod_provider
from runner.cloud.ssh import connection_to
from tests.support.emulated import Emulator, needs_sshd
from tests.support.rented import PLAN, rented_spec, run_of

pytestmark = needs_sshd
PLAIN = "where.image=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime"


@pytest.mark.usefixtures("state")
def test_an_image_without_an_ssh_server_is_reached_all_the_same(emulator: Emulator, tmp_path: Path) -> None:
    spec = rented_spec(PLAIN, "where.setup_minutes=1")
    run = run_of(spec, tmp_path)
    pair = ssh_keys.key_pair(run.id)
    rented = rent_pod.acquire(run, spec, PLAN, pair.public, print, alone_minutes=5)
    try:
        at = rented.pod
        with_key = connection_to(at, pair.private)
        e = "${RUNNER_RP_ENVIRONMENT:-/etc/rp_environment}"
        said = with_key.run(f". {e}; echo $RUNPOD_POD_ID; command -v python3; test -e /start.sh || echo plain")
        with_key.close()
        assert said.splitlines()[0] == at.id
        assert said.splitlines()[1].endswith("/image/bin/python3")  # the image's own Python, which sshd's PATH lacks
        assert said.splitlines()[2] == "plain"
    finally:
        rented.release()
    assert emulator.pods() == {}


def test_without_a_key_no_server_is_started() -> None:
    assert runpod_provider.MAIN.index('[ -n "${PUBLIC_KEY:-}" ] || exec sleep infinity') < runpod_provider.MAIN.index(
        "sshd -t"
    )
