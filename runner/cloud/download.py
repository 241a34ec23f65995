"""Download a run from a pod: logs, the newest checkpoint, the model, and the completion marker last.

The pod is a stranger's machine: what it sends arrives in a folder of its own, is looked through there
(untrusted_files.py), and only plain files with names that are not ours go on to their place.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from fnmatch import fnmatch

from runner.cloud import untrusted_files
from runner.cloud.transfer import PodRunFolder, Say
from runner.config import json_text
from runner.paths import cache_dir
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, write_atomically
from runner.spec import RunSpec

OURS = ("spec.json", "training.yaml", "status.json", "plan.json", "deepspeed.json", "pod.json", "agent.json",
        "agent.py", "tail.py", "install.py", "work.json", "install-order.json", "armed.json", "collected",
        "checkpoints", "successor.json", ".*", "*.tmp", "*.new", "summary.json", "report.html",
        "origins.json")  # fmt: skip
"""What of the pod's folder does not come back as it is: this run directory has its own, or it is read by itself."""

ARRIVED = ".arrived"
"""Folder of the run directory for what comes from a pod, until it was looked through."""
LAST = "summary.json"
TOLD = 5


def download_run(at: PodRunFolder, run: RunDir, spec: RunSpec, say: Say = lambda line: None) -> dict[str, object]:
    """Download all of a run; the pod's `status.json`.

    LostError where the connection breaks: called again, it goes on there. TooMuchError where it is more than there is
    room for here, or than a run can hold. It is on the disk then: OSError where the disk does not take it.
    """
    folder, arrived = shlex.quote(at.folder), run.path / ARRIVED
    excluded = [word for name in OURS for word in ("--exclude", f"/{name}")]
    known = f"--link-dest={run.path.absolute()}"  # what is here already does not travel again
    try:
        left = at.connection.get(
            f"{at.folder}/", arrived, options=[*excluded, known, "--delete"], most=untrusted_files.max_bytes(run)
        )
    except untrusted_files.TooMuchError:
        shutil.rmtree(arrived, ignore_errors=True)
        raise
    status = json_text.object_of(at.connection.attempt(f"cat {folder}/status.json")[1])
    step = max(_complete_there(at), default=None)
    if step is not None and step not in checkpoints.complete(run):
        download_checkpoint(at, run, step, say)
    places = {f"{at.workspace}/cache/runner": str(cache_dir())}
    theirs = json_text.object_of(at.connection.attempt(f"cat {folder}/spec.json")[1]).get("model")
    if isinstance(theirs, dict):  # it is sent after the agent
        places[str(theirs.get("id"))] = spec.model.id
    if at.connection.attempt(f"test -e {folder}/summary.json")[0] == 0:
        left += at.connection.get(f"{at.folder}/summary.json", arrived, most=untrusted_files.max_bytes(run))
    _take(run, [*left, *untrusted_files.delete_special_files(arrived)], places, say)
    untrusted_files.flush_folder(run.path)  # the pod, which has it too, is ended next
    return status


def download_checkpoint(at: PodRunFolder, run: RunDir, step: int, say: Say = lambda line: None) -> None:
    """Download a checkpoint's files, then the marker that completes it."""
    source, target = f"{at.folder}/checkpoints/checkpoint-{step}", checkpoints.folder(run, step)
    target.mkdir(parents=True, exist_ok=True)
    try:
        left = at.connection.get(
            f"{source}/", target, options=["--exclude", checkpoints.MARKER], most=untrusted_files.max_bytes(run)
        )
        left += at.connection.get(f"{source}/{checkpoints.MARKER}", target, most=untrusted_files.max_bytes(run))
    except untrusted_files.TooMuchError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    _say_refused([*left, *untrusted_files.delete_special_files(target)], say)


def _complete_there(at: PodRunFolder) -> list[int]:
    listed = at.connection.attempt(f"ls -d {shlex.quote(at.folder)}/checkpoints/*/COMPLETE 2>/dev/null")[1]
    found = re.findall(r"/checkpoint-(\d{1,12})/COMPLETE$", listed, re.MULTILINE | re.ASCII)
    return [int(step) for step in found]


def _take(run: RunDir, refused: list[str], places: dict[str, str], say: Say) -> None:
    """Move what has arrived into the run directory, last the file that says that it is whole."""
    arrived = run.path / ARRIVED
    files = [str(file.relative_to(arrived)) for file in sorted(arrived.rglob("*")) if file.is_file()]
    theirs = [name for name in files if not any(fnmatch(name.split("/")[0], ours) for ours in OURS)]
    refused += _moved(run, theirs)
    _rename(run, places)
    refused += _moved(run, [name for name in files if name == LAST])
    shutil.rmtree(arrived, ignore_errors=True)
    _say_refused(refused, say)


def _moved(run: RunDir, names: list[str]) -> list[str]:
    """Move files; those that could not be moved, and why."""
    refused = []
    for name in names:
        try:
            untrusted_files.move(run.path / ARRIVED, run.path, name)
        except OSError as error:
            refused.append(f"{name!a}: {error.strerror or error}")
    return refused


def _say_refused(refused: list[str], say: Say) -> None:
    for name in refused[:TOLD]:
        say(f"Warning: not taken from the pod, for it is no plain file of the run: {name}")
    if len(refused) > TOLD:
        say(f"Warning: and {len(refused) - TOLD} more")


def _rename(run: RunDir, places: dict[str, str]) -> None:
    """Rewrite paths of the pod in the model's configuration, so that plain peft finds the base here."""
    for name in ("adapter_config.json", "config.json"):
        file = run.path / "model" / name
        if file.is_file():
            text = before = file.read_text("utf-8")
            for there, here in places.items():
                if there.startswith("/"):
                    text = text.replace(json.dumps(there)[:-1], json.dumps(here)[:-1])
            if text != before:
                write_atomically(file, text)
