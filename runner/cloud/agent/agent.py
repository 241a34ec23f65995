"""The agent in the pod: ends the pod in time whatever happens, and runs the training meanwhile.

One file, standard library only, Python 3.10 or later: it is copied beside the run's files and started before anything
else, so that a pod without a launcher still has somebody who ends it. `agent.py start DIR` arms it and answers with its
status; it lives on in a session of its own. DIR is the run's folder in the pod:

    agent.json         the order: until when, for how much, how long without a sign of the launcher, how to end
    work.json          what to do; the agent waits for it, for it comes after the data
    agent-status.json  where it stands: armed, installing, training, uploading, done, failed, refused, ending
    collected          the launcher has everything: nothing in this pod is needed any more
    successor.json     the run that has the pod next: once this one is over, its switch becomes that run's

The limits are held in memory, and ending the pod needs no file, log or lock: a disk that is full, read-only or broken
does not keep a pod alive. Twice a second the pod's start command (runpod/runpod_provider.py) is told until when the
agent will have ended the pod; where it falls silent, the start command does it.

How a pod ends itself is the provider's to say: the order's `calls`, or RunPod's (`CALLS`) where it has none. It stays
one file: it is sent before all else and started again from whatever the disk has kept, and a part of it alone would be
a pod that nobody ends.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SHM = Path("/dev/shm")
"""Memory: what lies here is gone with the pod, and on no disk. Secrets, and the launcher's sign of life."""
RP_ENVIRONMENT = Path(os.environ.get("RUNNER_RP_ENVIRONMENT", "/etc/rp_environment"))
"""The pod's variables, which a shell over SSH does not have."""
FOLDERS = ("datasets", "artifacts", "cache", "runs", "hf_cache")
CALLS: dict[str, Any] = {
    "id": "RUNPOD_POD_ID",
    "key": "RUNPOD_API_KEY",
    "base": "RUNPOD_API_BASE_URL",
    "default_base": "https://api.runpod.io",
    "path": "/v2/pods/{id}",
    "authorization": "Bearer {key}",
    "terminate": ["DELETE", "", None],
    "stop": ["POST", "/action", {"action": "stop"}],
    "probe": ["POST", "/action", {"action": "start"}],
    "probe_granted": [400, 409],
    "not_stopped": [400, 403, 404, 405, 409, 422],
}
"""How a pod of RunPod's ends itself: the variables that have its id, its key and the address, and the requests, as
method, path after that of the pod, and body. To start a pod that runs (`probe`) is refused as a conflict (409, 400) to
whoever may, and as forbidden (403) to whoever may not: the question changes nothing. After `not_stopped` the pod is
terminated, as it must not go on costing."""
KEYS = {CALLS["key"]}
"""Variables with a key that ends a pod: no process of the training gets them."""
FINAL = ("done", "failed", "refused")
EVERY_SECONDS = 0.5
GRACE_SECONDS = 45.0
"""What a training has to save a checkpoint before its pod ends: it is told so long before the deadline."""
SECOND_THOUGHT_SECONDS = 600.0
"""A pod that was stopped past its deadline and is started again has somebody who wants something of it."""
MAX_STARTS = 4
"""A training that takes the container down with it four times will do so a fifth time."""
REQUEST_SECONDS = 20.0
"""From a request to the end of its answer's headers, however slowly they come."""
SYNC_SECONDS = 20.0
STALE_SECONDS = 120.0
"""An order that is armed so long after it came was armed before."""
WATCH_SECONDS = 30.0
"""So long after a limit the start command ends a pod whose agent has not."""


# --- the pod ---------------------------------------------------------------------------------------------------------


def pod_variables() -> dict[str, str]:
    """The provider's environment of this pod: from the process, else from the file that is there for shells."""
    found: dict[str, str] = {}
    try:
        lines = RP_ENVIRONMENT.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.removeprefix("export ").partition("=")
        found[name.strip()] = value.strip().strip("\"'")
    return {**found, **os.environ}


