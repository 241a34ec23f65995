"""Vendored packages are unchanged, carry their licence, and are in the wheel."""

from __future__ import annotations

import hashlib
import subprocess
import tomllib

from runner.paths import VENDOR
from tests.conftest import ROOT


def test_every_vendored_file_is_the_one_that_was_published() -> None:
    listed = dict(line.split()[::-1] for line in (VENDOR / "SHA256SUMS").read_text("utf-8").splitlines())
    there = {str(file.relative_to(VENDOR)) for file in VENDOR.glob("*/*")}
    assert there == set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name


def test_every_vendored_package_has_its_licence_and_is_listed() -> None:
    page = (VENDOR / "README.md").read_text("utf-8").lower()
    for folder in (path for path in VENDOR.iterdir() if path.is_dir()):
        assert "permission" in (folder / "LICENSE").read_text("utf-8").lower(), folder.name
        assert folder.name in page


def test_the_wheel_has_them() -> None:
    """hatch packs every file below `runner` that git does not ignore, and the licences by name."""
    files = [str(file) for file in VENDOR.glob("*/*")]
    assert subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True).stdout == ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "runner/web/vendor/*/LICENSE" in project["project"]["license-files"]
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["runner"]
