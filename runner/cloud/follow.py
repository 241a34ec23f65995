"""Follow a run in a pod over one connection that is re-opened after a break and continues at its byte.

What is new in the run's files arrives in the run directory here as it grows; what it means is told as news.
"""

from __future__ import annotations

import base64
import errno
import json
import re
import select
import shlex
import subprocess
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from runner.cloud import untrusted_files
from runner.cloud.agent.tail import GROWING, WHOLE
from runner.cloud.ssh import SSH_FAILED, PodGoneError
from runner.cloud.transfer import PodRunFolder
from runner.config import json_text
from runner.errors import Problem, RunnerError
from runner.report.invocation import as_invoked
from runner.report.progress import Progress
from runner.report.text import without_control_sequences
from runner.rundir.directory import RunDir

TICK_SECONDS = 0.5
BEAT_SECONDS = 3.0
SILENT_SECONDS = 40.0
"""The pod says something every 2 s; a connection that says nothing for so long is dead."""
WAITS = (0.5, 1, 2, 4, 8, 15)
"""Seconds between attempts to connect again; the last one stays."""
NOT_HERE = ("status.json",)
"""Files of the pod that do not lie here as they are: this run directory has its own."""
NOT_PLAIN = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EMLINK, errno.ENXIO)
"""A link, a folder or a pipe is where a file belongs (EMLINK for a link on BSD)."""
LONGEST_LINE = 64 << 20
WORDS = "logs/worker.log"
TOO_MUCH = "Warning: the pod's logs are more than a run's can be, or than this disk has room for: no more is copied"


class News(NamedTuple):
    """One thing that happened: `agent`, `status` (dict), `step` (a line of metrics.jsonl), `words` (a line of the
    training's output), `checkpoints` (steps), `lost` (why), `back`, `tick` (nothing, twice a second)."""

    kind: str
    value: Any = None