class ThisPod:
    """This pod, as its own key may treat it."""

    def __init__(self, order: dict[str, Any] | None = None) -> None:
        env, order = pod_variables(), order or {}
        given = order.get("calls")
        self.calls = {**CALLS, **(given if isinstance(given, dict) else {})}
        KEYS.add(self.calls["key"])
        self.id, self.key = env.get(self.calls["id"], ""), env.get(self.calls["key"], "")
        self.base = (env.get(self.calls["base"]) or order.get("api_base") or self.calls["default_base"]).rstrip("/")
        # Made now: certificates are read from a disk that may be gone by the time they are needed.
        handler = urllib.request.HTTPSHandler(context=ssl.create_default_context())
        self._open = urllib.request.build_opener(handler).open
        self._watch = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._watch.setblocking(False)

    def tell_watch(self, due: float, how: str) -> None:
        """Tell the pod's start command by when (`now()`) and how this process ends the pod: afterwards it is the start
        command's turn. Over an abstract socket, which needs no disk."""
        with suppress(OSError):
            self._watch.sendto(f"{due} {how}".encode(), watch_address(self.id, self.base))

    def ask(self, method: str, path: str = "", body: dict[str, object] | None = None) -> int:
        """The status of an answer; 0 where there was none."""
        request = urllib.request.Request(
            self.base + self.calls["path"].format(id=self.id) + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": self.calls["authorization"].format(key=self.key),
                "Content-Type": "application/json",
                "User-Agent": "runner-agent",
            },
        )
        try:
            with time_limit(REQUEST_SECONDS), self._open(request, timeout=15) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except Exception as error:  # a broken connection, an answer that is no HTTP, no memory: all the same here
            log(f"{method} {path}: {type(error).__name__}: {error}")
            return 0

    def may_end(self) -> bool:
        """Return True if the key has write permission; the request changes nothing."""
        if not (self.id and self.key):
            return False
        answer = self._patient(*self.calls["probe"])
        return 200 <= answer < 300 or answer in self.calls["probe_granted"]

    def _patient(self, method: str, path: str = "", body: dict[str, object] | None = None) -> int:
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
            with suppress(Exception):
                self.tell_watch(now() + REQUEST_SECONDS + 30.0 + WATCH_SECONDS, how)
                answer = self.ask(*self.calls[how])
                log(f"{how}: the API answers {answer}")
                if how == "stop" and answer in self.calls["not_stopped"]:
                    how = "terminate"  # it cannot be stopped; it must not go on costing
                    continue
            time.sleep(wait)
            wait = min(30.0, wait * 1.5)


def watch_address(pod_id: str, base: str) -> str:
    """The abstract socket (unix(7)) at which the pod's start command listens; such a name has 107 bytes at most."""
    return f"\0runner-{pod_id} {base}"[:100]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so long, in the main thread: a socket's own timeout begins anew with every byte."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no whole answer within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# --- files -----------------------------------------------------------------------------------------------------------


def log(line: str) -> None:
    """Write one line with its time to standard error, which is `logs/agent.log`. Never raises."""
    with suppress(Exception):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} {line}", file=sys.stderr)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if it is not there, not whole, or cannot be read."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except Exception:  # also RecursionError, MemoryError
        return {}
    return content if isinstance(content, dict) else {}


def write_json(file: Path, content: dict[str, object]) -> None:
    """Written whole or not at all; on a full disk over the old content, which takes no new block."""
    text = json.dumps(content, indent=1)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        with file.open("r+", encoding="utf-8") as stream:
            stream.write(text)
            stream.truncate()


UNWRITTEN: dict[Path, dict[str, Any]] = {}
"""Facts by run's folder that neither its disk nor the pod's memory took."""


def unwritten(folder: Path) -> Path:
    """The file in the pod's memory with a status that the run's disk did not take: for the agent's other process, and
    for the launcher (tail.py), who would wait for a training that has failed."""
    return SHM / f"runner-{folder.name}.unwritten"


def read_status(folder: Path) -> dict[str, Any]:
    """Return the state of a run: its file, with what could not be written since."""
    found = read_json(folder / "agent-status.json")
    for kept in (read_json(unwritten(folder)), UNWRITTEN.get(folder, {})):
        if kept.get("time", 0.0) >= found.get("time", 0.0):
            found = {**found, **kept}
    return found


