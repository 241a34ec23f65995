"""The worker: `python -m runner.train runs/<id>/spec.json`. Exit codes as in runner/errors.py."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

from rich.console import Console

from runner.errors import Problem, RunnerError
from runner.report.problems import print_problems
from runner.report.progress import Progress
from runner.rundir import RunDir
from runner.spec import RunSpec


def main(argv: list[str]) -> int:
    """Run one spec that lies in its run directory."""
    run = RunDir(Path(argv[0]).resolve().parent)
    spec = RunSpec.model_validate(json.loads(run.spec_file.read_text("utf-8")))
    quiet_libraries(run)
    console = Console()
    progress = Progress(console)
    progress.note("Loading torch and transformers …")
    try:
        from runner.train.callbacks import StopOnSignal  # torch: after the first line is on screen
        from runner.train.worker import work

        stop = StopOnSignal()
        stop.install()
        from runner.report.summary import print_summary

        finished = work(spec, run, progress, stop)
        print_summary(console, finished.summary, run)
        return 0
    except RunnerError as error:
        if run.state() != "interrupted":
            run.set_status("failed", exit_code=error.exit_code, error=str(error))
        print_problems(Console(stderr=True), error)
        return error.exit_code
    except KeyboardInterrupt:
        run.set_status("interrupted", exit_code=130, error="interrupted before training: nothing to save")
        print_problems(Console(stderr=True), RunnerError("interrupted before there was anything to save"))
        return 130
    except Exception as error:
        log = run.path / "logs" / "traceback.txt"
        log.write_text(traceback.format_exc(), "utf-8")
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        run.set_status("failed", exit_code=1, error=what)
        print_problems(Console(stderr=True), RunnerError(Problem(what, None, f"the stack trace is in {log}")))
        return 1


def quiet_libraries(run: RunDir) -> None:
    """Libraries talk to a log file; the terminal is ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    handler = logging.FileHandler(run.path / "logs" / "rank0.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # One line per matrix product: "MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16".
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers.utils.logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
