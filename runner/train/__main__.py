"""The worker: `python -m runner.train runs/<id>/spec.json`, alone or under torchrun. Exit codes as in runner/errors.py.

Under torchrun only the main process prints; errors are written to `logs/rank<k>.json`, and the launcher reports them
once. An interrupted worker then exits with 0: for any other code torchrun would stop the others.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from runner.data import user_code
from runner.errors import InterruptedRun, Problem, Rewind, RunnerError
from runner.machine.processes import die_with_parent
from runner.report import terminal
from runner.report.progress import Progress
from runner.report.text import print_problems
from runner.rundir import checkpoints
from runner.rundir.directory import PHASE_OF_STATE, RunDir
from runner.rundir.json_files import OutOfMemory

if TYPE_CHECKING:
    from runner.train.heartbeat import Heartbeat

RANK = int(os.environ.get("RANK", "0"))
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ


def main(argv: list[str]) -> int:
    """Run one spec that lies in its run directory; this process's part, where there are several."""
    die_with_parent()
    atexit.register(gc.freeze)  # Python ends without a last look for garbage: a quarter of what imports take, 2 s of 8
    terminal.guard(goes_on=True)
    run = RunDir(Path(argv[0]).resolve().parent)
    spec = run.spec
    quiet_libraries(run.path / "logs" / f"rank{RANK}.log")
    console = Console() if RANK == 0 else Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
    progress = Progress(console, terminal.appended(run.path / "logs" / "run.log") if RANK == 0 else None)
    if "torch" not in sys.modules:  # loaded already in a run that was forked
        progress.note("Loading torch and transformers …")
    heartbeat = None
    try:
        from runner.train.heartbeat import Heartbeat  # torch: after the first line is on screen

        heartbeat = Heartbeat(run, RANK)
        heartbeat.install()
        from runner.train.distributed import init_process_group
        from runner.train.trainers.stop_on_signal import StopOnSignal
        from runner.train.worker import work

        ranks = init_process_group(spec)
        stop = StopOnSignal(ranks)
        stop.install()
        finished = work(spec, run, progress, stop, ranks, heartbeat)
        if ranks.main:
            from runner.report.summary import print_summary

            for console in progress.consoles:
                print_summary(console, finished.summary, run)
        heartbeat.end("done")
        return 0
    except BaseException as error:
        return _report_error(run, heartbeat, error)
    finally:
        _destroy_process_group()


def _report_error(run: RunDir, heartbeat: Heartbeat | None, error: BaseException) -> int:
    """Report the error: in `status.json` and on screen (alone), or in `logs/rank<k>.json` (torchrun); the exit code."""
    oom = _out_of_memory(error)
    agreed = isinstance(error, InterruptedRun)  # by all processes, with a checkpoint
    if isinstance(error, KeyboardInterrupt):
        error = checkpoints.interrupted(run)
        if not LAUNCHED:
            run.set_status("interrupted", exit_code=130, error=str(error))
    code = error.exit_code if isinstance(error, RunnerError) else 1
    problems = error.problems if isinstance(error, RunnerError) else []
    what = str(error) if problems else f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if not problems and (place := user_code.user_line_of(error)):
        what = f"{what} ({place})"
    interrupted = isinstance(error, InterruptedRun)
    log = None if problems and oom is None else _keep_traceback(run, error)
    if oom is not None:
        oom["phase"] = oom.get("phase") or PHASE_OF_STATE.get(str(run.status.get("state")))
        run.set_status("failed", exit_code=1, error=f"out of memory: {oom['message']}", oom=oom)
        Console(stderr=True).print(f"Out of memory; the stack trace is in {log}", markup=False, soft_wrap=True)
        code = 1
    elif not LAUNCHED and not interrupted and run.status.get("state") != "rewinding":
        run.set_status("failed", exit_code=code, error=what)
    if heartbeat is not None:
        kept = {"what": what, "problems": [vars(problem) for problem in problems], "exit_code": code}
        heartbeat.end("interrupted" if interrupted else "failed", error=kept, agreed=agreed)
    if LAUNCHED:
        return 0 if agreed else code
    if oom is None and not isinstance(error, Rewind):  # of which the guard has spoken
        shown = error if problems else RunnerError(Problem(what, None, f"the stack trace is in {log}"))
        assert isinstance(shown, RunnerError)
        for console in (Console(stderr=True), terminal.appended(run.path / "logs" / "run.log")):
            print_problems(console, shown, started=True)
    return code


def _out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Facts of an out-of-memory error for `status.json`, from which the launcher says what would have fitted."""
    if "torch" not in sys.modules:
        return None
    from runner.train.memory_stats import out_of_memory

    return out_of_memory(error)


def _keep_traceback(run: RunDir, error: BaseException) -> Path:
    log = run.path / "logs" / (f"rank{RANK}.traceback.txt" if LAUNCHED else "traceback.txt")
    log.write_text("".join(traceback.format_exception(error)), "utf-8")
    return log


def _destroy_process_group() -> None:
    if LAUNCHED and "torch" in sys.modules:
        from runner.train.distributed import destroy_process_group

        destroy_process_group()


def quiet_environment() -> None:
    """Set the variables that libraries read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")


def quiet_libraries(log: Path) -> None:
    """Send warnings and logs of libraries to a file instead of the terminal."""
    quiet_environment()
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # One line per matrix product: "MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16".
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers.utils.logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    import huggingface_hub.utils.logging as hub_logging

    # Its own handler writes every try to the terminal: some 20 lines of "Retrying in 1s" without a network.
    hub_logging.get_logger().handlers.clear()
    hub_logging.enable_propagation()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if LAUNCHED and status:
        sys.stdout.flush()
        os._exit(status)  # the threads of a collective that will never end would keep the process
    sys.exit(status)
