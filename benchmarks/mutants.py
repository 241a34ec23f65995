"""Small changes of the code that guards money and work: how many of them do the tests notice?

Each mutant is one change by mutmut (`<` to `<=`, `+` to `-`, a number plus one, an argument lost); the tests that reach
its function run on it, and one that passes them all has survived. `make mutants ARGS="--only runner/plan/cost.py"`
measures one file and keeps the figures of the others, and `--sample 80` some of its mutants, the same every time;
`python -m benchmarks.mutants --list` says what survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench import ROOT, Benchmark, alone, git, say, table

TESTS: dict[str, tuple[str, ...]] = {
    "runner/plan/cost.py": ("tests/plan/test_cost.py", "tests/plan/test_checkpoint_count.py"),
    "runner/plan/zero.py": ("tests/plan/test_zero_terms.py",),
    "runner/plan/zero_config.py": ("tests/plan/test_zero_terms.py", "tests/config/test_deepspeed_docs.py"),
    "runner/plan/memory.py": ("tests/plan/test_memory.py",),
    "runner/plan/step_time.py": ("tests/plan/test_step_time.py",),
    "runner/cloud/budget.py": (
        "tests/cloud/test_budget.py", "tests/cloud/test_cap_warnings.py", "tests/cloud/test_offers.py",
    ),
    "runner/cloud/ledger.py": ("tests/cloud/test_ledger.py", "-k", "not many_writers"),
    "runner/cloud/termination.py": ("tests/cloud/test_termination.py",),
    "runner/cloud/reconcile.py": ("tests/cloud/test_reconcile.py",),
    "runner/cloud/rent_pod.py": ("tests/cloud/test_rent_pod.py",),
    "runner/cloud/lease.py": ("tests/cloud/test_rent_pod.py",),
    "runner/cloud/runpod/offers.py": ("tests/cloud/test_offer_choice.py",),
    "runner/cloud/agent/agent.py": (
        "tests/cloud/test_agent_limits.py", "tests/cloud/test_agent_switch.py", "tests/cloud/test_agent_work.py",
    ),
    "runner/rundir/checkpoints.py": ("tests/rundir/test_checkpoints.py", "-k", "not newest_are_kept"),
    "runner/data/loss_mask.py": ("tests/data/test_learned_spans.py",),
    "runner/data/row_formats.py": ("tests/data/test_row_formats.py", "tests/data/test_columns.py"),
    "runner/train/tokens/token_dataset.py": (
        "tests/train/test_tokenised_rows.py", "tests/train/test_token_dataset.py",
        "-k", "tokenised_rows or best_fit or lie_one_after or written_at_once",
    ),
    "runner/train/trainers/loss_guard.py": ("tests/train/test_loss_judgement.py",),
    "runner/train/checkpoint_saving.py": ("tests/train/test_checkpoint_sealer.py",),
    "runner/runs/resume.py": ("tests/runs/test_resume.py",),
}  # fmt: skip
"""What carries promises, and the fast tests that keep them. Pages that repeat the code's own output are none."""
JUSTIFIED = Path(__file__).with_name("justified_mutants.yaml")
MESSAGES = (r"Problem\(", r"\bsay\(", r"warning\(", r"\blog\(")
"""Lines that are not changed: the words of messages, which other tests read."""
FOLDER = ROOT / ".mutants"
COPIED = ("conf", "recipes", "deepspeed_configs", "docs", "benchmarks", "constraints.txt", "README.md", "Makefile",
          "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", ".github", ".ci")  # fmt: skip
STATES = {0: "survived", 1: "killed", 3: "killed", 5: "untested", 33: "untested", 36: "timed out", 24: "timed out"}
"""mutmut's exit codes: its tests' own, and those for no tests at all and for running too long."""
TARGET = 0.9

