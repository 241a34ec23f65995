"""A stream of documents → text files of so many lines each, with a manifest; going on where it was interrupted.

An interrupted stream keeps what it has read: the shard that is not full yet is written too, and taken up again.

A document is a line: line breaks within it become spaces. Whether it goes to the training or the validation shards
depends on its number and the seed alone, so a run that was cut off sends every document where it would have gone. The
manifest counts finished shards only; what a shard was made of is found again by number.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.data.pretraining.documents import documents
from runner.data.pretraining.workspace import Workspace, has_lost, is_ready, is_whole, manifest_of
from runner.data.readers import sources
from runner.errors import Problem, RequestError
from runner.rundir.directory import write_atomically
from runner.spec import DataSpec, Pretrain

SMOKE_DOCUMENTS = 1000
TELL_EVERY = 20_000
"""Documents between two lines of progress."""


CONTENT = ("fingerprint", "mode", "val_ratio", "take")
"""Settings that decide which documents are learned from."""
OTHERS = ("lines_per_shard", "gzip", "seed")


@dataclass(frozen=True)
class Settings:
    """Settings that determine the shards; stored in the manifest and with the tokenizer."""

    source: str
    """As it is called; what it holds is in `fingerprint`."""
    fingerprint: str
    mode: str
    val_ratio: float | None
    lines_per_shard: int
    take: int | None
    gzip: bool
    seed: int

    def differ(self, known: dict[str, Any], keys: Sequence[str] = CONTENT) -> str:
        """Names of the settings that others were made with; empty where they were the same."""
        own = asdict(self)
        if "fingerprint" not in known:  # of an earlier version
            keys = ["source" if key == "fingerprint" else key for key in keys]
        changed = [key for key in keys if known and known.get(key) != own[key]]
        return ", ".join("source" if key == "fingerprint" else key for key in changed)


@dataclass(frozen=True)
class Sharded:
    """What is there now."""

    train: dict[str, Any]
    val: dict[str, Any] | None
    made: bool
    """It was made now, or finished; else it was there."""


class _Shards:
    """Writes one folder of shards; a shard has its name only when it is whole."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        self.manifest = manifest_of(folder) or {"settings": asdict(settings), "shards": [], "last": -1}
        for file in folder.glob(".*.tmp"):
            file.unlink()
        self.lines: list[tuple[int, str]] = []
        """Documents of no finished shard, each with its number."""
        shards = self.manifest["shards"]
        if shards and shards[-1].get("partial"):
            self.manifest = self.manifest | {"shards": shards[:-1]}
            self.lines = [(self.last, line + "\n") for line in _read(folder / shards[-1]["file"])]
            self._flush_full(self.last)

    @property
    def last(self) -> int:
        """Number of the last document in a finished shard; -1 before the first."""
        return int(self.manifest["last"])

    def add(self, number: int, text: str) -> None:
        """One document, unless it was kept before."""
        if number <= self.last:
            return
        self.lines.append((number, " ".join(text.split()) + "\n"))
        self._flush_full(number)

    def _flush_full(self, number: int) -> None:
        if len(self.lines) >= self.settings.lines_per_shard:
            self.flush(number)

    def flush(self, number: int, complete: bool = False, partial: bool = False) -> None:
        """Write the shard, then the manifest: whoever dies in between does the shard again, under the same name.

        A `partial` one has another name, so that it stays until a full one has taken its place.
        """
        manifest = self.manifest | {"shards": list(self.manifest["shards"])}
        if self.lines:
            name = f"shard-{len(manifest['shards']):05d}{'-partial' * partial}.txt{'.gz' * self.settings.gzip}"
            content = "".join(line for _, line in self.lines).encode()
            if self.settings.gzip:
                content = gzip.compress(content, mtime=0)
            temporary = self.folder / f".{name}.{os.getpid()}.tmp"
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.folder / name)
            checksum = hashlib.sha256(content).hexdigest()
            shard = {"file": name, "lines": len(self.lines), "bytes": len(content), "sha256": checksum}
            manifest["shards"].append(shard | {"partial": True} if partial else shard)
        shards = manifest["shards"]
        manifest |= {
            "last": max(number, self.last), "complete": complete, "num_shards": len(shards),
            "lines": sum(shard["lines"] for shard in shards), "bytes": sum(shard["bytes"] for shard in shards),
        }  # fmt: skip
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        self.manifest, self.lines = manifest, []  # no call in between: a signal comes before both, or after both
        for file in self.folder.glob("*-partial.*"):
            if not partial:
                file.unlink()


def documents_to_read(objective: Pretrain) -> int | None:
    """Return the maximum number of documents."""
    return objective.take or (SMOKE_DOCUMENTS if objective.mode == "smoke" else None)


def settings_of(objective: Pretrain, data: DataSpec, seed: int) -> Settings:
    """`take` and `val_ratio` as the mode means them; RequestError where a file of the source is gone."""
    source = {"pydoc": "pydoc", "hub": f"{data.id}:{data.subset}:{data.split}"}.get(data.source, str(data.path))
    if data.sources:
        source = json.dumps([data.mix, *(one.model_dump(exclude_defaults=True) for one in data.sources)])
    ratio = objective.val_ratio if objective.mode == "split" and not _own_val(data) else None
    try:
        fingerprint = sources.documents_digest(data)
    except OSError as error:
        what = f"{error.filename} cannot be read: {error.strerror}"
        remedy = "correct it, or write objective.shards=reuse to take the shards that are there"
        raise RequestError(Problem(what, "data.path", remedy)) from None
    lines, take = objective.lines_per_shard, documents_to_read(objective)
    return Settings(source, fingerprint, objective.mode, ratio, lines, take, objective.gzip, seed)


