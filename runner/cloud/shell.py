"""Interactive access to a pod: a shell, or ports at 127.0.0.1, through the system's ssh."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

from runner.cloud import fleet, pod_env, pod_tensorboard, ssh, ssh_keys
from runner.cloud.ledger import Ledger
from runner.cloud.provider import Provider
from runner.errors import CannotRunError, Problem, RequestError

PORTS = ("6006", "8888")
WHAT = {"6006": "TensorBoard", "8888": "Jupyter"}


def shell(api: Provider, ledger: Ledger, word: str, command: Sequence[str] = ()) -> int:
    """ssh's exit code, which is the command's."""
    connection = connect(api, ledger, word)
    try:
        options = () if command else ("-t",)
        words = [*connection.words(*options), f"{connection.user}@{connection.host}"]
        if command:  # no login shell, which would read them by itself
            words += [pod_env.reading(fleet.find(api, ledger, word)[2]), *command]
        return subprocess.call(words, env=ssh.environment())
    finally:
        connection.close()


def tunnel(api: Provider, ledger: Ledger, word: str, ports: Sequence[str], say: Callable[[str], None]) -> int:
    """Forward ports until Ctrl-C; ssh's exit code. A connection of its own: a shared one would take the ports over."""
    pairs = [_pair(port) for port in ports or PORTS]
    _check_free(pairs)
    connection = connect(api, ledger, word)
    if any(there == pod_tensorboard.PORT for _, there in pairs) and (why := pod_tensorboard.serve(connection)):
        say(why)
    forwards = [w for here, there in pairs for w in ("-L", f"127.0.0.1:{here}:127.0.0.1:{there}")]
    alone = ("-o", "ControlMaster=no", "-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes")
    words = [*connection.words(), f"{connection.user}@{connection.host}"]
    process = subprocess.Popen([words[0], *alone, "-N", *forwards, *words[1:]], env=ssh.environment())  # first one wins
    try:
        while process.poll() is None and not _listens(int(pairs[-1][0])):
            time.sleep(0.1)
        for here, there in pairs if process.poll() is None else ():
            say(f"http://127.0.0.1:{here}  {WHAT.get(there, f'port {there} of the pod')}")
        say("Ctrl-C ends it" if process.poll() is None else "the tunnel could not be opened")
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        process.wait()
        connection.close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _check_free(pairs: Sequence[tuple[str, str]]) -> None:
    """RequestError for local ports that something else listens at, all at once, or that may not be opened."""
    problems = []
    for port, there in pairs:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(port)))
        except OSError as error:
            remedy = f"another one here: --port {10000 + int(port) % 50000}:{there}"
            problems.append(Problem(f"port {port} of this machine: {error.strerror}", "--port", remedy))
    if problems:
        raise RequestError(*problems)


def connect(api: Provider, ledger: Ledger, word: str) -> ssh.Connection:
    """To the pod that a word means; CannotRunError where it has no address now."""
    ssh.check()
    _, pod_id, run_id = fleet.find(api, ledger, word)
    pod = api.pod(pod_id)
    if pod is None or pod.ssh_host is None or pod.ssh_port is None:
        state = pod.status.lower() if pod else "gone"
        what = f"pod {pod_id} is {state}, and cannot be reached by SSH"
        raise CannotRunError(Problem(what, None, f"python -m runner pods logs {pod_id} says what it does"))
    return ssh.connection_to(pod, ssh_keys.pair(run_id).private)


def _pair(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    if found is None or not all(1 <= int(port) <= 65535 for port in found.groups() if port):
        raise RequestError(Problem(f"{text!r} is no port", "--port", "write LOCAL:POD, such as 9000:8888"))
    return found[1], found[2] or found[1]
