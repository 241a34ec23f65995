"""`python -m runner.train.tokens.fill_token_cache [--json] < spec.json`: tokenise what a run would at its start.

The same functions with the same settings, so the run finds its tokens in the cache.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from rich.console import Console

from runner.data.prepared_index import record_prepared
from runner.errors import InterruptedRun, Problem, RunFailedError, RunnerError
from runner.paths import cache_dir
from runner.report import terminal
from runner.report.progress import Progress
from runner.report.text import counted, dump, print_problems, problems_as_json
from runner.spec import RunSpec
from runner.train.__main__ import quiet_libraries

if TYPE_CHECKING:
    from types import FrameType


def main() -> int:
    """Exit codes as in runner/errors.py."""
    signal.signal(signal.SIGTERM, _interrupted)
    spec, as_json = RunSpec.model_validate(json.loads(sys.stdin.read())), "--json" in sys.argv
    terminal.guard()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between a script and its JSON
    console = Console(file=sys.stderr if as_json else out)
    log = cache_dir() / "prepare.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        quiet_libraries(log)
        facts = fill_cache(spec, Progress(console))
    except KeyboardInterrupt:
        return InterruptedRun.exit_code
    except Exception as error:
        if not isinstance(error, RunnerError):
            traceback.print_exc()
            error = RunFailedError(Problem(f"{type(error).__name__}: {error}"))
        if as_json:
            print(dump(problems_as_json(error)), file=out)
        print_problems(Console(stderr=True), error)
        return error.exit_code
    if as_json:
        print(dump(facts), file=out)
    return 0


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def fill_cache(spec: RunSpec, progress: Progress) -> dict[str, Any]:
    """Tokenise training and held-out rows into the cache; facts for the JSON of `data prepare`."""
    from runner.train import model_loading
    from runner.train.distributed import Ranks
    from runner.train.objectives import objective_of
    from runner.train.tokens.token_cache import describe_rows

    began = time.perf_counter()
    objective = objective_of(spec)
    objective.prepare(progress.note, lambda: None, Ranks())
    requested, spec = spec, objective.spec
    data = objective.read()
    if data.note:
        progress.note(data.note)
    progress.note(
        f"Read    {counted(len(data.train), 'row')} in {time.perf_counter() - began:.1f} s; loading the tokenizer …"
    )
    tokenizer = model_loading.load_tokenizer(spec, model_loading.source_of(spec.model, progress.note))
    began = time.perf_counter()
    with progress.stage("Tokenising", "rows"):
        rows, held = objective.tokenise_all(data, tokenizer, progress.advance)
    seconds = time.perf_counter() - began
    progress.note(describe_rows(rows, len(data.held or ())))
    entries = [rows.folder] + ([held.folder] if held else [])
    record_prepared(requested, entries)
    facts = {key: value for key, value in vars(rows).items() if key != "rows"}
    return facts | {
        "num_sequences": len(rows.rows),
        "num_held_out": held.num_examples if held else 0,
        "num_skipped": data.num_skipped,
        "seconds": seconds,
        "rows_per_second": len(data.train) / seconds,
        "tokens_per_second": rows.num_tokens / seconds,
        "folders": [str(folder) for folder in entries],
    }


if __name__ == "__main__":
    sys.exit(main())
