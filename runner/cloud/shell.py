"""A person's own way into a pod: a shell, or ports at 127.0.0.1; by the system's ssh and the run's key."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence

from runner.cloud import fleet, keys, ssh
from runner.cloud.api import Api
from runner.cloud.ledger import Ledger
from runner.errors import CannotRunError, Problem, RequestError

PORTS = ("6006", "8888")
WHAT = {"6006": "TensorBoard", "8888": "Jupyter"}


def shell(api: Api, ledger: Ledger, word: str, command: Sequence[str] = ()) -> int:
    """ssh's exit code, which is the command's."""
    connection = connect(api, ledger, word)
    try:
        options = () if command else ("-t",)
        words = [*connection.words(*options), f"{connection.user}@{connection.host}", *command]
        return subprocess.call(words)
    finally:
        connection.close()


def tunnel(api: Api, ledger: Ledger, word: str, ports: Sequence[str], say: Callable[[str], None]) -> int:
    """Forward ports until Ctrl-C; ssh's exit code."""
    pairs = [_pair(port) for port in ports or PORTS]
    connection = connect(api, ledger, word)
    try:
        forwards = [w for here, there in pairs for w in ("-L", f"127.0.0.1:{here}:127.0.0.1:{there}")]
        for here, there in pairs:
            say(f"http://127.0.0.1:{here}  {WHAT.get(there, f'port {there} of the pod')}")
        say("Ctrl-C ends it")
        target = f"{connection.user}@{connection.host}"
        return subprocess.call([*connection.words("-N", "-o", "ExitOnForwardFailure=yes", *forwards), target])
    except KeyboardInterrupt:
        return 0
    finally:
        connection.close()


def connect(api: Api, ledger: Ledger, word: str) -> ssh.Connection:
    """To the pod that a word means; CannotRunError where it has no address now."""
    ssh.check()
    _, pod_id, run_id = fleet.find(api, ledger, word)
    pod = api.pod(pod_id)
    if pod is None or pod.ssh_host is None or pod.ssh_port is None:
        state = pod.status.lower() if pod else "gone"
        what = f"pod {pod_id} is {state}, and cannot be reached by SSH"
        raise CannotRunError(Problem(what, None, f"python -m runner pods logs {pod_id} says what it does"))
    return ssh.Connection(pod_id, pod.ssh_host, pod.ssh_port, keys.pair(run_id).private)


def _pair(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    if found is None:
        raise RequestError(Problem(f"{text!r} is no port", "--port", "write LOCAL:POD, such as 9000:8888"))
    return found[1], found[2] or found[1]
