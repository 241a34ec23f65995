"""Cases of a chaos benchmark, each kept as soon as it is over: a measurement that was broken off goes on there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.bench import ROOT, say

Case = dict[str, Any]
FOLDER = ROOT / ".chaos"


class Kept:
    """The cases of one benchmark and seed: a file with a line of JSON for each."""

    def __init__(self, name: str, seed: int) -> None:
        self.file = FOLDER / f"{name}-{seed}.jsonl"

    def all(self, count: int) -> list[Case]:
        """Those that are over, in order."""
        lines = self.file.read_text("utf-8").splitlines() if self.file.is_file() else []
        found = {case["case"]: case for case in map(json.loads, lines)}
        return [found[number] for number in sorted(found) if number < count]

    def missing(self, count: int) -> list[int]:
        """Numbers of those that are to be run."""
        done = {case["case"] for case in self.all(count)}
        return [number for number in range(count) if number not in done]

    def add(self, case: Case) -> None:
        """One more. A line is one write: several processes may add."""
        FOLDER.mkdir(exist_ok=True)
        with self.file.open("ab", buffering=0) as stream:
            stream.write(json.dumps(case).encode() + b"\n")
        say(f"{self.file.stem} {case}")

    def run(self, count: int, at_once: int, one: Callable[[int], Case]) -> list[Case]:
        """Those that are missing, so many beside one another; all of them then."""
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(lambda number: self.add(one(number)), self.missing(count)):
                pass
        return self.all(count)


def add_options(parser: argparse.ArgumentParser, cases: int, at_once: int) -> None:
    """`--cases`, `--seed`, `--at-once`."""
    parser.add_argument("--cases", type=int, default=cases, help=f"in all (default {cases})")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments (default 1)")
    parser.add_argument("--at-once", type=int, default=at_once, help=f"beside one another (default {at_once})")
