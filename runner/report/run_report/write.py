"""Write `report.html` of a run that has ended; whatever goes wrong there is no fault of the run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from runner.report.run_report.facts import gather, part
from runner.report.run_report.page import page
from runner.rundir.directory import RunDir, write_atomically
from runner.rundir.json_files import ENDED

FILE = "report.html"


def write_report(run: RunDir) -> Path | None:
    """Write the page of an ended run into its directory. None with `run.report=false`, or where that failed: the log
    says why."""
    try:
        if run.status.get("state") not in ENDED or part(run.read("spec.json"), "run").get("report") is False:
            return None
        write_atomically(run.path / FILE, page([gather(run)]))
    except Exception as error:  # a full disk, or a file that nobody foresaw: the model is saved already
        with suppress(OSError), (run.path / "logs" / "run.log").open("a", encoding="utf-8") as log:
            log.write(f"Note    no {FILE}: {type(error).__name__}: {error}\n")
        return None
    return run.path / FILE
