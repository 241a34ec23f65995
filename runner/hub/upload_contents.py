"""Contents of an upload: the model with its card and spec, or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.hub.model_card import base_name, card
from runner.hub.upload_targets import Files, Target
from runner.report.text import dump
from runner.rundir import checkpoints, plain_files
from runner.rundir.directory import RunDir
from runner.spec import RunInfo, RunSpec
from runner.spec.input_paths import is_url, named_places, put_place

BESIDE = ("summary.json", "loss.png")
"""What goes along with the weights, the card and the spec."""
RECORD = "pushed.json"
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints there."""


def push_model(run: RunDir, spec: RunSpec, folder: Path, target: Target) -> dict[str, Any]:
    """Upload `model/` or `merged/`, and record it in `pushed.json`; its address, and the files that went.

    RequestError for a folder with links.
    """
    files = _files(run, spec, folder, target.repo)
    done = target.send(files, run.id)
    run.write(RECORD, {**run.read(RECORD), **done, "folder": folder.name})
    return {**done, "files": sorted(files)}


def push_checkpoint(run: RunDir, folder: Path, step: int, keep: int, target: Target) -> None:
    """Upload a whole checkpoint as it is, so that a run can go on from it, and delete all but the last `keep` there."""
    files: dict[str, Path | bytes] = {
        f"{CHECKPOINTS}/checkpoint-{step}/{file.relative_to(folder)}": file
        for file in sorted(folder.rglob("*"), key=lambda file: file.name == checkpoints.MARKER)  # what makes it count
        if file.is_file()
    }
    there = sorted(
        (name for name in target.folders(CHECKPOINTS) if name != f"checkpoint-{step}"),
        key=lambda name: int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else -1,
    )
    old = [f"{CHECKPOINTS}/{name}" for name in there[: max(0, len(there) + 1 - keep)]]
    done = target.send(files, f"{run.id}, the checkpoint after step {step}", old)
    run.write(RECORD, {**run.read(RECORD), **done, "checkpoint": step})


def _files(run: RunDir, spec: RunSpec, folder: Path, repo: str | None) -> Files:
    plain_files.refuse_special_files(folder, *(run.path / name for name in BESIDE))
    beside = [name for name in BESIDE if (run.path / name).is_file()]
    adapter = (folder / "adapter_config.json").is_file()
    text = card(spec, run, repo, adapter=adapter, picture="loss.png" in beside)
    files: dict[str, Path | bytes] = {
        str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    files |= {name: run.path / name for name in beside}
    if summary := run.summary:
        files["summary.json"] = dump({key: value for key, value in summary.items() if key != "model_dir"}).encode()
    files |= {"README.md": text.encode(), "spec.json": dump(_portable(spec)).encode()}
    if adapter:
        files["adapter_config.json"] = _with_base(folder / "adapter_config.json", spec)
    return files


def _portable(spec: RunSpec) -> dict[str, Any]:
    """The spec without the folders of this machine, or pod: whoever repeats the run has the files beside it."""
    values = spec.model_dump(mode="json")
    for key, path in named_places(spec):
        if not is_url(path):
            put_place(values, key, Path(path).name)
    if Path(spec.run.output_dir).is_absolute():
        values["run"]["output_dir"] = RunInfo.model_fields["output_dir"].default
    return values


def _with_base(file: Path, spec: RunSpec) -> bytes:
    """The adapter's settings; a base in a folder of this machine is called by its name."""
    config = json.loads(file.read_text("utf-8"))
    if str(config.get("base_model_name_or_path") or "").startswith("/"):
        config["base_model_name_or_path"] = base_name(spec)
    return dump(config).encode()
