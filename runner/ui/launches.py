"""Runs started from the page: `python -m runner …` in a session of its own, which outlives the server."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError
from runner.report.text import without_control_sequences
from runner.rundir.directory import text_of

FOLDER = ".ui"
"""Folder beside the runs with what started ones printed."""
_RUN = re.compile(r"^Run\s+(\S.*)$", re.MULTILINE)
TAIL = 8000


class Launches:
    """Launches of this server; what an earlier one has started is known by its log alone."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, words: list[str]) -> str:
        """Start `python -m runner` with these words; the id of the launch."""
        self._collect()
        self.folder.mkdir(parents=True, exist_ok=True)
        launch = secrets.token_hex(8)
        with (self.folder / f"{launch}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "runner", *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "COLUMNS": "120"},
            )  # fmt: skip
        self._processes[launch] = process
        return launch

    def state(self, launch: str) -> dict[str, Any]:
        """Whether it is running, its exit code, the run it has made, and the end of what it printed."""
        if not re.fullmatch(r"[0-9a-f]{16}", launch) or not (file := self.folder / f"{launch}.log").is_file():
            raise RequestError(Problem(f"there is no launch {launch[:40]!r}", "page"))
        said = without_control_sequences(text_of(file).replace("\r", "\n"))
        made = _RUN.search(said)
        process = self._processes.get(launch)
        code = process.poll() if process else None
        run_id = Path(made[1].strip()).name if made else None
        return {"running": bool(process) and code is None, "exit_code": code, "run_id": run_id, "output": said[-TAIL:]}

    def _collect(self) -> None:
        """Reap those that have ended."""
        for launch in [name for name, process in self._processes.items() if process.poll() is not None]:
            del self._processes[launch]
