"""Environment variables of an interactive pod: passed by name, kept in its memory.

They go over SSH's standard input, and are gone when the container is made anew.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence

from runner.cloud.providers import PROVIDERS
from runner.cloud.ssh import Connection, HostKeyError, LostError
from runner.cloud.transfer import place_secret
from runner.config import credentials
from runner.errors import Problem, RequestError

PATIENCE_S = 90.0
"""How long a pod that has an address may refuse a login."""
# Where IPython looks: a notebook's kernel is a child of the image's Jupyter, which began before.
STARTUP = "~/.ipython/profile_default/startup"


def named(names: Sequence[str]) -> dict[str, str]:
    """Values of the variables, as this machine has them. RequestError for one that is not set, or may not travel."""
    values: dict[str, str] = {}
    problems: list[Problem] = []
    for word in dict.fromkeys(names):
        name, given, _ = word.partition("=")
        key = credentials.find(name) if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) else None
        if given:
            what = "a value on a command line is seen by every user of the machine"
            problems.append(Problem(what, "--env", f"export it, and write --env {name}"))
        elif name in {provider.key_variable for provider in PROVIDERS.values()}:
            what, remedy = "a pod has a key of its own, and yours may end every other pod", "leave it out"
            problems.append(Problem(what, f"--env {name}", remedy))
        elif key is None:
            problems.append(Problem(f"{name!r} is not set here", "--env", f"export {name}=…, or leave it out"))
        else:
            values[name] = key.value
    if problems:
        raise RequestError(*problems)
    return values


def place(connection: Connection, run_id: str, values: dict[str, str]) -> None:
    """Put variables into the pod's memory, and have its shells and notebooks read them. LostError where it is not
    reached."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            _place(connection, run_id, values)
            return
        except HostKeyError:
            raise
        except LostError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _place(connection: Connection, run_id: str, values: dict[str, str]) -> None:
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    place_secret(connection, shell_file(run_id), lines)
    place_secret(connection, f"{shell_file(run_id)}.json", json.dumps(values))
    python = f"import json, os\nos.environ.update(json.load(open({shell_file(run_id) + '.json'!r})))\n"
    connection.run(
        f"grep -qs {shlex.quote(shell_file(run_id))} ~/.bashrc || echo {shlex.quote(reading(run_id))} >> ~/.bashrc; "
        f"mkdir -p {STARTUP} && echo {shlex.quote(python)} > {STARTUP}/00-runner.py"
    )


def shell_file(run_id: str) -> str:
    """The file with the variables, in the pod's memory."""
    return f"/dev/shm/runner-{run_id}.sh"


def reading(run_id: str) -> str:
    """The command that reads them in a shell; nothing where there are none."""
    file = shlex.quote(shell_file(run_id))
    return f"[ ! -r {file} ] || . {file};"
