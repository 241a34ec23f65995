"""Content digests of a run's inputs: independent of path and time stamps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from runner.data.readers.files import kind_of_file
from runner.data.readers.sources import files_of, sources_of
from runner.spec import DataSpec
from runner.spec.input_paths import is_url

WHOLE_BYTES = 64 << 20
"""Up to this size in all every byte counts (0.1 s); of more, the sizes of the files and `BLOCKS` blocks of each."""
BLOCKS, BLOCK = 64, 64 << 10


def of_files(names: Sequence[str]) -> str:
    """SHA-256 (hex) over the contents of files, in order; a URL counts by its name.

    OSError where one of them is not there.
    """
    digest = hashlib.sha256()
    here = [os.path.expanduser(name) for name in names if not is_url(name)]
    whole = sum(map(os.path.getsize, here)) <= WHOLE_BYTES
    for name in names:
        if is_url(name):
            digest.update(f"{name}\0".encode())
            continue
        _add(digest, os.path.expanduser(name), whole)
    return digest.hexdigest()


def _add(digest: Any, file: str, whole: bool) -> None:
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


def of_documents(data: DataSpec) -> str:
    """What decides which documents `data` holds, in which order; RequestError and OSError for files that are gone."""
    said: list[Any] = [data.text_field]
    if data.source == "hub":
        said += [data.id, data.subset, data.split, data.eval_split, data.revision]
    elif data.source == "file":
        said += [data.mix if data.sources else None]
        for source in sources_of(data):
            kinds = sorted({str(kind_of_file(file)) for file in source.files})
            said.append([of_files(source.files), kinds, source.spec.text_field, source.weight, source.limit])
        said.append(of_files(files_of(data.eval_path)) if data.eval_path else None)
    else:
        said += [data.source]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