def exists(file: Path) -> bool:
    """False also where the disk does not say, or no memory is left to ask."""
    try:
        return file.exists()
    except Exception:
        return False


def update_status(folder: Path, **facts: object) -> None:
    """Put facts into the status; the others stay. The switch and its child both do: one at a time. Never raises: what
    the disk does not take is kept in memory."""
    with suppress(Exception), ExitStack() as stack:
        with suppress(OSError):
            own = stack.enter_context((SHM / f"runner-{folder.name}.status").open("w"))
            _wait_for(own)
        UNWRITTEN[folder] = {**read_status(folder), "time": time.time(), **facts}
        try:
            write_json(folder / "agent-status.json", UNWRITTEN[folder])
        except OSError:
            write_json(unwritten(folder), UNWRITTEN[folder])
        else:
            unwritten(folder).unlink(missing_ok=True)
        del UNWRITTEN[folder]


def _wait_for(stream: IO[str], seconds: float = 2.0) -> None:
    """Lock a file; whoever holds it for longer hangs, and is not waited for."""
    end = now() + seconds
    while now() < end:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)


def successor(folder: Path, pod_id: str) -> Path | None:
    """The folder of the run that this pod was handed on to, if that has its order for this very pod."""
    named = read_json(folder / "successor.json").get("run_id")
    if not named or not pod_id:
        return None
    order = read_json(folder.parent / named / "agent.json")
    return folder.parent / named if (order.get("run_id"), order.get("pod_id")) == (named, pod_id) else None


def authorize_key(key: str | None) -> None:
    """Let a run's launcher in by its own key, for a pod that was handed on knows the first run's alone."""
    named = pod_variables().get("RUNNER_AUTHORIZED_KEYS")
    with suppress(Exception):
        file = Path(named) if named else Path.home() / ".ssh" / "authorized_keys"
        known = file.read_text("utf-8", "replace") if file.exists() else ""
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
    """Until when, in this host's own seconds, held in memory. The order's are the launcher's: only differences are
    taken from it. ValueError for an order without a finite end."""

    def __init__(self, folder: Path, order: dict[str, Any], beat: Path, again: bool = False) -> None:
        """`again`: the pod was ended before, and somebody has started it."""
        self.beat = beat
        self.silence = seconds(order.get("heartbeat_minutes"))
        self.boarding = seconds(order.get("boarding_minutes"))
        """The same for a run that will be left to its pod, until it has begun: somebody is sending it."""
        self.seen, self.heard = 0.0, now()
        self.seen = self._mark()
        sent = float(order["sent"])
        ends = {"deadline": float(order["deadline"]) - sent}
        if order.get("budget_usd") is not None and order.get("usd_per_hour"):
            ends["budget"] = float(order["started"]) + 3600 * order["budget_usd"] / order["usd_per_hour"] - sent
        self.why, left = min(ends.items(), key=lambda end: end[1])
        mine = {"pod_id": order["pod_id"], "order": order["id"]}
        left = _since_armed(folder, mine, left)
        if not all(map(math.isfinite, (left, *ends.values()))):
            raise ValueError(f"the order has no end: {ends}")
        if again:
            left = min(left, SECOND_THOUGHT_SECONDS) if left > 0 else SECOND_THOUGHT_SECONDS
        self.at = now() + left
        self.grace = min(GRACE_SECONDS, max(0.0, left) / 10)
        try:
            write_json(folder / "armed.json", {
                **mine, "boot_id": boot_id(), "at_boot": self.at, "at_wall": time.time() + left,
            })  # fmt: skip
        except Exception as error:  # it is for a restart of the container; this process knows
            log(f"armed.json: {error}")

    def due(self, silence: bool = True, begun: bool = True) -> float:
        """`now()` at which the pod must have ended."""
        mark = self._mark()
        if mark != self.seen:
            self.seen, self.heard = mark, now()
        longest = self._longest(begun) if silence else None
        return self.at if longest is None else min(self.at, self.heard + longest)

    def over(self, silence: bool = True, begun: bool = True) -> str | None:
        """Return the reason to end the pod now, None without one; a launcher's `silence` may be one."""
        due, longest = self.due(silence, begun), self._longest(begun)
        if now() > self.at - self.grace:
            return "the budget is spent" if self.why == "budget" else "the deadline has come"
        return f"no sign of the launcher for {(longest or 0) / 60:.3g} minutes" if now() > due else None

    def _longest(self, begun: bool) -> float | None:
        return self.silence if begun or self.silence is not None else self.boarding

    def _mark(self) -> float:
        try:
            return self.beat.stat().st_mtime
        except Exception:  # not there yet, or not to be read now: nothing was heard
            return self.seen


