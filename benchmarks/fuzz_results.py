"""Kept results of `make fuzz`, for docs/reliability.md.

    FUZZ_SEED=1 FUZZ_SECONDS=20 make fuzz > fuzz.txt; python -m benchmarks.fuzz_results 1 20 fuzz.txt

reads what the run printed, of one process or of several with the same seed, and refuses a run with a failure; of one
that was interrupted it has the readers that were done.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, git, table

FILE = RESULTS / "fuzz.json"
TITLE = "Test: files of others"
LINE = re.compile(r"^ *([\d,]+)  (.+): ([\d,]+) refused in words, \d+ s$", re.MULTILINE)
EXPLANATION = """\
Valid documents are changed (values swapped, keys dropped or repeated, deep nesting, huge numbers, broken text, cut
bytes), and everything that reads files of others is given them: `make fuzz`, with tests/fuzz. Each input has to be
read or refused in words, within 8 s of CPU time and 1 GiB. The inputs depend on the seed alone.
"""


def keep(outputs: list[str], seed: str, seconds: str) -> None:
    """Write the results of a run; ValueError where something failed or nothing was counted."""
    if any(re.search(r"\b\d+ (failed|errors?)\b", text) for text in outputs):
        raise ValueError("the run has failures: mend them, and run it again with another seed")
    found = {name: [_number(inputs), _number(no)] for text in outputs for inputs, name, no in LINE.findall(text)}
    if not found:
        raise ValueError("no target's inputs are counted there")
    command = f"FUZZ_SECONDS={seconds} FUZZ_SEED={seed} make fuzz"
    result = {"command": command, "date": date.today().isoformat(), "commit": git("rev-parse", "--short=12", "HEAD")}
    FILE.write_text(json.dumps({**result, "targets": dict(sorted(found.items()))}, indent=1) + "\n", "utf-8")


def section() -> str:
    """Explanation, table and origin; how to measure it where there is no result."""
    if not FILE.is_file():
        return f"{EXPLANATION}\nNot measured yet: `make fuzz`.\n"
    kept: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    targets: dict[str, list[int]] = kept["targets"]
    rows = [[name, f"{inputs:,}", f"{refused:,}"] for name, (inputs, refused) in targets.items()]
    inputs, refused = (sum(one[i] for one in targets.values()) for i in (0, 1))
    return (
        f"{EXPLANATION}\n**{inputs:,} inputs, {refused:,} refused in words, 0 tracebacks, 0 hangs.**\n\n"
        f"{table(['reader', 'inputs', 'refused'], rows)}\n\n"
        f"Measured on {kept['date']} at {kept['commit']} with `{kept['command']}`.\n"
    )


def _number(text: str) -> int:
    return int(text.replace(",", ""))


if __name__ == "__main__":
    keep([Path(name).read_text("utf-8") for name in sys.argv[3:]], sys.argv[1], sys.argv[2])