class Follower:
    """One run in one pod. `find` tells the pod's present address, None while it has none; raises PodGoneError."""

    def __init__(self, at: PodRunFolder, run: RunDir, find: Callable[[], tuple[str, int] | None],
                 before: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        self.at, self.run, self.find, self.before = at, run, find, before
        self.rest: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        """Of every file that was written here."""
        self.refused = False
        self.process: subprocess.Popen[bytes] | None = None
        self.failed = 0

    def news(self) -> Generator[News, None, None]:
        """Yield news until the generator is closed. PodGoneError where the pod, or the run in it, is gone."""
        try:
            while True:
                yield from self._connected()
                yield from self._again()
        finally:
            self._hang_up()

    def _connected(self) -> Iterator[News]:
        """One connection, to its end."""
        folder = shlex.quote(self.at.folder)
        command = f"test -e {folder}/agent.py || exit 44; exec python3 {folder}/tail.py {folder}"
        process = self.process = self.at.connection.open(command)
        assert process.stdin is not None and process.stdout is not None
        known = {name: _known(self.run.path / name) for name in self._growing()}
        with suppress(OSError):
            process.stdin.write(json.dumps(known).encode() + b"\n")
            process.stdin.flush()
        buffer, heard, beat = b"", time.monotonic(), 0.0
        while time.monotonic() - heard < SILENT_SECONDS:
            if select.select([process.stdout], [], [], TICK_SECONDS)[0]:
                block = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a BufferedReader
                if not block:
                    break
                if self.failed:
                    self.failed = 0
                    yield News("back")
                heard = time.monotonic()
                *lines, buffer = (buffer + block).split(b"\n")
                if len(buffer) > LONGEST_LINE:
                    break
                for line in lines:
                    yield from self._take(line)
            yield News("tick")
            if time.monotonic() - beat > BEAT_SECONDS:
                beat = time.monotonic()
                with suppress(OSError):
                    process.stdin.write(b"\n")
                    process.stdin.flush()

    def _again(self) -> Iterator[News]:
        """After a break: wait, ask where the pod is now, bring back what a restart took."""
        code = self._hang_up()
        if code == 44:
            raise PodGoneError(Problem("the pod's disk is empty: the run is not there any more"))
        why = "the connection to the pod was lost" if code in (None, SSH_FAILED) else f"the pod's end ended ({code})"
        if not self.failed:
            yield News("lost", why)
        while True:
            end = time.monotonic() + WAITS[min(self.failed, len(WAITS) - 1)]
            self.failed += 1
            while time.monotonic() < end:
                yield News("tick")
                time.sleep(min(TICK_SECONDS, max(0.0, end - time.monotonic())))
            try:
                address = self.find()
                if address is not None:
                    self.at.connection.moved(*address)
                    self.before()
                    return
            except PodGoneError:
                raise
            except RunnerError:  # the API or the pod does not answer: later
                continue

    def _hang_up(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            return process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
        finally:
            process.stdout.close()

    def _growing(self) -> list[str]:
        files = [*self.run.path.glob("*.jsonl"), *self.run.path.glob("logs/*.log"), *self.run.path.glob("logs/*.txt")]
        files += self.run.path.glob("tensorboard/**/events.*")
        return [str(file.relative_to(self.run.path)) for file in files]

    def _take(self, text: bytes) -> Iterator[News]:
        """One line of the pod's, into the run directory; what is not as `tail.py` writes it is passed over."""
        try:
            line = json_text.loads(text)
            if "checkpoints" in line:
                yield News("checkpoints", [int(step) for step in line["checkpoints"]])
            name = str(line.get("file") or line.get("whole") or "")
            if not _is_ours(name, GROWING if "file" in line else WHOLE):
                return
            content = base64.b64decode(line["data"])
            if self._has_room(name, len(content) + (int(line["at"]) if "file" in line else 0)):
                yield from self._written(line, name, content)
            elif not self.refused:
                self.refused = True
                yield News("words", TOO_MUCH)
            # Known whatever this disk takes: else a run that is over would be followed until its deadline.
            if name in ("status.json", "agent-status.json") and isinstance(said := json_text.loads(content), dict):
                yield News("status" if name == "status.json" else "agent", said)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return
        except OSError as error:  # the disk does not say how much room it has
            yield from self._unwritten(error)

    def _written(self, line: dict[str, Any], name: str, content: bytes) -> Iterator[News]:
        """What came of a file, in the run directory."""
        try:
            if "file" in line:
                untrusted_files.write_at(self.run.path, name, int(line["at"]), content)
                yield from self._told(name, int(line["at"]), content)
            elif name not in NOT_HERE:
                untrusted_files.write_whole(self.run.path, name, content)
        except OSError as error:
            yield from self._unwritten(error)

    def _unwritten(self, error: OSError) -> Iterator[News]:
        """Said once: a disk here that is full or read-only ends no training in a pod, whose disk has it all."""
        if error.errno in (None, *NOT_PLAIN) or self.refused:  # None: NotPlainError, or a pipe that cannot be sought in
            return
        self.refused = True
        yield News("words", f"Warning: nothing can be written at {self.run.path}: {error.strerror}; the run continues")

    def _has_room(self, name: str, size: int) -> bool:
        """Whether a file may have so many bytes here, beside the others."""
        others = sum(self.sizes.values()) - self.sizes.get(name, 0)
        more = size - self.sizes.get(name, 0)
        if name not in self.sizes and len(self.sizes) >= untrusted_files.FOLLOWED_FILES:
            return False
        if others + size > untrusted_files.FOLLOWED_BYTES or (
            more > 0 and more > untrusted_files.free_bytes(self.run.path)
        ):
            return False
        self.sizes[name] = size
        return True

    def _told(self, name: str, at: int, content: bytes) -> Iterator[News]:
        if name not in ("metrics.jsonl", WORDS):
            return
        before = self.rest.get(name, b"") if at else b""
        *lines, self.rest[name] = (before + content).split(b"\n")
        for text in lines:
            if name == WORDS:
                yield News("words", without_control_sequences(text.decode(errors="replace")))
            else:
                with suppress(ValueError, RecursionError):
                    if isinstance(line := json_text.loads(text), dict):
                        yield News("step", line)


def _known(file: Path) -> list[int]:
    """Size and CRC-32 of what is here."""
    try:
        content = file.read_bytes()
    except OSError:
        return [0, 0]
    return [len(content), zlib.crc32(content)]


def _is_ours(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether `tail.py` tells of such a file."""
    told = (re.escape(one).replace(r"\*\*/", "(.+/)?").replace(r"\*", "[^/]*") for one in patterns)
    return any(re.fullmatch(one, name) for one in told)


class Display:
    """Output of a run in a pod on this terminal: lines, and a live bar. A context manager around following it."""

    def __init__(self, console: Console) -> None:
        self.console, self.progress = console, Progress(console)
        self.total = 0
        self.open: ExitStack | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(without_control_sequences(as_invoked(line)), highlight=False, soft_wrap=True, markup=False)

    def tell(self, news: News) -> None:
        """Show what happened in the pod; what is no number where one belongs is not shown."""
        with suppress(KeyError, TypeError, ValueError, ArithmeticError):
            self._tell(news)

    def _tell(self, news: News) -> None:
        if news.kind == "words" and not (self.console.is_terminal and _is_progress(news.value)):
            self.say(news.value)
        elif news.kind == "status":
            self.total = int(news.value.get("num_steps") or self.total)
        elif news.kind == "step" and self.console.is_terminal and self.total:
            if self.open is None:
                self.open = ExitStack()
                self.open.enter_context(self.progress.stage("Training", "steps", self.total, int(news.value["step"])))
            self.progress.step(int(news.value["step"]), self.total, news.value)
        elif news.kind == "lost":
            self.say(f"{news.value}; the run continues there, and contact is retried")
        elif news.kind == "back":
            self.say("The connection is back")


def _is_progress(line: str) -> bool:
    """Such as `  10/200  loss 1.23`: the bar says it."""
    done, _, rest = line.strip().partition("/")
    return done.isdigit() and rest[:1].isdigit()