def _since_armed(folder: Path, mine: dict[str, Any], left: float) -> float:
    """Seconds of an order that are left where the container, or the pod, was started again since it was armed."""
    armed = read_json(folder / "armed.json")
    try:
        if {key: armed.get(key) for key in mine} == mine:
            same = armed.get("boot_id") == boot_id()
            return float(armed["at_boot"]) - now() if same else min(left, float(armed["at_wall"]) - time.time())
        # No disk took that file, perhaps: an order is armed within seconds, and its file says when it came.
        age = time.time() - (folder / "agent.json").stat().st_mtime
        return left - age if age > STALE_SECONDS else left
    except (OSError, KeyError, TypeError, ValueError):
        return left


class DeadManSwitch:
    """The process that outlives all others: it holds the limits, and starts the work as its child."""

    def __init__(self, folder: Path, order: dict[str, object], own: ThisPod, again: bool = False) -> None:
        self.folder, self.order, self.own = folder, order, own
        self.beat = SHM / f"runner-{order['run_id']}.beat"
        self.limits = Limits(folder, order, self.beat, again)
        self.child: int | None = None
        self.held: list[IO[str]] = []
        self._status: dict[str, Any] = {}
        self._refused: Any = None
        """Id of an order that is no order."""

    @property
    def status(self) -> dict[str, Any]:
        """Return the state of the run as last read."""
        self._status = read_status(self.folder) or self._status
        return self._status

    def begin(self) -> None:
        """Start the work, in a process of its own."""
        try:
            self.child = os.fork()
        except OSError as error:
            update_status(
                self.folder, state="failed", exit_code=1, message=f"no process can be started: {error.strerror}"
            )
            return
        if self.child == 0:
            with suppress(BaseException):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.setpgid(0, 0)
                lower_oom_score(0)
                for one in self.held:
                    one.close()
                try:
                    run_task(self.folder)
                except BaseException as error:
                    update_status(self.folder, state="failed", exit_code=1, message=f"{type(error).__name__}: {error}")
            os._exit(0)

    def serve(self) -> Path:
        """Until the pod is gone, or handed on: then the next run's folder."""
        signal.signal(signal.SIGTERM, lambda *_: self._pass_on())
        while True:
            try:
                if (following := self._look()) is not None:
                    return following
            except Exception as error:  # a disk that is gone, no memory: the limits need neither
                log(f"{type(error).__name__}: {error}")
                if reason := self.limits.over():
                    self._end(reason)
            with suppress(Exception):
                self.own.tell_watch(self._due() + WATCH_SECONDS, self._how())
            time.sleep(EVERY_SECONDS)

    def _look(self) -> Path | None:
        """The next run's folder, once the pod is handed on; ends the pod where a limit has come."""
        self._renew()
        reason, status = self.limits.over(begun=self._begun()), self.status
        if self.child is not None and self._worker_is_gone():
            self.child = None
            if self.status.get("state") not in FINAL:
                update_status(
                    self.folder, state="failed", exit_code=1, message="the agent's worker ended without a message"
                )
            return None
        over = self._is_over()
        if self._idle() and (following := successor(self.folder, self.own.id)):
            log(f"the pod is handed on to {following.name}")
            self._leave_child()
            return following
        if over and exists(self.folder / "collected"):
            reason = "everything was collected"
        elif over and self._waits(status):
            reason = self.limits.over(silence=False)
        elif reason is None and over and self.order.get("heartbeat_minutes") is None:
            reason = "the run is over"
        if reason is not None:
            self._end(reason)
        return None

    def _renew(self) -> None:
        """A newer order, for this pod; a `fresh` one is that of a run that begins again in a pod that was kept."""
        order = read_json(self.folder / "agent.json")
        if order.get("id") in (None, self.order["id"], self._refused) or order.get("pod_id") != self.own.id:
            return
        try:
            limits = Limits(self.folder, order, self.beat)
        except Exception as error:
            log(f"an invalid order, the previous one stays in force: {type(error).__name__}: {error}")
            self._refused = order["id"]
            return
        log(f"a new order: {order['id']}")
        again = bool(order.get("fresh")) and self.child is None
        self.order, self.limits = order, limits
        if again:
            (self.folder / "collected").unlink(missing_ok=True)
            update_status(self.folder, **ANEW, over=self.status.get("task"), order=order["id"])
            self.begin()
        else:
            update_status(self.folder, order=order["id"])

    def _worker_is_gone(self) -> bool:
        assert self.child is not None
        try:
            return os.waitpid(self.child, os.WNOHANG)[0] != 0
        except OSError:
            return True

    def _end(self, reason: str) -> None:
        """Have the training save what it has, then end the pod."""
        keeps = self.order.get("keep") or self.order.get("uncollected") == "stop"
        status, how = self._status, "stop" if keeps else "terminate"  # a result may be on a disk that does not answer
        with suppress(Exception):
            status, how = self.status, self._how()
        until = now() + max(self.limits.grace, 1.0)
        self.own.tell_watch(until + WATCH_SECONDS, how)
        log(f"ends the pod ({how}): {reason}")
        with suppress(Exception):
            self._end_work(until)
        update_status(self.folder, state="ending", ended_in=status.get("state"), message=reason, how=how)
        with suppress(Exception):  # a broken disk never ends to be written to
            sync = threading.Thread(target=os.sync, daemon=True)
            sync.start()
            sync.join(SYNC_SECONDS)
        self.own.end(how)

    def _end_work(self, until: float) -> None:
        if self.child is None:
            return
        self._pass_on()
        while self.status.get("pid") and now() < until and not self._worker_is_gone():
            time.sleep(0.1)
        kill_group(self.status.get("pid"), signal.SIGKILL)
        kill_group(self.child, signal.SIGKILL)

    def _begun(self) -> bool:
        return self.status.get("state") != "armed"

    def _is_over(self) -> bool:
        return self.child is None and self.status.get("state") in FINAL

    def _idle(self) -> bool:
        """Nothing is at work: also in a pod that was ended and started again, or that waits for a task."""
        state = self.status.get("state")
        return self._is_over() or state == "armed" or (self.child is None and state == "ending")

    def _leave_child(self) -> None:
        """End the work's process, which waits for a task that will not come."""
        if self.child is not None:
            kill_group(self.child, signal.SIGKILL)
            with suppress(OSError):
                os.waitpid(self.child, 0)
            self.child = None

    def _due(self) -> float:
        return self.limits.due(not (self._is_over() and self._waits(self.status)), self._begun())

    def _waits(self, status: dict[str, object]) -> bool:
        """No disk outlives this pod, and nobody else has the result: it is kept until the deadline."""
        return self.order.get("uncollected") == "wait" and not status.get("uploaded")

    def _how(self) -> str:
        """Stopped, a pod keeps its volume disk, for cents: where that has what nobody else has yet."""
        status = self.status
        if self.order.get("keep"):
            return "stop"
        begun = status.get("state") in ("training", "uploading", "done", "failed", "ending")
        if not begun or exists(self.folder / "collected") or status.get("uploaded"):
            return "terminate"
        return "stop" if self.order.get("uncollected") == "stop" else "terminate"

    def _pass_on(self) -> None:
        pid = self.status.get("pid")
        if pid:
            with suppress(*NO_PROCESS):
                os.kill(int(pid), signal.SIGTERM)


