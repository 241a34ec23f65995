"""The run directory: unique, never overwritten, every small file written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, cast

from runner.config import json_text
from runner.errors import Problem, RequestError
from runner.rundir import json_files, plain_files

if TYPE_CHECKING:  # pydantic: 0.1 s, for nothing where runs are only listed
    from typing_extensions import Unpack

    from runner.rundir.json_files import EvalLine, MetricsLine, State, Status, StatusFacts, Subject, Summary
    from runner.spec import RunSpec

ACTIVE = ("created", "loading", "evaluating", "training", "saving")
"""States of a run whose process should be alive; the others are done, failed, interrupted."""

YAML_FILE = "training.yaml"
"""The same values as `spec.json`."""

PHASE_OF_STATE = {"loading": "load", "evaluating": "eval", "training": "train", "saving": "save"}
"""Names of the states in a plan; `train` is its forward, backward and step."""


@dataclass(frozen=True)
class RunDir:
    """`runs/<id>/` and what it holds (docs/reference.md lists the files)."""

    path: Path

    @classmethod
    def create(cls, spec: RunSpec, sweep: str | None = None) -> RunDir:
        """A new directory with `spec.json` in it; the id is name (`name_of`), time and four random digits.

        RequestError where `run.output_dir` cannot be written to.
        """
        while True:
            name = f"{name_of(spec)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
            run = cls(Path(spec.run.output_dir).expanduser() / name)
            try:
                run.path.mkdir(parents=True)
                break
            except FileExistsError:  # 1 in 65,536 for two runs of one second
                continue
            except OSError as error:
                problem = Problem(f"run.output_dir={spec.run.output_dir} cannot be written to: {error.strerror}")
                raise RequestError(problem) from None
        (run.path / "logs").mkdir()
        run.write_spec(spec)
        run.set_status("created", sweep=sweep, created=time.time(), **facts_of(spec))
        return run

    @classmethod
    def at(cls, path: Path) -> RunDir | None:
        """The run at `path`: its directory, its `spec.json`, or its id below `runs/`; None where there is none."""
        folder = run_folder(path)
        return next((cls(p) for p in (folder, Path("runs") / folder) if (p / "spec.json").is_file()), None)

    @classmethod
    def find(cls, path: Path) -> RunDir:
        """As `at`; RequestError where there is none, or where its model is not plain files."""
        run = cls.at(path)
        if run is None:
            raise RequestError(no_such_run_problem(path))
        plain_files.refuse_special_files(run.path / "model")
        return run

    @property
    def id(self) -> str:
        """The directory's own name."""
        return self.path.name or self.path.resolve().name  # `.`

    @property
    def spec_file(self) -> Path:
        """The resolved run, which repeats it: `python -m runner runs/<id>/spec.json`."""
        return self.path / "spec.json"

    @property
    def spec(self) -> RunSpec:
        """The resolved run; RequestError with every key that somebody has made wrong in `spec.json`."""
        from runner.spec import RunSpec  # pydantic: 0.1 s, for nothing where runs are only listed

        try:
            return RunSpec.model_validate(json_text.loads(self.spec_file.read_text("utf-8")))
        except (OSError, ValueError):
            from runner.config.spec_json import load_spec  # the words for it

            return load_spec(self.spec_file)

    def write_spec(self, spec: RunSpec) -> None:
        """`spec.json`, and `training.yaml` with the same values for people to read, change and start from."""
        from runner.config.conf_files import dump_yaml  # YAML and OmegaConf: nothing that a list of runs needs

        content = spec.model_dump(mode="json")
        self.write("spec.json", content)
        write_atomically(self.path / YAML_FILE, dump_yaml(content))

    def write(self, name: str, content: object) -> None:
        """Write JSON so that a reader, or the next command after a crash, sees the old file or the new one."""
        write_atomically(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files; empty if it is not there or not readable."""
        try:
            return json_text.object_of((self.path / name).read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            return {}

    @property
    def status(self) -> Status:
        """`status.json`; empty if it is not there or not readable."""
        return cast("Status", json_files.of_type(self.read("status.json"), json_files.Status))

    @property
    def summary(self) -> Summary:
        """`summary.json` of a run that is done; else empty."""
        return cast("Summary", json_files.of_type(self.read("summary.json"), json_files.Summary))

    def set_status(self, state: State, **facts: Unpack[StatusFacts]) -> None:
        """Move to `state`, keep the facts already there, stamp time, process and machine."""
        stamp = {"run_id": self.id, "state": state, "pid": os.getpid(), "host": socket.gethostname()}
        stamp["born"] = process_birth(os.getpid())
        self.write("status.json", {**self.read("status.json"), **stamp, "updated": time.time(), **facts})

    def spent(self) -> float:
        """Seconds of work on it so far, over all its starts: the time in which nobody worked on it does not count."""
        status = self.status
        started, before = status.get("started"), float(status.get("spent", 0.0))
        if started is None:
            return before
        seen = [float(line.get("time", 0.0)) for line in (*self.metrics(), *self.evals())]
        return before + max(0.0, max([float(status.get("updated", started)), *seen]) - float(started))

    def state(self, status: Status | None = None) -> str:
        """The state, or `killed` where the process that should be at work is gone; `status` is what was read of it."""
        status = self.status if status is None else status
        state = str(status.get("state", "unknown"))
        if state not in ACTIVE:
            return state
        if status.get("host") == socket.gethostname():
            return state if is_alive(status.get("pid"), status.get("born")) else "killed"
        # Another name of this machine, or a container on it, whose processes are not to be seen from here: its lock is.
        boot = str(process_birth(os.getpid())).partition(":")[0]
        return "killed" if str(status.get("born")).startswith(f"{boot}:") and self._unowned() else state

    def _unowned(self) -> bool:
        """No process of this machine holds the run's lock (lock.py), which it has."""
        try:
            import fcntl  # not on Windows, where there are no such locks

            with (self.path / ".owner").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (OSError, ImportError):
            return False
        return True

    def metrics(self) -> Iterator[MetricsLine]:
        """Lines of `metrics.jsonl`, one per optimiser step."""
        return cast("Iterator[MetricsLine]", self._lines("metrics.jsonl", json_files.MetricsLine))

    def evals(self) -> Iterator[EvalLine]:
        """Lines of `evals.jsonl`, one per measurement of the held-out loss."""
        return cast("Iterator[EvalLine]", self._lines("evals.jsonl", json_files.EvalLine))

    def cut_after(self, step: int) -> None:
        """Forget the lines of later steps: they are done again."""
        for name, kind in (("metrics.jsonl", json_files.MetricsLine), ("evals.jsonl", json_files.EvalLine)):
            lines = list(self._lines(name, kind))
            kept = [line for line in lines if line.get("step", math.inf) <= step and step]
            if len(kept) < len(lines):
                write_atomically(self.path / name, "".join(json.dumps(line) + "\n" for line in kept))

    def _lines(self, name: str, kind: type) -> Iterator[dict[str, Any]]:
        """JSON lines; one that is no object, such as a last one cut short by a kill, is passed over."""
        try:
            lines = (self.path / name).read_text("utf-8", errors="replace").split("\n")
        except OSError:
            return
        for line in lines:
            try:
                content = json_text.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield json_files.of_type(content, kind)


def run_folder(path: Path) -> Path:
    """A run's directory, named by itself or by its `spec.json`."""
    return path.parent if path.name == "spec.json" else path


def run_id_of(words: str) -> str:
    """The id in `runs/<id>`, `runs/<id>/spec.json`, `.` or `<id>`; empty for an empty word, which is no path."""
    return RunDir(run_folder(Path(words))).id if words else ""


def run_without_spec(path: Path) -> RunDir | None:
    """The directory of a run at `path`, or of that id below `runs/`, whose `spec.json` is lost."""
    places = [RunDir(p) for p in (path, Path("runs") / path) if (p / "status.json").is_file()]
    return next((run for run in places if not run.spec_file.is_file()), None)


def no_such_run_problem(path: Path) -> Problem:
    """There is no run at `path`; the one whose id is nearest."""
    from runner.config.did_you_mean import nearest  # the schema, as above

    if damaged := run_without_spec(path):
        from runner.config.spec_json import how_to_restore

        what = f"{display_path(damaged.path)} is no run: it has no spec.json"
        return Problem(what, "command line", how_to_restore(damaged.spec_file))
    parent = path.parent if path.parent.is_dir() and path.parent != Path() else Path("runs")
    near = nearest(path.name, [run.id for run in all_runs(parent)])
    remedy = f"did you mean {quote(str(parent / near))}?" if near else "python -m runner runs shows them"
    return Problem(f"there is no run {path}", "command line", remedy)


def name_of(spec: RunSpec) -> str:
    """`run.name`, else what tells it from others: model and method, the objective and the data where they are not the
    main job's: `phi2-lora`, `phi2-lora-dpo-pairs`."""
    if spec.run.name:
        return spec.run.name
    data = spec.data
    about = Path(data.path).name.partition(".")[0] if data.source == "file" and data.path else data.name
    about = re.sub(r"[^A-Za-z0-9_]+", "-", about).strip("-")[:32]
    parts = [spec.model.name, spec.method.name]
    parts += [spec.objective.name] if spec.objective.name != "sft" else []
    parts += [about] if about and about != "commands" else []
    return "-".join(parts)


def facts_of(spec: RunSpec) -> Subject:
    """Facts of a run that `runs` shows: kept in `status.json`, as a list of a thousand runs reads no specs."""
    data = spec.data
    return {
        "model": spec.model.name,
        "method": spec.method.name,
        "objective": spec.objective.name,
        "data": data.path if data.source == "file" and data.path else data.name,
        "learning_rate": spec.train.learning_rate,
    }


def runs_in(output_dir: Path) -> list[RunDir]:
    """Every run below `output_dir`, in no order."""
    return [RunDir(file.parent) for file in output_dir.glob("*/status.json")]


def all_runs(output_dir: Path) -> list[RunDir]:
    """Every run below `output_dir`, oldest first."""
    return sorted(runs_in(output_dir), key=lambda run: (run.status.get("created", 0.0), run.id))


def text_of(file: Path) -> str:
    """What a file holds; nothing where it cannot be read."""
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def write_atomically(file: Path, text: str) -> None:
    """Temporary file beside it, fsync, rename."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def process_birth(pid: object) -> str | None:
    """Return boot id and start tick of a process, which identify it when its id is reused. None for a missing process,
    or without /proc."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text('utf-8').strip()}:{ticks}"
    except OSError:
        return None


def is_alive(pid: Any, born: str | None = None) -> bool:
    """The process `pid`, which was `born` then, runs on this machine. A zombie is not: in a container whose
    first process does not collect orphans it stays for ever."""
    try:
        os.kill(int(pid), 0)
        if born and process_birth(pid) not in (born, None):
            return False
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except FileNotFoundError:  # gone just now; on macOS there is no /proc
        return not Path("/proc/self").exists()
    except OSError:  # somebody else's
        return True


def display_path(path: Path) -> str:
    """A path as one would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


@dataclass(frozen=True)
class Outcome:
    """Result of a worker."""

    run: RunDir
    exit_code: int
    stopped_for: str | None = None
    """Why a run in a pod was stopped from here, such as its cap."""
