"""The agent in the pod: it ends the pod in time, whatever happens, and runs the training meanwhile.

One file, standard library only, Python 3.10 or later: it is copied beside the run's files and started before anything
else, so that a pod without a launcher still has somebody who ends it. `agent.py start DIR` arms it and answers with its
status; it lives on in a session of its own. DIR is the run's folder in the pod:

    agent.json         the order: until when, for how much, how long without a sign of the launcher, how to end
    work.json          what to do; the agent waits for it, for it comes after the data
    agent-status.json  where it stands: armed, installing, training, uploading, done, failed, refused, ending
    collected          the launcher has everything: nothing in this pod is needed any more
    successor.json     the run that has the pod next: once this one is over, its switch becomes that run's
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

SHM = Path("/dev/shm")
"""Memory: what lies here is gone with the pod, and on no disk. Secrets, and the launcher's sign of life."""
RP_ENVIRONMENT = Path(os.environ.get("RUNNER_RP_ENVIRONMENT", "/etc/rp_environment"))
"""RunPod's variables, which a shell over SSH does not have."""
FOLDERS = ("datasets", "artifacts", "cache", "runs", "hf_cache")
API = "https://api.runpod.io"
"""As RUNPOD_API_BASE_URL has it: the version is part of the path."""
FINAL = ("done", "failed", "refused")
EVERY_SECONDS = 0.5
GRACE_SECONDS = 45.0
"""What a training has to save a checkpoint before its pod ends: it is told so long before the deadline."""
SECOND_THOUGHT_SECONDS = 600.0
"""A pod that was stopped past its deadline and is started again has somebody who wants something of it."""
MAX_STARTS = 4
"""A training that takes the container down with it four times will do so a fifth time."""


# --- the pod ---------------------------------------------------------------------------------------------------------


def variables() -> dict[str, str]:
    """RunPod's environment of this pod: from the process, else from the file that is there for shells."""
    found: dict[str, str] = {}
    try:
        lines = RP_ENVIRONMENT.read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.removeprefix("export ").partition("=")
        found[name.strip()] = value.strip().strip("\"'")
    return {**found, **os.environ}


