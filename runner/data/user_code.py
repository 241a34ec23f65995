"""Python files of the user, named as `FILE.py:NAME`: reward functions, objectives and trackers."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError

_LOADED: dict[str, str] = {}
"""Keys by the files that they named."""


def load(name: str, key: str, kind: str = "class") -> Any:
    """Class or function that `FILE.py:NAME` names; RequestError from `key` for a file that fails or lacks the name."""
    file, _, wanted = name.rpartition(":")
    path, source = Path(file).expanduser(), f"{key}={name}"
    if not path.is_file():
        raise RequestError(Problem(f"there is no {file}", source, "name a Python file"))
    made = importlib.util.spec_from_file_location(f"user_code_{path.stem}", path)
    assert made is not None and made.loader is not None
    _LOADED[str(made.origin)] = key
    module = importlib.util.module_from_spec(made)
    sys.path.insert(0, str(path.absolute().parent))  # as `python FILE` does: what lies beside it can be imported
    try:
        made.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        what = f"{file} cannot be read: {type(error).__name__}: {error}"
        raise RequestError(Problem(what, source, "run it by itself to see where")) from error
    found = getattr(module, wanted, None)
    if not callable(found):
        raise RequestError(Problem(f"{file} has no {kind} {wanted}", source, "define it"))
    return found


def user_line_of(error: BaseException) -> str | None:
    """The innermost line of a user's file that an error came through, with the key that named the file; None where it
    came through none."""
    for step in reversed(traceback.extract_tb(error.__traceback__)):
        if key := _LOADED.get(step.filename):
            return f"{key}: {step.filename}, line {step.lineno}, in {step.name}"
    return None
