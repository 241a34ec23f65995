"""Expand `data.path` and `data.sources` to files, folders, globs and URLs; their digests; and how they are mixed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.data.readers import urls
from runner.data.readers.files import READABLE, Table, kind_of_file, read_table
from runner.errors import Problem, RequestError
from runner.spec import DataSpec, SourceSpec
from runner.spec.input_paths import is_glob, is_url


@dataclass(frozen=True)
class Source:
    """Files that are read alike."""

    name: str
    """As the user wrote it."""
    files: list[str]
    spec: DataSpec
    """Format and names of the fields."""
    weight: float = 1.0
    limit: int | None = None

    def tables(self) -> Iterator[Table]:
        """Every file, read whole."""
        return (read_table(file) for file in self.files)


@dataclass(frozen=True)
class Loose(Source):
    """Rows that are in no file of ours."""

    table: Table = field(default_factory=lambda: Table("", []))

    def tables(self) -> Iterator[Table]:
        """The one that there is."""
        return iter([self.table])


def sources_of(spec: DataSpec) -> list[Source]:
    """Return the sources of `source=file`, with files listed; RequestError for a folder or glob without files."""
    if not spec.sources:
        assert spec.path is not None  # DataSpec: source=file has a path
        return [Source(spec.path, files_of(spec.path), spec)]
    return [
        Source(one.path, files_of(one.path), _as_in(one, spec), one.weight, one.max_examples) for one in spec.sources
    ]


def _as_in(one: SourceSpec, spec: DataSpec) -> DataSpec:
    changes: dict[str, Any] = {"format": one.format} if one.format else {}
    unknown = [name for name in one.fields if f"{name}_field" not in DataSpec.model_fields]
    if unknown:
        names = ", ".join(name.removesuffix("_field") for name in DataSpec.model_fields if name.endswith("_field"))
        what = f"data.sources: {one.path} names the unknown field {unknown[0]}"
        raise RequestError(Problem(what, None, f"fields are {names}"))
    return spec.model_copy(update=changes | {f"{name}_field": value for name, value in one.fields.items()})


def files_of(path: str) -> list[str]:
    """The data files behind a path, sorted; a path that is one file is itself, whether it is there or not."""
    if is_url(path):
        return _behind_url(path)
    place = Path(path).expanduser()
    if os.path.isdir(place):
        found = sorted(str(file) for file in place.rglob("*") if os.path.isfile(file) and _is_data(file.name))
        return found or _none(f"{path} holds no data file", f"name files {READABLE}")
    if not os.path.exists(place) and is_glob(path):
        found = sorted(file for file in glob.glob(str(place), recursive=True) if os.path.isfile(Path(file)))
        return found or _none(f"no file fits {path}", f"the pattern is relative to {Path.cwd()}")
    return [path]


def _none(what: str, remedy: str) -> list[str]:
    raise RequestError(Problem(what, None, remedy))


def _is_data(name: str) -> bool:
    return not name.startswith((".", "_")) and kind_of_file(name) is not None


def _behind_url(url: str) -> list[str]:
    """Files behind a URL that is a folder or a glob."""

    def files(system: Any, inner: str) -> list[str]:
        if any(sign in inner for sign in "*["):
            names = sorted(system.glob(inner))
        elif kind_of_file(inner) is not None or not system.isdir(inner):
            return [url]
        else:
            names = sorted(name for name in system.find(inner) if _is_data(name.rpartition("/")[2]))
        return [f"{urls.scheme_of(url)}://{name.partition('://')[2] or name}" for name in names]

    return urls.ask_file_system(url, files) or _none(f"{url} holds no data file", f"name files {READABLE}")


def mixed(sizes: Sequence[int], weights: Sequence[float], mix: str, seed: int) -> list[tuple[int, int]]:
    """(source, row) in the order they are learned.

    `concat` takes every row once. Otherwise a source is drawn by its weight for every row, its rows in order:
    `until_exhausted` stops where the source that is drawn has none left, `weights` begins it anew until every source
    was used up once.
    """
    if mix == "concat" or len(sizes) < 2:
        return [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    if not all(sizes):
        raise RequestError(Problem(f"source {list(sizes).index(0) + 1} has no rows to mix", None, "leave it out"))
    rng = random.Random(seed)
    taken = [0] * len(sizes)
    found: list[tuple[int, int]] = []
    while True:
        (source,) = rng.choices(range(len(sizes)), weights)
        if mix == "until_exhausted" and taken[source] == sizes[source]:
            return found
        found.append((source, taken[source] % sizes[source]))
        taken[source] += 1
        if mix == "weights" and all(count >= size for count, size in zip(taken, sizes, strict=True)):
            return found


WHOLE_BYTES = 64 << 20
"""Up to this size in all every byte counts (0.1 s); of more, the sizes of the files and `BLOCKS` blocks of each."""
BLOCKS, BLOCK = 64, 64 << 10


def files_digest(names: Sequence[str]) -> str:
    """SHA-256 (hex) over the contents of files, in order, whatever their paths and times; a URL counts by its name.

    OSError where one of them is not there.
    """
    digest = hashlib.sha256()
    here = [os.path.expanduser(name) for name in names if not is_url(name)]
    whole = sum(map(os.path.getsize, here)) <= WHOLE_BYTES
    for name in names:
        if is_url(name):
            digest.update(f"{name}\0".encode())
            continue
        _add_content(digest, os.path.expanduser(name), whole)
    return digest.hexdigest()


def _add_content(digest: Any, file: str, whole: bool) -> None:
    size = os.path.getsize(file)
    digest.update(f"{size}\0".encode())
    with open(file, "rb") as stream:
        if whole or size <= BLOCKS * BLOCK:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        for number in range(BLOCKS):  # the first and the last bytes among them
            stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))


def documents_digest(data: DataSpec) -> str:
    """Return a digest of the documents of `data` and their order; RequestError and OSError for missing files."""
    said: list[Any] = [data.text_field]
    if data.source == "hub":
        said += [data.id, data.subset, data.split, data.eval_split, data.revision]
    elif data.source == "file":
        said += [data.mix if data.sources else None]
        for source in sources_of(data):
            kinds = sorted({str(kind_of_file(file)) for file in source.files})
            said.append([files_digest(source.files), kinds, source.spec.text_field, source.weight, source.limit])
        said.append(files_digest(files_of(data.eval_path)) if data.eval_path else None)
    else:
        said += [data.source]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