class Own:
    """This pod, as its own key may treat it."""

    def __init__(self, base: str | None = None) -> None:
        env = variables()
        self.id, self.key = env.get("RUNPOD_POD_ID", ""), env.get("RUNPOD_API_KEY", "")
        self.base = (env.get("RUNPOD_API_BASE_URL") or base or API).rstrip("/")

    def ask(self, method: str, path: str = "", body: dict[str, Any] | None = None) -> int:
        """The status of an answer; 0 where there was none."""
        request = urllib.request.Request(
            f"{self.base}/v2/pods/{self.id}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {self.key}",
                "Content-Type": "application/json",
                "User-Agent": "runner-agent",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except (OSError, ValueError):
            return 0

    def may_end(self) -> bool:
        """Whether the key is good for more than reading. To start a pod that runs is refused as a conflict (409, 400)
        to whoever may, and as forbidden (403) to whoever may not: the question changes nothing."""
        if not (self.id and self.key):
            return False
        answer = self._patient("POST", "/action", {"action": "start"})
        return 200 <= answer < 300 or answer in (400, 409)

    def _patient(self, method: str, path: str = "", body: dict[str, Any] | None = None) -> int:
        answer = 0
        for wait in (0.5, 1.0, 2.0, 4.0, 0.0):
            answer = self.ask(method, path, body)
            if answer and answer != 429 and answer < 500:
                break
            time.sleep(wait)
        return answer

    def end(self, how: str) -> None:
        """`stop` or `terminate`, again and again until this process is gone with its pod: an answer is no proof."""
        wait = 1.0
        while True:
            if how == "stop":
                answer = self.ask("POST", "/action", {"action": "stop"})
                if answer in (400, 403, 404, 405, 409, 422):  # it cannot be stopped; it must not go on costing
                    how = "terminate"
                    continue
            else:
                answer = self.ask("DELETE")
            log(f"{how}: the API answers {answer}")
            time.sleep(wait)
            wait = min(30.0, wait * 1.5)


# --- files -----------------------------------------------------------------------------------------------------------


def log(line: str) -> None:
    """One line with its time; standard error is `logs/agent.log`."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {line}", file=sys.stderr, flush=True)


def read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if it is not there or not whole."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(file: Path, content: dict[str, Any]) -> None:
    """Written whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def note(folder: Path, **facts: Any) -> None:
    """Put facts into the status; the others stay. The switch and its child both do: one at a time."""
    file = folder / "agent-status.json"
    with (SHM / f"runner-{folder.name}.status").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(file, {**read(file), "time": time.time(), **facts})


def successor(folder: Path, pod_id: str) -> Path | None:
    """The folder of the run that this pod was handed on to, if that has its order for this very pod."""
    named = read(folder / "successor.json").get("run_id")
    if not named or not pod_id:
        return None
    order = read(folder.parent / named / "agent.json")
    return folder.parent / named if (order.get("run_id"), order.get("pod_id")) == (named, pod_id) else None


def admit(key: str | None) -> None:
    """Let a run's launcher in by its own key, for a pod that was handed on knows the first run's alone."""
    named = variables().get("RUNNER_AUTHORIZED_KEYS")
    with suppress(OSError, RuntimeError):
        file = Path(named) if named else Path.home() / ".ssh" / "authorized_keys"
        known = file.read_text("utf-8") if file.exists() else ""
        if key and key not in known.splitlines():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as stream:
                stream.write(f"{'' if not known or known.endswith(chr(10)) else chr(10)}{key}\n")


# --- the dead-man's switch -------------------------------------------------------------------------------------------


def boot_id() -> str:
    """Names the host's start: as long as it is the same, CLOCK_BOOTTIME goes on, restarts of a container included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return ""


def now() -> float:
    """Seconds that no clock adjustment moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def seconds(minutes: float | None) -> float | None:
    """None stays None: without end."""
    return None if minutes is None else 60 * minutes


class Limits:
    """Until when, in this host's own seconds. The order's are the launcher's: only differences are taken from it."""

    def __init__(self, folder: Path, order: dict[str, Any], beat: Path) -> None:
        self.beat = beat
        self.silence = seconds(order.get("heartbeat_minutes"))
        self.boarding = seconds(order.get("boarding_minutes"))
        """The same for a run that will be left to its pod, until it has begun: somebody is sending it."""
        self.seen, self.heard = self._mark(), now()
        sent = float(order["sent"])
        ends = {"deadline": float(order["deadline"]) - sent}
        if order.get("budget_usd") is not None and order.get("usd_per_hour"):
            ends["budget"] = float(order["started"]) + 3600 * order["budget_usd"] / order["usd_per_hour"] - sent
        self.why, left = min(ends.items(), key=lambda end: end[1])
        armed = read(folder / "armed.json")
        mine = {"pod_id": order["pod_id"], "order": order["id"]}
        if {key: armed.get(key) for key in mine} == mine:  # the container, or the pod, was started again
            same = armed.get("boot_id") == boot_id()
            left = armed["at_boot"] - now() if same else min(left, armed["at_wall"] - time.time())
            if left < 0 and read(folder / "agent-status.json").get("state") == "ending":
                left = SECOND_THOUGHT_SECONDS
        self.at = now() + left
        self.grace = min(GRACE_SECONDS, max(0.0, left) / 10)
        write(folder / "armed.json", {
            **mine, "boot_id": boot_id(), "at_boot": self.at, "at_wall": time.time() + left,
        })  # fmt: skip

    def over(self, silence: bool = True, begun: bool = True) -> str | None:
        """Why the pod must end now, in words; a launcher's `silence` may be one reason."""
        mark = self._mark()
        if mark != self.seen:
            self.seen, self.heard = mark, now()
        if now() > self.at - self.grace:
            return "the budget is spent" if self.why == "budget" else "the deadline has come"
        longest = self.silence if begun or self.silence is not None else self.boarding
        if silence and longest is not None and now() - self.heard > longest:
            return f"no sign of the launcher for {longest / 60:.3g} minutes"
        return None

    def _mark(self) -> float:
        try:
            return self.beat.stat().st_mtime
        except OSError:
            return 0.0


class Switch:
    """The process that outlives all others: it holds the limits, and starts the work as its child."""

    def __init__(self, folder: Path, order: dict[str, Any], own: Own) -> None:
        self.folder, self.order, self.own = folder, order, own
        self.beat = SHM / f"runner-{order['run_id']}.beat"
        self.limits = Limits(folder, order, self.beat)
        self.child: int | None = None

    def serve(self) -> Path:
        """Until the pod is gone, or handed on: then the next run's folder."""
        signal.signal(signal.SIGTERM, lambda *_: self._pass_on())
        while True:
            self._renew()
            status = read(self.folder / "agent-status.json")
            reason = self.limits.over(begun=status.get("state") != "armed")
            if self.child is not None and os.waitpid(self.child, os.WNOHANG)[0]:
                self.child = None
                if status.get("state") not in FINAL:
                    note(self.folder, state="failed", exit_code=1, message="the agent's worker ended without a word")
                continue
            over = self.child is None and status.get("state") in FINAL
            if over and (following := successor(self.folder, self.own.id)):
                log(f"the pod is handed on to {following.name}")
                return following
            if over and (self.folder / "collected").exists():
                reason = "everything was collected"
            elif over and self._waits(status):
                reason = self.limits.over(silence=False)
            elif reason is None and over and self.order.get("heartbeat_minutes") is None:
                reason = "the run is over"
            if reason is not None:
                self._end(reason, status)
            time.sleep(EVERY_SECONDS)

    def _renew(self) -> None:
        """A newer order, for this pod."""
        order = read(self.folder / "agent.json")
        if order and order["id"] != self.order["id"] and order["pod_id"] == self.own.id:
            log(f"a new order: {order['id']}")
            self.order, self.limits = order, Limits(self.folder, order, self.beat)
            note(self.folder, order=order["id"])

    def _end(self, reason: str, status: dict[str, Any]) -> None:
        """Have the training save what it has, then end the pod."""
        how = self._how(status)
        log(f"ends the pod ({how}): {reason}")
        deadline = now() + max(self.limits.grace, 1.0)
        if self.child is not None:
            self._pass_on()
            while status.get("pid") and now() < deadline and not os.waitpid(self.child, os.WNOHANG)[0]:
                time.sleep(0.1)
            kill_group(read(self.folder / "agent-status.json").get("pid"), signal.SIGKILL)
            kill_group(self.child, signal.SIGKILL)
        note(self.folder, state="ending", ended_in=status.get("state"), message=reason, how=how)
        os.sync()
        self.own.end(how)

    def _waits(self, status: dict[str, Any]) -> bool:
        """No disk outlives this pod, and nobody else has the result: it is kept until the deadline."""
        return self.order.get("uncollected") == "wait" and not status.get("uploaded")

    def _how(self, status: dict[str, Any]) -> str:
        """Stopped, a pod keeps its volume disk, for cents: where that has what nobody else has yet."""
        if self.order.get("keep"):
            return "stop"
        begun = status.get("state") in ("training", "uploading", "done", "failed", "ending")
        if not begun or (self.folder / "collected").exists() or status.get("uploaded"):
            return "terminate"
        return "stop" if self.order.get("uncollected") == "stop" else "terminate"

    def _pass_on(self) -> None:
        pid = read(self.folder / "agent-status.json").get("pid")
        if pid:
            with suppress(OSError):
                os.kill(int(pid), signal.SIGTERM)


def kill_group(pid: Any, number: int) -> None:
    """All processes that a leader has started."""
    with suppress(OSError, TypeError, ValueError):
        os.killpg(int(pid), number)


# --- the work --------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Wait for what to do; install, train, upload. Every state is in the status before it begins."""
    status = read(folder / "agent-status.json")
    while (task := read(folder / "work.json")).get("pod_id") != status["pod_id"]:  # an earlier pod's, on a volume
        time.sleep(EVERY_SECONDS)
    starts = int(status.get("starts", 0)) + 1
    if status.get("state") in FINAL and status.get("task") == task["id"]:
        return  # the container was restarted after the end
    if status.get("task") != task["id"]:
        starts = 1
    if starts > MAX_STARTS:
        note(folder, state="failed", exit_code=1, message=f"the container was restarted {MAX_STARTS - 1} times")
        return
    note(folder, state="installing", task=task["id"], starts=starts, exit_code=None, message=None)
    await_secrets(folder, task)
    python = install(folder, task)
    if python is None:
        message = "installing failed: logs/install.log says why"
        note(folder, state="failed", exit_code=1, message=message)
        return
    code = train(folder, task, python)
    if code == 0 and task.get("after"):
        note(folder, state="uploading", pid=None)
        uploaded = call(folder, task, [python, *task["after"]], "upload.log") == 0
        said = None if uploaded else "the upload failed: logs/upload.log says why; the model is in this pod"
        note(folder, uploaded=uploaded, message=said)
    note(folder, state="done" if code == 0 else "failed", exit_code=code, pid=None)


def await_secrets(folder: Path, task: dict[str, Any], seconds: float = 30.0) -> None:
    """After a restart they are gone with the memory; a launcher that is there sends them again, and nobody else can."""
    end = now() + seconds
    while task.get("secrets") and now() < end and not (SHM / f"runner-{folder.name}.env").exists():
        time.sleep(EVERY_SECONDS)


def install(folder: Path, task: dict[str, Any]) -> str | None:
    """The Python that trains; None if there is none."""
    if not task.get("install"):
        return str(task["python"])
    code = call(folder, task, [sys.executable, *task["install"]], "install.log")
    return read(folder / "install.json").get("python") if code == 0 else None


def train(folder: Path, task: dict[str, Any], python: str) -> int:
    """The exit code of the training."""
    over = threading.Event()
    threading.Thread(target=sample, args=(folder, over), daemon=True).start()
    code = call(folder, task, [python, *task["command"]], "worker.log", state="training")
    over.set()
    return code


def call(folder: Path, task: dict[str, Any], command: list[str], name: str, state: str | None = None) -> int:
    """Run to the end, in a process group of its own; its words go to a log."""
    with (folder / "logs" / name).open("ab") as words:
        process = subprocess.Popen(
            command, cwd=task.get("cwd"), env=environment(folder, task), stdin=subprocess.DEVNULL,
            stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    note(folder, pid=process.pid, **({"state": state} if state else {}))
    code = process.wait()
    log(f"{name}: exit code {code}")
    return code if code >= 0 else 128 - code


def environment(folder: Path, task: dict[str, Any]) -> dict[str, str]:
    """The pod's, the task's, and the secrets; without the key that ends the pod."""
    secrets = read(SHM / f"runner-{folder.name}.env")
    env = {**variables(), **task.get("env", {}), **secrets}
    env.pop("RUNPOD_API_KEY", None)
    return env


def sample(folder: Path, over: threading.Event, every: float = 5.0) -> None:
    """`gpu.jsonl`: what the GPUs do, a line every few seconds, as long as there is an nvidia-smi."""
    fields = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    while not over.wait(every):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return
        rows = [[part.strip() for part in line.split(",")] for line in said.splitlines()]
        gpus = [dict(zip(fields, row, strict=False)) for row in rows]
        with (folder / "gpu.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": time.time(), "gpus": gpus}) + "\n")


