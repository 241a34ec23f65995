"""Files that are uploaded to a pod: this project as a wheel, and local files of a run, named by their content.

A volume that has an item already is not sent it twice; and a spec whose paths name items is the same on every pod.
What is not here, such as a URL, a name, or a place on the pod's own disk, stays as it is. The wheel is unpacked and put
on PYTHONPATH there, not installed: its dependencies have an environment of their own that outlives versions of it.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import importlib.metadata
import io
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import runner
from runner import paths
from runner.data import prepared_index
from runner.errors import CannotRunError, Problem, RequestError
from runner.paths import cache_dir
from runner.report.invocation import PROJECT
from runner.rundir import plain_files
from runner.rundir.directory import text_of
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


def prepared_tokens(spec: RunSpec) -> list[PayloadItem]:
    """Return the token cache written by `data prepare` for this run."""
    found = []
    for name in prepared_index.prepared_folders(spec):
        folder = cache_dir() / name
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        found.append(PayloadItem("tokens", folder, f"cache/runner/{name}", sum(files.values()), files=tuple(files)))
    return found


def spec_for_pod(spec: RunSpec, workspace: str, found: Iterable[PayloadItem]) -> RunSpec:
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
            plain_files.refuse_special_files(source)
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


NOT_THERE = ("hydra-core", "omegaconf", "hydra-joblib-launcher", "click")
"""What only the command line needs: a run arrives composed."""
EPOCH = (1980, 1, 1, 0, 0, 0)
ASSETS = {"conf": paths.CONF, "recipes": paths.RECIPES, "deepspeed_configs": paths.DEEPSPEED_CONFIGS}


def packed_wheel() -> tuple[str, bytes]:
    """File name and content."""
    stem = f"{PROJECT.replace('-', '_')}-{runner.__version__}"
    files = dict(sorted(_wheel_files().items()))
    info = f"{stem}.dist-info"
    files[f"{info}/METADATA"] = _wheel_metadata().encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: runner\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_wheel_sum(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return f"{stem}-py3-none-any.whl", held.getvalue()


def training_requirements() -> list[str]:
    """Return pip requirements for training: the core and the extra `train`, without packages that only the command line
    needs."""
    try:
        listed = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        what = "what a pod has to install is not known: this project is used without being installed"
        raise CannotRunError(Problem(what, None, "pip install -e . in the checkout, or make setup")) from None
    kept = []
    for line in listed:
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker and "'train'" not in marker.replace('"', "'"):
            continue
        if requirement.split(">")[0].split("<")[0].strip().lower() not in NOT_THERE:
            kept.append(requirement.strip())  # a pod is Linux: the markers hold
    return kept


def pinned_constraints() -> str:
    """The pins that the tests ran with; empty where they were not shipped."""
    return text_of(paths.CONSTRAINTS)


def _wheel_files() -> dict[str, bytes]:
    package = Path(runner.__file__).parent
    found = {
        f"runner/{file.relative_to(package).as_posix()}": file.read_bytes()
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.relative_to(package).parts[0] != "assets"
    }
    for name, folder in ASSETS.items():
        for file in folder.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                found[f"runner/assets/{name}/{file.relative_to(folder).as_posix()}"] = file.read_bytes()
    return found


def _wheel_metadata() -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {PROJECT}", f"Version: {runner.__version__}"]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in training_requirements()), ""])


def _wheel_sum(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
