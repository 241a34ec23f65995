"""`python -m runner.train.artifact_verbs VERB spec.json …`: merge, export or evaluate a finished run.

Arguments, JSON output and errors of these verbs. Exit codes as in runner/errors.py.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from runner.errors import InterruptedRun, Problem, RunFailedError, RunnerError
from runner.report import terminal
from runner.report.text import dump, print_problems, problems_as_json
from runner.rundir.directory import RunDir
from runner.train.__main__ import quiet_libraries

Say = Callable[[str], None]


def main() -> int:
    """Run the verb; print its result as text or JSON, and return the exit code."""
    options = _options()
    run = RunDir(options.spec.resolve().parent)
    # SIGTERM, too, ends with what is half done tidied away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    terminal.guard()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between a script and its JSON
    console = Console(file=sys.stderr if options.json else out)
    try:
        console.print("Loading torch and transformers …")
        quiet_libraries(run.path / "logs" / "rank0.log")
        facts = _work(options, run, partial(console.print, highlight=False, markup=False, soft_wrap=True))
    except Exception as error:
        problem = error if isinstance(error, RunnerError) else _unexpected(options.verb, run, error)
    except KeyboardInterrupt:
        problem = InterruptedRun("interrupted: nothing is left behind")
    else:
        if options.json:
            print(dump(facts), file=out)
        return 0
    if options.json:
        print(dump(problems_as_json(problem)), file=out)
    print_problems(Console(stderr=True), problem)
    return problem.exit_code


def _work(options: argparse.Namespace, run: RunDir, say: Say) -> Mapping[str, Any]:
    """Run the verb. torch is imported here, after the first line is on screen and standard output is redirected."""
    spec = run.spec
    if options.verb == "merge":
        from runner.train.merge.adapter import merge

        return merge(spec, run, options.out, say)
    if options.verb == "eval":
        from runner.train.evaluation.finished_model import evaluation

        return evaluation(spec, run, options, say)
    from runner.train.export import export

    return export(spec, run, options.step, options.out, say)


def _unexpected(verb: str, run: RunDir, error: Exception) -> RunnerError:
    log = run.path / "logs" / f"{verb}.txt"
    log.write_text(traceback.format_exc(), "utf-8")
    first = next(iter(str(error).strip().splitlines()), "no message")
    return RunFailedError(Problem(f"{type(error).__name__}: {first}", None, f"the stack trace is in {log}"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runner.train.artifact_verbs")
    parser.add_argument("verb", choices=["merge", "export", "eval"])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks")
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
