"""A pod whose owner is an enemy of whoever rents it: what it puts in a run's folder, and what came of that here."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;b3duZWQ=\x07"
"""Sets a terminal's title, clears it, writes its clipboard."""
STATUS = {"state": "done", "exit_code": 7, "num_steps": -1, "pid": -1, "message": ESCAPES, "error": ESCAPES}
ODD = (
    b"[1]", b"null", b'{"state": ["done"], "exit_code": "x", "pid": {}}', b"[" * 100_000, b"\xff\xfe", b"{",
    b'{"state": "done", "exit_code": 1e400, "num_steps": NaN, "pid": 1e400}', json.dumps(STATUS).encode(),
)  # fmt: skip
TAIL = """\
import base64, json, sys, time
sys.stdin.readline()
lines = {lines!r}
for line in lines: print(line, flush=True)
while {endless!r}:
    print(json.dumps({{"file": "logs/worker.log", "at": 0, "data": "eHh4"}}) if {endless!r} == "lines" else "x" * 65536,
          end="\\n" if {endless!r} == "lines" else "", flush=True)
time.sleep(1)
"""
AGENT = """\
import sys
sys.stdout.write({said!r})
while {endless!r}: sys.stdout.write("x" * 65536)
"""


def links(folder: Path, outside: Path, dice: random.Random) -> None:
    """Symbolic and hard links, to files and folders, in every place that is brought here."""
    for name in ("model/tokenizer.model", "logs/x.log", "metrics.jsonl", "summary.json", "checkpoints/x", "tensorboard",
                 "agent-status.json", "model/inner", "checkpoints/checkpoint-7/COMPLETE", "evals.jsonl"):  # fmt: skip
        target = dice.choice((outside / "secret", outside, Path("/etc/shadow"), Path("../../../../outside")))
        _put(folder / name, partial(_link, target))
    _put(folder / "model" / "hard", lambda place: os.link(folder / "spec.json", place))


def devices(folder: Path, outside: Path, dice: random.Random) -> None:
    """Character and block devices, pipes, sockets."""
    for name in ("model/null", "logs/zero.log", "gpu.jsonl", "logs/pipe.txt", "summary.json", "checkpoints/x"):
        kind = dice.choice((stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO))
        _put(folder / name, partial(os.mknod, mode=kind | 0o666, device=os.makedev(1, 5)))

    def bind(place: Path) -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(place))

    _put(folder / "s", bind)


def names(folder: Path, outside: Path, dice: random.Random) -> None:
    """Names with newlines, escapes, `..`, bytes that are no text, and of 255 bytes."""
    for name in (b"a\nb", b"\x1b[2J.log", b"..\\..\\x", b"\xff\xfe", b"x" * 255, b"-rf", b"$(touch x)", b"..x"):
        for place in (b"", b"logs/", b"model/", b"checkpoints/"):
            with suppress(OSError):
                Path(os.fsdecode(os.fsencode(folder) + b"/" + place + name)).write_bytes(b"x")


def scripts(folder: Path, outside: Path, dice: random.Random) -> None:
    """Helper scripts that write where they like, as far as they are believed, or never stop."""
    escape = [
        {"file": f"{way}/authorized_keys", "at": 0, "data": "eA=="}
        for way in ("..", "../..", str(outside), "logs/..", "checkpoints/x", "logs/../../..", "tensorboard/x")
    ]
    odd: list[dict[str, Any]] = [
        {"whole": name, "data": "W10="} for name in ("spec.json", "../x.json", "/etc/x", "status.json", "logs")
    ]
    odd += [{"file": "metrics.jsonl", "at": at, "data": "eA=="} for at in (-1, 1 << 62, "0", None, 1e400)]
    odd += [{"checkpoints": what} for what in ([10**400], "x", [None], [[1]], [-5])]
    lines = [json.dumps(line) for line in [*escape, *odd]] + ["[" * 100_000, "null", "\x00"]
    dice.shuffle(lines)
    endless = dice.choice(("", "lines", "bytes"))
    _put(folder / "tail.py", lambda place: place.write_text(TAIL.format(lines=lines, endless=endless)))
    said = dice.choice(("", "\n\n", "[]\n", "[" * 100_000, '{"state": ["done"], "right_to_end": "yes"}', ESCAPES))
    _put(folder / "agent.py", lambda place: place.write_text(AGENT.format(said=said, endless=dice.random() < 0.3)))


def words(folder: Path, outside: Path, dice: random.Random) -> None:
    """Logs and measurements that command a terminal, and JSON of no shape."""
    for name in ("logs/worker.log", "logs/install.log", "metrics.jsonl", "evals.jsonl"):
        _put(folder / name, lambda place: place.write_text(f"{ESCAPES}\n" * 50))
    for name in ("status.json", "summary.json", "agent-status.json", "agent.json", "environment.json", "armed.json"):
        _put(folder / name, lambda place: place.write_bytes(dice.choice(ODD)))


def sizes(folder: Path, outside: Path, dice: random.Random) -> None:
    """Files that are 8 TiB and take no block there, and very many."""
    for name in dice.sample(("model/weights", "logs/x.log", "metrics.jsonl", "summary.json", "agent-status.json"), 2):
        _put(folder / name, lambda place: os.truncate(os.open(place, os.O_CREAT | os.O_RDWR), 1 << 43))
    for number in range(2_000):
        with suppress(OSError):
            (folder / "logs" / f"{number}.log").write_text("x")


WAYS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    one.__name__: one for one in (links, devices, names, scripts, words, sizes)
}


def turn(folder: Path, outside: Path, ways: list[str], dice: random.Random) -> None:
    """Have a run's folder in a pod be an enemy's from now on, in these ways."""
    for way in ways:
        WAYS[way](folder, outside, dice)


def _link(target: Path, place: Path) -> None:
    place.symlink_to(target)


def _put(place: Path, make: Callable[[Path], object]) -> None:
    """Instead of what is there; the training and the agent may be writing at the same moment."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink() or not place.is_dir():
            place.unlink(missing_ok=True)
        make(place)


def written(*folders: Path, but: tuple[Path, ...] = ()) -> int:
    """Bytes of all files below folders, without others and what is below them; a folder or an empty file counts as
    one."""
    found = 0
    for folder in folders:
        for path, below, files in os.walk(folder):
            below[:] = [name for name in below if Path(path, name) not in but]
            plain = (file for name in files if (file := Path(path, name)) not in but)
            found += sum(max(1, file.lstat().st_size) for file in plain) + len(below)
    return found


def not_plain(run: Path) -> int:
    """Links, devices, pipes and sockets in a run directory."""
    modes = (Path(path, name).lstat().st_mode for path, below, files in os.walk(run) for name in (*below, *files))
    return sum(not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) for mode in modes)