NO_PROCESS = (OSError, OverflowError, TypeError, ValueError)
"""What the number of a process raises that is gone, or of a status that is garbage."""
INSTALL_LOG = "install.log"
"""Of packages that are installed: their scripts get no token."""
ANEW = {"state": "armed", "task": None, "starts": 0, "exit_code": None, "message": None, "pid": None, "uploaded": None,
        "ended_in": None, "how": None}  # fmt: skip
"""Status of a run that begins again."""


def kill_group(pid: Any, number: int) -> None:
    """All processes that a leader has started."""
    with suppress(*NO_PROCESS):
        if int(pid) > 1:
            os.killpg(int(pid), number)


# --- the work --------------------------------------------------------------------------------------------------------


def run_task(folder: Path) -> None:
    """Wait for what to do; install, train, upload. Every state is in the status before it begins."""
    status, switch = read_status(folder), os.getppid()
    while True:
        if os.getppid() != switch:  # killed; whoever follows it has a process of its own for the work
            return
        task = read_json(
            folder / "work.json"
        )  # an earlier pod's, on a volume, or what this pod has done, is not for now
        if task.get("pod_id") == status["pod_id"] and task.get("id") not in (None, status.get("over")):
            break
        time.sleep(EVERY_SECONDS)
    starts = int(status.get("starts", 0)) + 1
    if status.get("state") in FINAL and status.get("task") == task["id"]:
        return  # the container was restarted after the end
    if status.get("task") != task["id"]:
        starts = 1
    if starts > MAX_STARTS:
        update_status(
            folder, state="failed", exit_code=1, message=f"the container was restarted {MAX_STARTS - 1} times"
        )
        return
    update_status(folder, state="installing", task=task["id"], starts=starts, exit_code=None, message=None)
    await_secrets(folder, task)
    python = install(folder, task)
    if python is None:
        message = "installing failed: logs/install.log says why"
        update_status(folder, state="failed", exit_code=1, message=message)
        return
    code = train(folder, task, python)
    if code == 0 and task.get("after"):
        update_status(folder, state="uploading", pid=None)
        uploaded = run_command(folder, task, [python, *task["after"]], "upload.log") == 0
        said = None if uploaded else "the upload failed: logs/upload.log says why; the model is in this pod"
        update_status(folder, uploaded=uploaded, message=said)
    update_status(folder, state="done" if code == 0 else "failed", exit_code=code, pid=None)


