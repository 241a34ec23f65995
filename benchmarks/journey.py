"""The journey of docs/runpod.md, typed: every command of the page against an emulated RunPod, its output into the page.

`python -m benchmarks.journey` runs all of it (a real training and a merge: ten minutes) and writes the page;
tests/pages/test_journey.py runs what stands between `<!-- journey: quick -->` and `<!-- /journey -->` and compares.
Commands are the lines after `$`, and those after `>` that go on with one; below is their output, standard error
included.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench import ROOT
from tests.support.hub import Hub

PAGE = ROOT / "docs" / "runpod.md"
PART = re.compile(r"(<!-- journey: (\w+) -->\n)(.*?)(<!-- /journey -->)", re.DOTALL)
BLOCK = re.compile(r"(```console\n)(.*?)(```)", re.DOTALL)
WIDTH = 110
LIMIT_S = 1200.0
VOLATILE = (
    (r"http://127\.0\.0\.1:\d+/me/", "https://huggingface.co/me/"),
    (r"-\d{8}-\d{6}-[0-9a-f]{4}\b", "-20261201-120000-a1b2"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "2026-12-01 12:00 UTC"),
    (r"\bpod [a-z0-9]{14}\b", "pod k3v9x2m7q1t5wz"),
    (r"(?m)^.*it/s\].*\n", ""),
)
"""What is another at every run, and what stands on the page for it. Ids of RunPod are told by `Typist.ids`."""


@dataclass
class Command:
    """One command of the page, and the text that is printed below it."""

    text: str
    output: str = ""

    def shown(self) -> str:
        """As in the page."""
        first, *others = self.text.split("\n")
        return "\n".join([f"$ {first}", *(f"> {line}".rstrip() for line in others), ""]) + self.output


def commands(block: str) -> list[Command]:
    """Those of a block, with the output that stands there."""
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif line.startswith(">") and found and not found[-1].output:
            found[-1].text += "\n" + line[1:].removeprefix(" ")
        elif found:
            found[-1].output += f"{line}\n"
    return found


@dataclass
class Typist:
    """Types commands in a folder, with an emulated RunPod and a stand-in of the Hub in the environment."""

    folder: Path
    env: dict[str, str]
    ids: dict[str, str] = field(default_factory=dict)

    def type(self, text: str) -> str:
        """The output as the page shows it; RuntimeError where the command fails."""
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text],
            cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=LIMIT_S,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {text}\n{done.stdout}")
        return self._steady(done.stdout)

    def _steady(self, output: str) -> str:
        """Without what is another at every run."""
        for pattern, instead in VOLATILE:
            output = re.sub(pattern, instead, output)
        for kind, name in re.findall(r"\b(Endpoint|endpoint|template) ([a-z0-9]{10,14})\b", output):
            self.ids.setdefault(name, f"{kind.lower()}1a2b3c")
        for name, instead in self.ids.items():
            output = output.replace(name, instead)
        return "".join(f"{line.rstrip()}\n" for line in output.splitlines())


def typist(folder: Path, runpod: dict[str, str], hub: Hub) -> Typist:
    """Who types: this project's own `python`, state and cache in the folder."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": paths, "PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "RUNNER_PYTHON": "python"}
    own |= {"RUNNER_STATE": str(folder / "state"), "RUNNER_CACHE": str(folder / "cache")}
    own |= {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return Typist(folder, {**os.environ, **runpod, **hub.env(), **own})


def retyped(text: str, by: Typist, kinds: tuple[str, ...]) -> str:
    """The page with the outputs of now, in the parts of these kinds."""

    def block(found: re.Match[str]) -> str:
        blocks = []
        for command in commands(found[2]):
            print(textwrap.indent(command.text, "$ "), file=sys.stderr, flush=True)
            blocks.append(Command(command.text, by.type(command.text)).shown())
        return found[1] + "".join(blocks) + found[3]

    def part(found: re.Match[str]) -> str:
        return found[1] + BLOCK.sub(block, found[3]) + found[4] if found[2] in kinds else found[0]

    return PART.sub(part, text)


def parts(text: str, kind: str) -> Iterator[str]:
    """The text of the parts of one kind."""
    yield from (found[3] for found in PART.finditer(text) if found[2] == kind)


def main() -> int:
    """Type everything and write the page."""
    from runner.emulator.server import Emulator

    with tempfile.TemporaryDirectory(prefix="journey-") as name, Emulator(Path(name) / "runpod") as emulator:
        by = typist(Path(name), emulator.env, Hub())
        PAGE.write_text(retyped(PAGE.read_text("utf-8"), by, ("quick", "full")), "utf-8")
        left = emulator.pods()
    print(f"written: {PAGE.relative_to(ROOT)}; pods left: {len(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
