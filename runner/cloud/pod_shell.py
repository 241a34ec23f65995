"""Access to a pod for a person: a shell, ports at 127.0.0.1, TensorBoard, GPU usage, and variables in its memory."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner.cloud import fleet, ssh, ssh_keys
from runner.cloud.ledger import Ledger
from runner.cloud.provider import Provider
from runner.cloud.providers import PROVIDERS, name_of, provider_class
from runner.cloud.ssh import Connection, HostKeyError, LostError
from runner.cloud.transfer import place_secret
from runner.config import credentials
from runner.errors import CannotRunError, Problem, RequestError, RunFailedError, RunnerError

PORTS = ("6006", "8888")
WHAT = {"6006": "TensorBoard", "8888": "Jupyter"}


def open_shell(api: Provider, ledger: Ledger, word: str, command: Sequence[str] = ()) -> int:
    """Open a shell in a pod, or run one command there; ssh's exit code, which is the command's."""
    connection = connect_to(api, ledger, word)
    try:
        options = () if command else ("-t",)
        words = [*connection.words(*options), f"{connection.user}@{connection.host}"]
        if command:  # no login shell, which would read them by itself
            words += [read_env_command(fleet.find_pod(api, ledger, word)[2]), *command]
        return subprocess.call(words, env=ssh.environment())
    finally:
        connection.close()


def open_tunnel(api: Provider, ledger: Ledger, word: str, ports: Sequence[str], say: Callable[[str], None]) -> None:
    """Forward ports until Ctrl-C, by a connection of its own: a shared one would take the ports over.

    RequestError for ports that cannot be opened here, RunFailedError where the connection breaks or never was.
    """
    pairs = [_pair(port) for port in ports or PORTS]
    _check_free(pairs)
    connection = connect_to(api, ledger, word)
    if any(there == TENSORBOARD_PORT for _, there in pairs) and (why := serve_tensorboard(connection)):
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
        opened = process.poll() is None
        if opened:
            say("Ctrl-C ends it")
        process.wait()
        raise _interrupted(api, connection.name, word, opened)
    except KeyboardInterrupt:
        return
    finally:
        process.terminate()
        process.wait()
        connection.close()


def _interrupted(api: Provider, pod_id: str, word: str, opened: bool) -> RunFailedError:
    """The tunnel's ssh has ended by itself."""
    what = f"the connection to pod {pod_id} broke" if opened else f"no tunnel to pod {pod_id} could be opened"
    again = f"python -m runner pods tunnel {shlex.quote(word)} opens it again"
    try:
        pod = api.pod(pod_id)
    except RunnerError:
        return RunFailedError(Problem(what, None, again))
    if pod is None or pod.status != "RUNNING":
        what, again = f"{what}: it is {pod.status.lower() if pod else 'gone'}", "python -m runner pods lists them"
    return RunFailedError(Problem(what, None, again))


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _check_free(pairs: Sequence[tuple[str, str]]) -> None:
    """RequestError for local ports that something else listens at, all at once, or that may not be opened."""
    here = [port for port, _ in pairs]
    problems = [
        Problem(f"port {port} of this machine is named twice", "--port", "name another one here for each of the pod's")
        for port in dict.fromkeys(here)
        if here.count(port) > 1
    ]
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


def connect_to(api: Provider, ledger: Ledger, word: str) -> ssh.Connection:
    """Connect to the pod that a word means; CannotRunError where it has no address now."""
    ssh.check_installed()
    _, pod_id, run_id = fleet.find_pod(api, ledger, word)
    pod = api.pod(pod_id)
    if pod is None or pod.ssh_host is None or pod.ssh_port is None:
        state = pod.status.lower() if pod else "gone"
        what = f"pod {pod_id} is {state}, and cannot be reached by SSH"
        raise CannotRunError(Problem(what, None, f"python -m runner pods logs {pod_id} says what it does"))
    return ssh.connection_to(pod, ssh_keys.key_pair(run_id, name_of(api)).private)


def _pair(text: str) -> tuple[str, str]:
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    if found is None or not all(1 <= int(port) <= 65535 for port in found.groups() if port):
        raise RequestError(Problem(f"{text!r} is no port", "--port", "write LOCAL:POD, such as 9000:8888"))
    return found[1], found[2] or found[1]