# --- start -----------------------------------------------------------------------------------------------------------


def run(folder: Path) -> int:
    """Be the switch of a run, then of those that its pod is handed on to; returns where there is nothing to do.

    One process, so that no moment is without a switch. It keeps the locks of the runs before: whoever watches over the
    first one, as the pod's start command does, sees that somebody is at work.
    """
    held: list[IO[str]] = []
    following: Path | None = folder
    while following is not None:
        following = hold(following, held)
    return 0


def hold(folder: Path, held: list[IO[str]]) -> Path | None:
    """Arm the switch of one run, then let its work begin; the folder of the run that has the pod next."""
    order = read(folder / "agent.json")
    own = Own(order.get("api_base"))
    if not order or order["pod_id"] != own.id:
        log(f"the order is for pod {order.get('pod_id')}, and this is {own.id}")
        return None
    lock = (SHM / f"runner-{order['run_id']}.lock").open("w")
    if held:
        speak(folder)
    try:  # of a run that was handed the pod, another agent may be at work: this one stands by
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if held else fcntl.LOCK_NB))
    except OSError:
        log("an agent is at work already")
        return None
    held.append(lock)
    order = read(folder / "agent.json") or order  # it may have stood by for long
    if following := successor(folder, own.id):
        return following
    admit(order.get("public_key"))
    switch = Switch(folder, order, own)
    shield()
    status = read(folder / "agent-status.json")
    before = status if status.get("pod_id") == own.id else {}
    write(folder / "agent-status.json", before)
    if not before:
        (folder / "collected").unlink(missing_ok=True)
    right = own.may_end()
    facts = {"pod_id": own.id, "agent": os.getpid(), "order": order["id"], "right_to_end": right, "pid": None}
    if order.get("heartbeat_minutes") is None and not right:
        note(folder, state="refused", **facts, exit_code=1, message="this pod may not end itself: its key is refused")
        return None  # nothing is here yet; the launcher ends the pod
    again = before.get("state") not in (None, "refused")
    note(folder, state=before["state"] if again else "armed", **facts, armed=time.time())
    for name in FOLDERS:
        (folder.parent.parent / name).mkdir(exist_ok=True)
    if before.get("state") != "ending":  # ended on purpose and started again: somebody wants to have a look
        switch.child = os.fork()
        if switch.child == 0:
            os.setpgid(0, 0)
            shield(0)
            for one in held:
                one.close()
            try:
                work(folder)
            except BaseException as error:
                note(folder, state="failed", exit_code=1, message=f"{type(error).__name__}: {error}")
            os._exit(0)
    return switch.serve()


def speak(folder: Path) -> None:
    """Standard output and error go to the run's `logs/agent.log` from here on."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    words = os.open(folder / "logs" / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(words, target)
    os.close(words)


def shield(score: int = -900) -> None:
    """The kernel ends others first when memory runs out (proc(5), oom_score_adj); allowed to root."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def start(folder: Path) -> int:
    """Go on in a session of its own, and answer as soon as the switch is armed: with the status of the run that has the
    pod now."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            speak(folder)
            os._exit(run(folder))
        os._exit(0)
    os.wait()
    own, deadline = Own().id, now() + 60
    while now() < deadline:
        while following := successor(folder, own):
            folder = following
        status = read(folder / "agent-status.json")
        if status.get("order") == read(folder / "agent.json").get("id") and status.get("right_to_end") is not None:
            print(json.dumps(status), flush=True)
            return 0
        time.sleep(0.1)
    print(json.dumps({"state": "silent"}), flush=True)
    return 1


if __name__ == "__main__":
    verbs = {"start": start, "run": run}
    sys.exit(verbs[sys.argv[1]](Path(sys.argv[2]).absolute()))
