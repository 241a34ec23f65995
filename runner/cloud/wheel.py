"""This project as a wheel, built from the installation or the checkout, to install in a pod.

The same content gives the same bytes, so that its hash names what a volume has already. It is unpacked and put on
PYTHONPATH there, not installed: its dependencies have an environment of their own that outlives versions of it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import zipfile
from pathlib import Path

import runner
from runner import paths
from runner.errors import CannotRunError, Problem
from runner.report.invocation import PROJECT

NOT_THERE = ("hydra-core", "omegaconf", "hydra-joblib-launcher", "click")
"""What only the command line needs: a run arrives composed."""
EPOCH = (1980, 1, 1, 0, 0, 0)
ASSETS = {"conf": paths.CONF, "recipes": paths.RECIPES, "deepspeed_configs": paths.DEEPSPEED_CONFIGS}


def packed() -> tuple[str, bytes]:
    """File name and content."""
    stem = f"{PROJECT.replace('-', '_')}-{runner.__version__}"
    files = dict(sorted(_files().items()))
    info = f"{stem}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: runner\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_sum(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return f"{stem}-py3-none-any.whl", held.getvalue()


def requirements() -> list[str]:
    """What training needs, as pip takes it: the core and the extra `train`, without what only the front needs."""
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


def constraints() -> str:
    """The pins that the tests ran with; empty where they were not shipped."""
    try:
        return paths.CONSTRAINTS.read_text("utf-8")
    except OSError:
        return ""


def _files() -> dict[str, bytes]:
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


def _metadata() -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {PROJECT}", f"Version: {runner.__version__}"]
    return "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requirements()), ""])


def _sum(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
