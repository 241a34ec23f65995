"""Commands that work when they are typed into the shell this runner was started from: itself, and pip."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from runner.paths import ASSETS, CONSTRAINTS

PROJECT = "llm-finetuning-runner"
VARIABLE = "RUNNER_PYTHON"
"""Holds the interpreter's spelling for the processes that the command line starts here; a pod does not have it."""
_COMMAND = re.compile(r"(?<![\w/.-])(python(?= -m runner\b)|pip(?= install\b))")


def python() -> str:
    """The interpreter that runs this, as one would type it: `python` where PATH finds it, else a path."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        # Not resolved: the interpreter of a virtual environment is a link, and which link it is decides what it finds.
        if found and os.path.abspath(found) == os.path.abspath(sys.executable):
            return name
    if sys.prefix == sys.base_prefix and shutil.which("python"):
        return "python"  # no virtual environment: pyenv's shims and the like lead here
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)


def as_invoked(text: str) -> str:
    """`text` with its commands as this shell needs them: `.venv/bin/python -m runner` after `make run`.

    Messages spell them `python -m runner …` and `pip install …`.
    """
    here = os.environ.get(VARIABLE, "python")
    if here == "python":
        return text
    return _COMMAND.sub(lambda found: here if found[0] == "python" else f"{here} -m pip", text)


def remember() -> None:
    """Keep the spelling for this process and those that it starts."""
    os.environ.setdefault(VARIABLE, python())


def install(extra: str) -> str:
    """The command that adds an extra of this project here.

    The project is on no package index: a checkout is installed from its folder, and an installed wheel gets what the
    extra lists, at the versions that the tests ran with.
    """
    pip = f"pip install -c {shlex.quote(_near(CONSTRAINTS))}"
    if (ASSETS / "pyproject.toml").is_file():
        return f"{pip} -e {shlex.quote(f'{_near(ASSETS)}[{extra}]')}"
    return " ".join([pip, *map(shlex.quote, requirements(extra))])


def requirements(extra: str) -> list[str]:
    """Requirements of an extra, for this platform, as pip takes it; empty where the project is not installed."""
    from importlib import metadata  # 10 ms, for a message only

    from packaging.requirements import Requirement

    try:
        listed = map(Requirement, metadata.requires(PROJECT) or [])
    except metadata.PackageNotFoundError:
        return []
    chosen = (r for r in listed if r.marker and "extra" in str(r.marker) and r.marker.evaluate({"extra": extra}))
    return [f"{r.name}{f'[{chr(44).join(sorted(r.extras))}]' if r.extras else ''}{r.specifier}" for r in chosen]


def _near(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