def make_shards(
    place: Workspace, objective: Pretrain, data: DataSpec, seed: int, say: Callable[[str], None] = lambda line: None,
    beat: Callable[[], None] = lambda: None,
) -> Sharded:  # fmt: skip
    """Make what is missing; RequestError where shards of other settings are in the way, or where nothing was read.

    Interrupted, it keeps what was read so far, and says how to go on.
    """
    if is_ready(place.train, objective.shards) and objective.shards == "reuse":  # whatever they were made of
        if not is_whole(place.train):
            last = manifest_of(place.train)["last"]
            say(f"Shards  the first {last + 1:,} documents of a stream that was interrupted")
        return Sharded(manifest_of(place.train), manifest_of(place.val) or None, False)
    settings = settings_of(objective, data, seed)
    if objective.shards == "anew":
        for folder in (place.train, place.val):
            shutil.rmtree(folder, ignore_errors=True)
    if is_whole(place.train):
        check_same(place, settings)
        if changed := settings.differ(_settings(place.train), OTHERS):
            say(f"Shards  made with another {changed} than asked for now; objective.shards=anew makes them again")
        return Sharded(manifest_of(place.train), manifest_of(place.val) or None, False)
    if objective.shards == "reuse":
        raise RequestError(missing_shards_problem(place))
    check_same(place, settings, (*CONTENT, *OTHERS))
    for folder in (place.train, place.val):
        if has_lost(folder):  # which documents were in it is known by number only: all are done again
            say(f"Shards  some of {folder} are gone: made again")
            shutil.rmtree(folder)
    train = _Shards(place.train, settings)
    val = _Shards(place.val, settings) if settings.val_ratio else None
    first = min(part.last for part in (train, val) if part) + 1
    if first:
        say(f"Shards  go on after {first:,} documents")
    number = -1
    try:
        for number, text in _numbered(data, settings, first):
            (val if val and _to_val(number, settings) else train).add(number, text)
            beat()
            if (number + 1) % TELL_EVERY == 0:
                say(f"  {number + 1:,} documents sharded")
        if val:
            val.flush(number, complete=True)
        elif _own_val(data):
            val = _Shards(place.val, settings)
            for held, text in _numbered(data, settings, val.last + 1, held_out=True):
                val.add(held, text)
                beat()
            val.flush(val.last, complete=True)
    except KeyboardInterrupt:
        _seal([part for part in (train, val) if part], say)
        raise
    train.flush(number, complete=True)  # last: whoever finds it whole finds the other whole, too
    if not train.manifest["shards"]:
        shutil.rmtree(place.train)
        raise RequestError(Problem(f"{settings.source} holds no document to train on", "data", "name another source"))
    return Sharded(train.manifest, val.manifest if val else None, True)


def _seal(parts: Sequence[_Shards], say: Callable[[str], None]) -> None:
    """Keep what an interrupted stream has read."""
    for part in (part for part in parts if part.lines):
        same = parts if part.settings.val_ratio else [part]  # a held-out file is numbered by itself
        part.flush(max(number for other in same for number in (other.last, *(n for n, _ in other.lines))), partial=True)
    if lines := parts[0].manifest.get("lines"):
        say(
            f"Shards  interrupted: {lines:,} documents are kept ({parts[0].folder}). The same command continues; "
            "objective.shards=reuse trains on them"
        )


def lines_of(folder: Path) -> Iterator[str]:
    """The documents of all shards in a folder, in order."""
    for part in manifest_of(folder).get("shards", []):
        yield from _read(folder / part["file"])


def _read(file: Path) -> Iterator[str]:
    opened: Any = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.rstrip("\n")


def missing_shards_problem(place: Workspace) -> Problem:
    """Shards that are to be reused are not there."""
    lost = has_lost(place.train)
    what = f"some of {place.train} are gone" if lost else f"{place.train} holds no shards"
    return Problem(what, "objective.shards=reuse", "write objective.shards=auto to make them")


def check_same(place: Workspace, settings: Settings, keys: Sequence[str] = CONTENT) -> None:
    """RequestError where the shards there, or the tokenizer, belong to other documents."""
    for folder in (place.train, place.val):
        known = _settings(folder)
        if changed := settings.differ(known, keys):
            begun = "made" if is_whole(folder) else "begun"
            raise RequestError(other_documents(f"{folder} was {begun} with another {changed}", known, settings))


def other_documents(what: str, known: dict[str, Any], settings: Settings) -> Problem:
    """Shards or a tokenizer that belong to other documents, with the ways out."""
    before, now = str(known.get("source", settings.source)), settings.source
    names = "" if (before + now).count("[") else f" ({before}, now {now})"  # no lists of sources
    if names and os.path.abspath(os.path.expanduser(before)) == os.path.abspath(os.path.expanduser(now)):
        names = f" ({now}: its files or the field that is read have changed)" if "source" in what else ""
    remedy = "write objective.shards=anew to make shards and tokenizer again, or another objective.experiment=NAME"
    return Problem(f"{what}{names}", "objective.experiment", remedy)


def _settings(folder: Path) -> dict[str, Any]:
    found = manifest_of(folder).get("settings", {})
    return found if isinstance(found, dict) else {}


def _numbered(
    data: DataSpec, settings: Settings, first: int, held_out: bool = False
) -> Iterator[tuple[int, str]]:  # fmt: skip
    for number, text in enumerate(documents(data, held_out=held_out, skip=first, seed=settings.seed), first):
        if settings.take is not None and number >= settings.take:
            return
        if text.strip():
            yield number, text


def _to_val(number: int, settings: Settings) -> bool:
    return random.Random(f"{settings.seed}:{number}").random() < (settings.val_ratio or 0.0)


def _own_val(data: DataSpec) -> bool:
    return bool(data.eval_path or data.eval_split)