EXPLANATION = """\
## Mutants: defects that the tests detect

[mutmut](https://mutmut.readthedocs.io) makes one change at a time in code that guards money or results, and runs the
fast tests that reach the function. *Untested* mutants are in functions that none of these tests calls. Survivors
without an observable effect are listed with their reasons in benchmarks/justified_mutants.yaml and count as
justified. A *sample* is drawn at random with a fixed seed, for files whose tests take long. The target is
{target:.0%} killed.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--only`, `--at-once`, `--sample`, `--seed`."""
    parser.add_argument("--only", nargs="+", default=[*TESTS], metavar="FILE", help="these files (default all)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of each file (default all)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every mutant of every file, or a sample; the kept figures of the files that are left out."""
    kept = json.loads(BENCHMARK.file.read_text("utf-8"))["measured"]["files"] if BENCHMARK.file.is_file() else {}
    files = {name: found for name, found in kept.items() if name in TESTS}
    for file in options.only:
        files[file] = _mutants(file, TESTS[file], options)
        say(f"mutants {file}: {Counter(files[file]['states'])}")
    return {"files": {name: files[name] for name in TESTS if name in files}}


def _mutants(file: str, tests: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """One file's: how each mutant ended, and the differences that survived."""
    folder = FOLDER / file.replace("/", "-").removesuffix(".py")
    shutil.rmtree(folder, ignore_errors=True)
    for name in (git("ls-files", "--cached", "--others", "--exclude-standard") or "").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "setup.cfg").write_text(_settings(file, tests), "utf-8")
    began, commit = time.monotonic(), git("rev-parse", "--short=12", "HEAD")
    meta = folder / "mutants" / f"{file}.meta"
    run = ("run", "--max-children", str(options.at_once))
    # No mutant has that name: mutmut makes them all, learns which tests reach which, and tries none.
    done = _mutmut(folder, *run, *(["none"] if options.sample else []))
    if not meta.is_file():
        raise RuntimeError(f"mutmut did not run {file}: {(done.stdout + done.stderr)[-2000:]}")
    codes = every = _codes(meta)
    if options.sample:
        names = random.Random(options.seed).sample([*every], min(options.sample, len(every)))
        done = _mutmut(folder, *run, *names)
        codes = {name: code for name, code in _codes(meta).items() if name in names}
    if None in codes.values():
        raise RuntimeError(f"mutmut did not finish {file}: {(done.stdout + done.stderr)[-3000:]}")
    ends = {name: STATES.get(abs(code), "killed") for name, code in codes.items()}
    shown = [_mutmut(folder, "show", name).stdout for name, end in ends.items() if end == "survived"]
    return {
        **({"sample_of": len(every), "seed": options.seed} if len(codes) < len(every) else {}),
        "date": date.today().isoformat(),
        "commit": commit,
        "seconds": round(time.monotonic() - began),
        "states": dict(Counter(ends.values())),
        "untested": sorted({name.rpartition("__mutmut")[0] for name, end in ends.items() if end == "untested"}),
        "survivors": [_difference(text) for text in shown],
    }


def _mutmut(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-m", "mutmut", *words], cwd=folder, capture_output=True, text=True, env=env)


def _codes(meta: Path) -> dict[str, Any]:
    """Exit code by mutant; None for one that was not tried."""
    found: dict[str, Any] = json.loads(meta.read_text("utf-8"))["exit_code_by_key"]
    return found


def _settings(file: str, tests: tuple[str, ...]) -> str:
    """mutmut's own settings for one file."""
    lists = {
        "only_mutate": (file,), "also_copy": COPIED, "pytest_add_cli_args_test_selection": tests,
        "do_not_mutate_patterns": MESSAGES,
        "pytest_add_cli_args": ("-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow"),
    }  # fmt: skip
    lines = [f"{key}=\n    " + "\n    ".join(values) for key, values in lists.items()]
    return "\n".join(["[mutmut]", "source_paths=runner", *lines]) + "\n"


def _difference(shown: str) -> dict[str, str]:
    """The function's file, and the lines that differ."""
    name = shown.splitlines()[0].strip("# ").partition(":")[0] if shown else "?"
    lines = [line for line in shown.splitlines()[3:] if line[:1] in ("-", "+")]
    function = name.rpartition("__mutmut")[0]
    return {
        "function": function,
        "was": "\n".join(line[1:].strip() for line in lines if line[0] == "-"),
        "is": "\n".join(line[1:].strip() for line in lines if line[0] == "+"),
    }


def justified() -> list[dict[str, str]]:
    """Survivors that need no test: function, was, is and the reason."""
    return yaml.safe_load(JUSTIFIED.read_text("utf-8")) or [] if JUSTIFIED.is_file() else []


def section(measured: dict[str, Any]) -> str:
    """Explanation and table."""
    return (
        EXPLANATION.format(target=TARGET)
        + "\n"
        + table(
            [
                "file",
                "mutants",
                "killed",
                "untested",
                "survived",
                "justified",
                "killed of those that matter",
                "measured",
            ],
            list(_rows(measured)),
        )
    )


def _rows(measured: dict[str, Any]) -> Iterator[list[str]]:
    reasons = {(one["function"], one["was"], one["is"]) for one in justified()}
    for file, found in measured["files"].items():
        states = found["states"]
        fine = sum((one["function"], one["was"], one["is"]) in reasons for one in found["survivors"])
        total, killed = sum(states.values()), states.get("killed", 0) + states.get("timed out", 0)
        mutants = f"sample of {total} of {found['sample_of']}" if "sample_of" in found else str(total)
        yield [
            f"`{file}`", mutants, str(killed), str(states.get("untested", 0)), str(states.get("survived", 0)),
            str(fine), f"{killed / max(1, total - fine):.0%}", f"{found['date']}, {found['commit']}",
        ]  # fmt: skip


BENCHMARK = Benchmark("mutants", add_options, measure, section, measures=(*TESTS,))

if __name__ == "__main__":
    if sys.argv[1:2] == ["--list"]:
        found = json.loads(BENCHMARK.file.read_text("utf-8"))["measured"]["files"]
        for file, one in found.items():
            for mutant in one["survivors"]:
                print(f"{file}: {mutant['function']}\n  - {mutant['was']}\n  + {mutant['is']}")
    else:
        alone(BENCHMARK, sys.argv[1:])
