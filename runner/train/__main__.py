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
from runner.rundir import PHASE_OF_STATE, RunDir
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
        if _out_of_memory(run, error):
            return 1
        if run.state() != "interrupted":
            run.set_status("failed", exit_code=error.exit_code, error=str(error))
        print_problems(Console(stderr=True), error)
        return error.exit_code
    except KeyboardInterrupt:
        run.set_status("interrupted", exit_code=130, error="interrupted before training: nothing to save")
        print_problems(Console(stderr=True), RunnerError("interrupted before there was anything to save"))
        return 130
    except Exception as error:
        if _out_of_memory(run, error):
            return 1
        log = _keep_traceback(run)
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        run.set_status("failed", exit_code=1, error=what)
        print_problems(Console(stderr=True), RunnerError(Problem(what, None, f"the stack trace is in {log}")))
        return 1


def _out_of_memory(run: RunDir, error: BaseException) -> bool:
    """Whether the run died of that: kept in `status.json`, for the front to say what would have fitted."""
    if "torch" not in sys.modules:
        return False
    from runner.train.peaks import out_of_memory

    found = out_of_memory(error)
    if found is None:
        return False
    log, state = _keep_traceback(run), run.read("status.json").get("state")
    found["phase"] = found["phase"] or PHASE_OF_STATE.get(str(state))
    what = f"out of memory: {found['message']}"
    run.set_status("failed", exit_code=1, error=what, oom=found)
    Console(stderr=True).print(f"Out of memory; the stack trace is in {log}", markup=False, soft_wrap=True)
    return True


def _keep_traceback(run: RunDir) -> Path:
    log = run.path / "logs" / "traceback.txt"
    log.write_text(traceback.format_exc(), "utf-8")
    return log


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