GPU_FIELDS = (
    "index", "name", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
NO_COMMAND = 127  # of a shell: no such command


@dataclass(frozen=True)
class GpuUsage:
    """One GPU at one moment; None for what it does not tell (`[N/A]`)."""

    index: int
    name: str
    utilisation_percent: float | None
    memory_used_mib: float | None
    memory_total_mib: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None


def gpu_usage(connection: Connection) -> list[GpuUsage]:
    """Usage of every GPU of a pod. CannotRunError for a pod without GPUs, or whose driver does not answer."""
    words = f"timeout 20 nvidia-smi --query-gpu={','.join(GPU_FIELDS)} --format=csv,noheader,nounits"
    code, said, wrong = connection.attempt(words)
    if code:
        what = "the pod has no nvidia-smi: it has no GPU" if code == NO_COMMAND else f"nvidia-smi ends with {code}"
        last = (wrong or said).strip().splitlines()[-1:]
        raise CannotRunError(Problem(": ".join([what, *last])))
    return [_gpu_usage(line) for line in said.splitlines() if line.count(",") >= len(GPU_FIELDS) - 1]


def _gpu_usage(line: str) -> GpuUsage:
    index, name, *numbers = (part.strip() for part in line.split(","))
    return GpuUsage(int(index), name, *(_number_of(text) for text in numbers[: len(GPU_FIELDS) - 2]))


def _number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


TENSORBOARD_PORT = "6006"
TENSORBOARD_SECONDS = 60.0
NOT_INSTALLED, SILENT = 3, 4
FIND_RUNS = (
    'e=${RUNNER_RP_ENVIRONMENT:-/etc/rp_environment}; test -r "$e" && . "$e"; r="${RUNNER_WORKSPACE:-/workspace}/runs"'
)
# In the pod, with its Python 3.10 or later; a run's own environment has the package.
TENSORBOARD = f"""\
import glob, json, os, socket, subprocess, sys, time
port, runs = int(sys.argv[1]), sys.argv[2]
def answers():
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
if not answers():
    made = sorted(glob.glob(runs + "/*/install.json"), key=os.path.getmtime, reverse=True)
    for python in [*(json.load(open(file))["python"] for file in made), sys.executable]:
        if subprocess.run([python, "-c", "import tensorboard"], stderr=subprocess.DEVNULL).returncode == 0:
            break
    else:
        sys.exit({NOT_INSTALLED})
    words = [python, "-m", "tensorboard.main", "--logdir", runs, "--host", "127.0.0.1", "--port", str(port)]
    with open("/tmp/tensorboard.log", "ab") as log:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + {TENSORBOARD_SECONDS}
    while not answers():
        if time.monotonic() > end:
            sys.exit({SILENT})
        time.sleep(0.2)
"""


def serve_tensorboard(connection: Connection, port: str = TENSORBOARD_PORT, before: str = "") -> str | None:
    """Start TensorBoard at a port of the pod's loopback, over all runs on its disk; None, or why it does not answer.

    `before` is typed before anything else there.
    """
    command = f'{before}{FIND_RUNS}; exec python3 - {shlex.quote(port)} "$r"'
    code, _, said = connection.attempt(command, stdin=TENSORBOARD.encode(), seconds=2 * TENSORBOARD_SECONDS)
    if code == NOT_INSTALLED:
        return "no TensorBoard is installed in this pod: a run installs it, and track=tensorboard writes for it"
    if code == SILENT:
        return (
            f"TensorBoard does not answer after {TENSORBOARD_SECONDS:.0f} s: /tmp/tensorboard.log in the pod says why"
        )
    return f"TensorBoard was not started: {(said.strip().splitlines() or ['no message'])[-1]}" if code else None


PATIENCE_S = 90.0
"""How long a pod that has an address may refuse a login."""
# Where IPython looks: a notebook's kernel is a child of the image's Jupyter, which began before.
STARTUP = "~/.ipython/profile_default/startup"


def env_values(names: Sequence[str]) -> dict[str, str]:
    """Values of the variables, as this machine has them. RequestError for one that is not set, or may not travel."""
    values: dict[str, str] = {}
    problems: list[Problem] = []
    for word in dict.fromkeys(names):
        name, given, _ = word.partition("=")
        key = credentials.find_key(name) if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else None
        if given:
            what = "a value on a command line is seen by every user of the machine"
            problems.append(Problem(what, "--env", f"export it, and write --env {name}"))
        elif name in {provider_class(cloud).key_variable for cloud in PROVIDERS}:
            what, remedy = "a pod has a key of its own, and yours may end every other pod", "leave it out"
            problems.append(Problem(what, f"--env {name}", remedy))
        elif key is None:
            problems.append(Problem(f"{name!r} is not set here", "--env", f"export {name}=…, or leave it out"))
        else:
            values[name] = key.value
    if problems:
        raise RequestError(*problems)
    return values


def place_env(connection: Connection, run_id: str, values: dict[str, str]) -> None:
    """Put variables into the pod's memory, and have its shells and notebooks read them. LostError where it is not
    reached."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            _place_env_once(connection, run_id, values)
            return
        except HostKeyError:
            raise
        except LostError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _place_env_once(connection: Connection, run_id: str, values: dict[str, str]) -> None:
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    place_secret(connection, env_file(run_id), lines)
    place_secret(connection, f"{env_file(run_id)}.json", json.dumps(values))
    python = f"import json, os\nos.environ.update(json.load(open({env_file(run_id) + '.json'!r})))\n"
    connection.run(
        f"grep -qs {shlex.quote(env_file(run_id))} ~/.bashrc "
        f"|| echo {shlex.quote(read_env_command(run_id))} >> ~/.bashrc; "
        f"mkdir -p {STARTUP} && echo {shlex.quote(python)} > {STARTUP}/00-runner.py"
    )


def env_file(run_id: str) -> str:
    """The file with the variables, in the pod's memory."""
    return f"/dev/shm/runner-{run_id}.sh"


def read_env_command(run_id: str) -> str:
    """Shell command that reads the variables, if there are any."""
    file = shlex.quote(env_file(run_id))
    return f"[ ! -r {file} ] || . {file};"
