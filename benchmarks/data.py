"""Reading, tokenising and packing: rows and tokens a second, memory at 10 k to 1 M rows, how full packing is."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, say, table

SIZES = (10_000, 100_000, 1_000_000)
LIMIT = 1024
BATCH = 8
WORDS = [
    "the",
    "a",
    "model",
    "data",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "for",
    "on",
    "with",
    "as",
    "by",
    "that",
    "train",
    "row",
    "token",
    "loss",
    "step",
    "rate",
    "one",
    "two",
]


def rows_file(path: Path, count: int, seed: int = 1) -> Path:
    """Conversations of one or two questions; answers of 2 to about 300 words, most of them short."""
    rng = random.Random(seed)

    def said(words: float) -> str:
        return " ".join(rng.choices(WORDS, k=2 + min(300, int(rng.expovariate(1 / words)))))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = [{"role": "user", "content": f"{number} {said(8)}?"}, {"role": "assistant", "content": said(25)}]
            if number % 4 == 0:
                turns += [{"role": "user", "content": said(6)}, {"role": "assistant", "content": said(15)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Sizes and processes."""
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="ROWS")
    parser.add_argument("--num-proc", type=int, default=None, help="processes that tokenise; one per core if left out")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every size in a process of its own, with a cache of its own."""
    runs = []
    for size in (1_000, *options.sizes):  # the first, not kept, unpacks the demo model, whose memory would be counted
        with tempfile.TemporaryDirectory() as folder:
            file = rows_file(Path(folder) / "rows.jsonl", size)
            say(f"{size:,} rows, {file.stat().st_size / 1e6:,.0f} MB …")
            command = [sys.executable, "-m", "benchmarks.data", "--worker", str(file), str(options.num_proc or 0)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            runs.append({"rows": size, "file_mb": file.stat().st_size / 1e6} | json.loads(done.stdout.splitlines()[-1]))
    return {"limit": LIMIT, "batch": BATCH, "runs": runs[1:]}


def work(file: Path, num_proc: int) -> dict[str, Any]:
    """In the process that is measured: read, tokenise and pack one file."""
    os.environ.setdefault("RUNNER_CACHE", str(ROOT / ".pytest_cache" / "runner"))
    from runner.config.conf_files import load_choice
    from runner.data import load as data_load
    from runner.spec import ModelSpec
    from runner.train import model_loading
    from runner.train.tokens import token_dataset
    from tests.conftest import spec_of

    spec = spec_of("data=file", f"data.path={file}", "data.eval_fraction=0.01", f"train.max_length={LIMIT}")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"num_proc": num_proc or None})})
    source = model_loading.source_of(ModelSpec(**load_choice("model", "smollm2_135m")))
    tokenizer = model_loading.load_tokenizer(spec, source)
    os.environ["RUNNER_CACHE"] = str(file.parent / "cache")
    data_load.IN_MEMORY_BYTES = 0  # every size takes the way of the large ones
    memory = Memory()
    before = memory.now()
    began = time.perf_counter()
    data = data_load.read_dataset(spec.data, 1)
    read_at = time.perf_counter()
    train, _ = data.examples
    found = token_dataset.tokenise(train, tokenizer, spec)
    done = time.perf_counter()
    again = token_dataset.tokenise(train, tokenizer, spec)
    cached = time.perf_counter() - done
    assert again.from_cache
    peak = memory.stop()
    lengths = [n for row in found.rows.select(range(min(len(found.rows), 2000))) for n in row["seq_lengths"]]
    random.Random(1).shuffle(lengths)
    lengths = lengths[:10_000]
    return {
        "read_seconds": read_at - began,
        "tokenise_seconds": done - read_at,
        "cached_seconds": cached,
        "tokens": found.num_tokens,
        "sequences": len(found.rows),
        "mib_before": before,
        "mib_peak": peak,
        "share_best_fit": found.packing_efficiency,
        "share_first_fit": sum(lengths) / (first_fit(lengths, LIMIT) * LIMIT),
        "share_padded": padded(lengths, BATCH),
    }


class Memory:
    """Memory of this process that is nobody's file, and its peak, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """MiB; pages of files that are mapped are the system's to take back, and not counted."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        return 0.0

    def stop(self) -> float:
        """The peak in MiB."""
        self._over.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, self.now())


def first_fit(lengths: Sequence[int], limit: int) -> int:
    """Sequences where each row, as it comes, goes into the first one with room."""
    room: list[int] = []
    for length in lengths:
        for index, left in enumerate(room):
            if left >= length:
                room[index] -= length
                break
        else:
            room.append(limit - length)
    return len(room)


def padded(lengths: Sequence[int], batch: int) -> float:
    """Share of the positions that hold a token where batches are filled up to their longest row."""
    batches = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return sum(lengths) / sum(max(rows) * len(rows) for rows in batches)


def section(measured: dict[str, Any]) -> str:
    """For docs/benchmarks.md."""
    rows = [
        [
            f"{run['rows']:,}",
            f"{run['file_mb']:,.0f}",
            f"{run['rows'] / run['read_seconds']:,.0f}",
            f"{run['rows'] / run['tokenise_seconds']:,.0f}",
            f"{run['tokens'] / run['tokenise_seconds']:,.0f}",
            f"{run['cached_seconds']:.1f}",
            f"{run['mib_before']:,.0f}",
            f"{run['mib_peak']:,.0f}",
        ]
        for run in measured["runs"]
    ]
    head = [
        "rows",
        "MB",
        "rows/s read",
        "rows/s tokenised + packed",
        "tokens/s",
        "s from the cache",
        "MiB before",
        "MiB peak",
    ]
    last = measured["runs"][-1]
    shares = [
        ["best fit, all rows (here)", f"{last['share_best_fit']:.1%}"],
        ["first fit", f"{last['share_first_fit']:.1%}"],
        [f"padding, batches of {measured['batch']}", f"{last['share_padded']:.1%}"],
    ]
    return "\n".join(
        [
            "## Data: reading, tokenising, packing",
            "",
            "Conversations in JSONL, checked row by row, tokenised with SmolLM2's tokenizer and packed into "
            f"{measured['limit']:,} tokens. Memory is what the process has for itself beside files that are mapped.",
            "",
            table(head, rows),
            "",
            "Share of the positions that hold a token:",
            "",
            table(["", "full"], shares),
        ]
    )


BENCHMARK = Benchmark("data", add_options, measure, section, measures=("runner/data",))

if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        alone(BENCHMARK, sys.argv[1:])
