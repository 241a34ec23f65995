"""Local files that a run needs in its pod, named by their content.

A volume that has a parcel already is not sent it twice; and a spec whose paths name parcels is the same on every pod.
What is not here, such as a URL, a name, or a place on the pod's own disk, stays as it is.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runner.data import prepared_index
from runner.errors import Problem, RequestError
from runner.paths import cache_dir
from runner.rundir import plain_files
from runner.spec import LocalPlace, RunSpec
from runner.spec.input_paths import is_glob, is_url, named_places, put_place

BLOCK = 1 << 20


@dataclass(frozen=True)
class PayloadItem:
    """A file or folder that travels."""

    key: str
    """The key of the spec that names it, such as `data.path`."""
    source: Path
    target: str
    """Where it belongs, below the workspace."""
    size: int
    """Bytes."""
    inner: str = ""
    """What the key says below the target: a glob."""
    files: tuple[str, ...] | None = None
    """Of a folder: what is in it or fits the glob, by the names there. A link to a folder is not followed, as nobody
    reads through one; a link to a file travels as the file."""


def payload_items(spec: RunSpec) -> list[PayloadItem]:
    """Everything on this machine that the spec names. RequestError for a relative path that is not there."""
    found = [_payload_item(key, value) for key, value in named_places(spec)]
    return [item for item in found if item is not None]


def tokens(spec: RunSpec) -> list[PayloadItem]:
    """What `data prepare` has made for this run, for the pod's own cache, where the run looks first."""
    found = []
    for name in prepared_index.entries(spec):
        folder = cache_dir() / name
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        found.append(PayloadItem("tokens", folder, f"cache/runner/{name}", sum(files.values()), files=tuple(files)))
    return found


def rewritten(spec: RunSpec, workspace: str, found: Iterable[PayloadItem]) -> RunSpec:
    """The spec as the pod runs it: its own paths, and a place that is here."""
    values = spec.model_dump(mode="json")
    for item in found:
        put_place(values, item.key, f"{workspace}/{item.target}{item.inner}")
    there = RunSpec.model_validate(values)
    run = there.run.model_copy(update={"output_dir": f"{workspace}/runs"})
    return there.model_copy(update={"run": run, "where": LocalPlace()})


def _payload_item(key: str, value: str) -> PayloadItem | None:
    """None for what is not on this machine, or need not be."""
    source, inner = Path(os.path.abspath(Path(value).expanduser())), ""
    names: list[str] = []
    if source.is_dir():
        if any((above / "spec.json").is_file() for above in source.parents):  # of a run, which a pod may have made
            plain_files.refuse(source)
        names = [str(file.relative_to(source)) for file in sorted(source.rglob("*")) if file.is_file()]
    elif not source.exists() and is_glob(value):
        source, inner, names = _matched(source)
    if not names and not source.is_file():
        _refuse_if_wanted(key, value)
        return None
    digest = hashlib.sha256()
    size = 0
    for name in names or [""]:
        file = source / name if name else source
        digest.update(f"{name or file.name}\0{file.stat().st_size}\0".encode())
        size += file.stat().st_size
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    shelf = "artifacts" if source.is_dir() and not inner else "datasets"
    target = f"{shelf}/{digest.hexdigest()[:16]}/{source.name}"
    return PayloadItem(key, source, target, size, inner, tuple(names) or None)


def _matched(pattern: Path) -> tuple[Path, str, list[str]]:
    """The folder in which a glob begins, the rest of it, and the files that fit, as it names them there."""
    fixed = next(number for number, part in enumerate(pattern.parts) if is_glob(part))
    base, rest = Path(*pattern.parts[:fixed]), "/".join(pattern.parts[fixed:])
    return base, f"/{rest}", sorted(n for n in glob.glob(rest, root_dir=base, recursive=True) if (base / n).is_file())


def _refuse_if_wanted(key: str, value: str) -> None:
    """RequestError for data that should have been here."""
    if key.startswith("data.") and not is_url(value) and not os.path.isabs(value):
        raise RequestError(Problem(f"{key}={value} is not there", None, "name a file or folder of this machine"))