def await_secrets(folder: Path, task: dict[str, object], seconds: float = 30.0) -> None:
    """Wait for the secrets, which a restart deletes from memory; an attached launcher sends them again."""
    end = now() + seconds
    while task.get("secrets") and now() < end and not (SHM / f"runner-{folder.name}.env").exists():
        time.sleep(EVERY_SECONDS)


def install(folder: Path, task: dict[str, Any]) -> str | None:
    """The Python that trains; None if there is none."""
    if not task.get("install"):
        return str(task["python"])
    code = run_command(folder, task, [sys.executable, *task["install"]], INSTALL_LOG)
    return read_json(folder / "install.json").get("python") if code == 0 else None


def train(folder: Path, task: dict[str, Any], python: str) -> int:
    """The exit code of the training."""
    over = threading.Event()
    threading.Thread(target=sample_gpus, args=(folder, over), daemon=True).start()
    code = run_command(folder, task, [python, *task["command"]], "worker.log", state="training")
    over.set()
    return code


def run_command(folder: Path, task: dict[str, Any], command: list[str], name: str, state: str | None = None) -> int:
    """Run to the end, in a process group of its own; its words go to a log."""
    with (folder / "logs" / name).open("ab") as words:
        process = subprocess.Popen(
            command, cwd=task.get("cwd"), env=environment(folder, task, name != INSTALL_LOG), stdin=subprocess.DEVNULL,
            stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    update_status(folder, pid=process.pid, **({"state": state} if state else {}))
    code = process.wait()
    log(f"{name}: exit code {code}")
    return code if code >= 0 else 128 - code


def environment(folder: Path, task: dict[str, Any], told: bool = True) -> dict[str, str]:
    """The pod's, the task's, and the secrets where they are `told`; without the key that ends the pod."""
    secrets = read_json(SHM / f"runner-{folder.name}.env") if told else {}
    env = {**pod_variables(), **task.get("env", {}), **secrets}
    for name in KEYS:
        env.pop(name, None)
    return env


def sample_gpus(folder: Path, over: threading.Event, every: float = 5.0) -> None:
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
        following = arm_and_serve(following, held)
    return 0


def arm_and_serve(folder: Path, held: list[IO[str]]) -> Path | None:
    """Arm the switch of one run, then let its work begin; the folder of the run that has the pod next."""
    order = read_json(folder / "agent.json")
    own = ThisPod(order)
    if not order or order.get("pod_id") != own.id:
        log(f"the order is for pod {order.get('pod_id')}, and this is {own.id}")
        return None
    if held:
        redirect_output(folder)
    if not lock_run(folder.name, held):
        log("another agent is already running")
        return None
    order = read_json(folder / "agent.json") or order  # it may have stood by for long
    if following := successor(folder, own.id):
        return following
    authorize_key(order.get("public_key"))
    before = previous_status(folder, order, own.id)
    switch = DeadManSwitch(folder, order, own, again=before.get("state") == "ending")
    switch.held = held
    lower_oom_score()
    own.tell_watch(switch.limits.due() + WATCH_SECONDS, "terminate")
    with suppress(OSError):
        write_json(folder / "agent-status.json", before)
    if not before.get("state"):
        with suppress(OSError):
            (folder / "collected").unlink()
    right = own.may_end()
    facts = {"pod_id": own.id, "agent": os.getpid(), "order": order["id"], "right_to_end": right, "pid": None}
    if order.get("heartbeat_minutes") is None and not right:
        update_status(
            folder, state="refused", **facts, exit_code=1, message="this pod may not end itself: its key is refused"
        )
        return None  # nothing is here yet; the launcher ends the pod
    again = before.get("state") not in (None, "refused")
    update_status(folder, state=before["state"] if again else "armed", **facts, armed=time.time())
    for name in FOLDERS:
        with suppress(OSError):
            (folder.parent.parent / name).mkdir()
    if before.get("state") != "ending":  # ended on purpose and started again: somebody wants to have a look
        switch.begin()
    return switch.serve()


def lock_run(run_id: str, held: list[IO[str]]) -> bool:
    """Lock the run for this agent; False if another agent has it. Without working locks it continues unlocked.

    Of a run that was handed the pod, another agent may be at work: this one stands by. The lock of a run that had the
    pod before, and has it again, is held already.
    """
    file = SHM / f"runner-{run_id}.lock"
    if any(stream.name == str(file) for stream in held):
        return True
    try:
        stream = file.open("w")
        held.append(stream)
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if len(held) > 1 else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        log(f"no lock: {error}")
    return True


def previous_status(folder: Path, order: dict[str, object], pod_id: str) -> dict[str, Any]:
    """The run's status from before this process, if it is of this pod."""
    status = read_json(folder / "agent-status.json")
    if status.get("pod_id") != pod_id:
        return {}
    over = status.get("state") in (*FINAL, "ending")
    if over and order.get("fresh") and status.get("order") != order["id"]:  # in a pod that was kept
        return {"over": status.get("task")}
    if over and exists(folder / "collected"):  # ended and started again; somebody may want something of it
        (folder / "collected").unlink(missing_ok=True)
        return {**status, "state": "ending", "ended_in": status.get("ended_in") or status.get("state")}
    return status


def redirect_output(folder: Path) -> None:
    """Standard output and error go to the run's `logs/agent.log` from here on, where that can be written."""
    with suppress(OSError):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        words = os.open(folder / "logs" / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for target in (1, 2):
            os.dup2(words, target)
        os.close(words)


def lower_oom_score(score: int = -900) -> None:
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
            redirect_output(folder)
            os._exit(run(folder))
        os._exit(0)
    os.wait()
    own, deadline = ThisPod(read_json(folder / "agent.json")).id, now() + 60
    while now() < deadline:
        while following := successor(folder, own):
            folder = following
        status = read_status(folder)
        if status.get("order") == read_json(folder / "agent.json").get("id") and status.get("right_to_end") is not None:
            print(json.dumps(status))
            return 0
        time.sleep(0.1)
    print(json.dumps({"state": "silent"}))
    return 1


if __name__ == "__main__":
    verbs = {"start": start, "run": run}
    sys.exit(verbs[sys.argv[1]](Path(sys.argv[2]).absolute()))
