"""TensorBoard in a pod: started when somebody looks, at the pod's loopback alone, over all runs on its disk."""

from __future__ import annotations

import shlex

from runner.cloud.ssh import Connection

PORT = "6006"
SECONDS = 60.0
NONE, SILENT = 3, 4
FIND = (
    'e=${RUNNER_RP_ENVIRONMENT:-/etc/rp_environment}; test -r "$e" && . "$e"; r="${RUNNER_WORKSPACE:-/workspace}/runs"'
)
# In the pod, with its Python 3.10 or later; a run's own environment has the package.
SERVE = f"""\
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
        sys.exit({NONE})
    words = [python, "-m", "tensorboard.main", "--logdir", runs, "--host", "127.0.0.1", "--port", str(port)]
    with open("/tmp/tensorboard.log", "ab") as log:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + {SECONDS}
    while not answers():
        if time.monotonic() > end:
            sys.exit({SILENT})
        time.sleep(0.2)
"""


def serve(connection: Connection, port: str = PORT, before: str = "") -> str | None:
    """Have TensorBoard answer at a port of the pod's loopback; why it does not, where it does not.

    `before` is typed before anything else there.
    """
    command = f'{before}{FIND}; exec python3 - {shlex.quote(port)} "$r"'
    code, _, said = connection.attempt(command, stdin=SERVE.encode(), seconds=2 * SECONDS)
    if code == NONE:
        return "no TensorBoard is installed in this pod: a run installs it, and track=tensorboard writes for it"
    if code == SILENT:
        return f"TensorBoard does not answer after {SECONDS:.0f} s: /tmp/tensorboard.log in the pod says why"
    return f"TensorBoard was not started: {(said.strip().splitlines() or ['no message'])[-1]}" if code else None
