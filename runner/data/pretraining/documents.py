"""Documents of plain text, one after the other, from any source, a piece of a file in memory at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

from runner.data.readers.files import kind_of_file, raise_problems
from runner.data.readers.hub import problem_of
from runner.data.readers.sources import Source, files_of, sources_of
from runner.data.readers.streams import tables
from runner.data.user_formats import as_standard
from runner.errors import Problem, RequestError
from runner.spec import DataSpec


def documents(data: DataSpec, *, held_out: bool = False, skip: int = 0, seed: int = 0) -> Iterator[str]:
    """The texts of `data` (or of its held-out file or split), from number `skip` on.

    A line of a text file is a document, empty ones are passed over; of a table the text is in `data.text_field`.
    Several sources are mixed as `data.mix` says, drawn by `seed`.
    """
    if data.source == "pydoc":
        found = reference_pages()
    elif data.source == "hub":
        yield from _hub(data, str(data.eval_split if held_out else data.split), skip)
        return
    elif held_out:
        found = texts(Source(str(data.eval_path), files_of(str(data.eval_path)), data))
    else:
        found = _mixed(sources_of(data), data.mix, seed)
    yield from islice(found, skip, None)


def _mixed(sources: Sequence[Source], mix: str, seed: int) -> Iterator[str]:
    """As `sources.mixed`, without knowing how many there are: that a source is used up shows when it is drawn next."""
    if mix == "concat" or len(sources) < 2:
        for source in sources:
            yield from texts(source)
        return
    rng, weights = random.Random(seed), [source.weight for source in sources]
    left = [texts(source) for source in sources]
    used, over = [False] * len(sources), [False] * len(sources)
    while not all(over):
        (drawn,) = rng.choices(range(len(sources)), weights)
        text = next(left[drawn], None)
        if text is not None:
            used[drawn] = True
            yield text
        elif not used[drawn]:
            raise RequestError(Problem(f"{sources[drawn].name} has no document to mix", None, "leave it out"))
        elif mix == "until_exhausted":
            return
        else:
            over[drawn], left[drawn] = True, texts(sources[drawn])


def texts(source: Source) -> Iterator[str]:
    """Every document of the source that holds more than white space, at most its limit."""
    return islice(_all(source), source.limit)


def _all(source: Source) -> Iterator[str]:
    for name in source.files:
        field = "text" if kind_of_file(name) == "txt" else source.spec.text_field
        for table in tables(name):
            if table.problems:
                raise_problems(table.problems)
            for index, row in enumerate(table.rows):
                place = table.place(index)
                row, own = as_standard(row, place, source.spec)
                text = _text(row, "text" if own is not source.spec else field, place)
                if text.strip():
                    yield text


def reference_pages() -> Iterator[str]:
    """The reference of the Python language, as `help()` shows it: 0.7 MB of English that every CPython carries."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) > 40:  # headings and rules
                yield text


def _text(row: dict[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise RequestError(Problem(f"has no text in its field {field}", where, "write data.text_field=…"))
    return text


def _hub(data: DataSpec, split: str, skip: int) -> Iterator[str]:
    try:  # 0.9 s to import, and only Hub data needs it
        datasets = import_module("datasets")
        rows = datasets.load_dataset(data.id, name=data.subset, split=split, revision=data.revision, streaming=True)
        for number, row in enumerate(rows.skip(skip) if skip else rows):
            place = f"{data.id} {split}, row {skip + number + 1}"
            row, own = as_standard(row, place, data)
            yield _text(row, own.text_field, place)
    except RequestError:
        raise
    except Exception as error:  # whatever a loader of foreign files raises, the data set is at fault
        raise RequestError(problem_of(error, data, "split", split)) from error
