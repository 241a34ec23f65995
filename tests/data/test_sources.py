"""Folders, globs, URLs, compression, mixing, policies, and files too large for memory."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data import load as data_load
from runner.data.examples import Example, fingerprint
from runner.data.load import load_examples, read_dataset
from runner.data.readers import streams
from runner.data.readers.sources import files_of, mixed
from runner.data.row_store import Stored
from runner.errors import RequestError
from runner.spec import DataSpec
from tests.support.rows import read_rows


def lines(count: int, name: str = "row") -> bytes:
    return b"".join(json.dumps({"text": f"{name} {n}"}).encode() + b"\n" for n in range(count))


def texts(**changes: Any) -> list[str | None]:
    return [example.text for example in load_examples(DataSpec(**{"eval_fraction": 0.0, **changes}), 1)[0]]


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return bytes(sink.getvalue())


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("ending", PACKED)
def test_compressed_files_are_read_and_damaged_ones_named(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"my.jsonl{ending}"
    file.write_bytes(PACKED[ending](lines(3)))
    assert len(read_rows(str(file))) == 3
    file.write_bytes(PACKED[ending](lines(3))[:-9] if ending != ".zst" else b"nothing")
    with pytest.raises(RequestError, match="is damaged"):
        read_rows(str(file))


def test_text_files_are_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("one\r\n\n  two\nthree", "utf-8", newline="")
    assert texts(path=str(tmp_path / "my.txt")) == ["one", "  two", "three"]


def test_folders_and_globs_are_their_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_bytes(lines(1, "two"))
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines(1, "one")))
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    assert texts(path=str(tmp_path)) == ["one 0", "two 0"]
    assert texts(path=f"{tmp_path}/*/*.jsonl") == ["two 0"]
    with pytest.raises(RequestError, match="no file fits"):
        texts(path=f"{tmp_path}/*.csv")
    (tmp_path / "c").mkdir()
    with pytest.raises(RequestError, match="holds no data file"):
        texts(path=str(tmp_path / "c"))


def test_urls_are_read_by_fsspec(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(lines(2))
    assert texts(path=f"file://{tmp_path}/my.jsonl") == ["row 0", "row 1"]
    assert texts(path=f"file://{tmp_path}") == ["row 0", "row 1"]
    assert len(files_of(f"file://{tmp_path}/*.jsonl")) == 1
    with pytest.raises(RequestError, match="cannot be read"):
        texts(path=f"file://{tmp_path}/other.jsonl")
    with pytest.raises(RequestError, match="nosuch"):
        texts(path="nosuch://bucket/my.jsonl")


def test_an_object_store_is_read(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", lines(1, "a"))
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(lines(1, "b")))
    assert texts(path="memory://bucket") == ["a 0", "b 0"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket `rows` on a real S3 server, moto's, as the variables of the AWS tools name it."""
    from boto3 import Session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**names, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client = Session().client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="rows")
    yield client
    server.stop()


def test_s3_is_read_file_folder_and_glob(s3: Any) -> None:
    s3.put_object(Bucket="rows", Key="deep/a.jsonl", Body=lines(2, "a"))
    s3.put_object(Bucket="rows", Key="deep/er/b.jsonl.gz", Body=gzip.compress(lines(1, "b")))
    s3.put_object(Bucket="rows", Key="deep/README.md", Body=b"no data")
    assert texts(path="s3://rows/deep/a.jsonl") == ["a 0", "a 1"]
    assert files_of("s3://rows/deep") == ["s3://rows/deep/a.jsonl", "s3://rows/deep/er/b.jsonl.gz"]
    assert texts(path="s3://rows/deep/") == ["a 0", "a 1", "b 0"]
    assert files_of("s3://rows/*/*.jsonl") == ["s3://rows/deep/a.jsonl"]
    for path, what in (("s3://rows/deep/c.jsonl", "cannot be read"), ("s3://nobodys/a.jsonl", "cannot be read")):
        with pytest.raises(RequestError, match=what) as caught:
            texts(path=path)
        assert "\n" not in caught.value.problems[0].what
    with pytest.raises(RequestError, match="holds no data file"):
        texts(path="s3://rows/*.csv")


def test_sources_have_their_own_names_limits_and_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1?", "reply": "one"}\n{"question": "2?", "reply": "two"}\n')
    turns = [{"role": "user", "content": "3?"}, {"role": "assistant", "content": "three"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns}))
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "fields": {"prompt": "question", "completion": "reply"}, "max_examples": 1},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    train, _ = load_examples(DataSpec(sources=sources, eval_fraction=0.0), 1)
    assert [example.completion[0]["content"] for example in train] == ["one", "three"]
    sources[0]["fields"] = {"propmt": "question"}
    with pytest.raises(RequestError, match="unknown field propmt"):
        load_examples(DataSpec(sources=sources), 1)


def test_rows_are_held_out_of_a_source_before_it_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(10, "a"))
    (tmp_path / "b.jsonl").write_bytes(lines(200, "b"))
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 1}, {"path": str(tmp_path / "b.jsonl"), "weight": 1}]
    train, held = load_examples(DataSpec(sources=sources, mix="weights", eval_fraction=0.1), 1)
    assert not {e.text for e in train} & {e.text for e in held}
    counts = Counter(str(e.text)[0] for e in train)
    assert counts["a"] == pytest.approx(counts["b"], rel=0.35) and {e.text for e in train if e.text} >= {"b 3"}
    assert len(held) == 21


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 9))
def test_mixing_uses_all_rows_evenly(sizes: list[int], seed: int) -> None:
    weights = [1.0 + i for i in range(len(sizes))]
    once = mixed(sizes, weights, "concat", seed)
    assert sorted(once) == [(s, r) for s, size in enumerate(sizes) for r in range(size)]
    repeated = Counter(mixed(sizes, weights, "weights", seed))
    assert set(repeated) == set(once)
    for source in range(len(sizes)):  # no row is repeated before every other of its source was
        counts = [count for (s, _), count in repeated.items() if s == source]
        assert max(counts) - min(counts) <= 1
    assert max(Counter(mixed(sizes, weights, "until_exhausted", seed)).values()) == 1


def test_wrong_rows_stop_or_are_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"text": "a"}\n{"text": ""}\n{"text": 1}\n{\n{"text": "b"}\n')
    with pytest.raises(RequestError) as caught:
        texts(path=str(file))
    assert len(caught.value.problems) == 3
    found = read_dataset(DataSpec(path=str(file), on_error="skip", eval_fraction=0.0), 1)
    assert [row.text for row in found.train if isinstance(row, Example)] == ["a", "b"]
    assert found.note is not None and found.note.startswith("Skipped 3 rows that are wrong; the first: ")
    file.write_text('{"text": ""}\n')
    with pytest.raises(RequestError, match="text is empty"):
        texts(path=str(file), on_error="skip")


# --- files too large for memory ----------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "parquet", "csv", "json"])
def test_large_files_give_what_small_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "BLOCK", 100)
    monkeypatch.setattr(streams, "PARQUET_ROWS", 7)
    file = tmp_path / f"my.{ending}"
    rows = [{"text": f"row é {n}"} for n in range(40)]
    if ending == "parquet":
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        body = {"txt": "\n".join(row["text"] for row in rows), "csv": "text\n" + "\n".join(r["text"] for r in rows)}
        body["json"] = json.dumps(rows)
        text = body.get(ending, "\n".join(map(json.dumps, rows)))
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    spec = DataSpec(path=str(file), eval_fraction=0.2, max_examples=25)
    small = read_dataset(spec, 1)
    monkeypatch.setattr(data_load, "IN_MEMORY_BYTES", 0)
    large = read_dataset(spec, 1)
    assert isinstance(large.train, Stored) and not isinstance(small.train, Stored)
    assert list(large.train) == small.train and list(large.held) == small.held
    assert [row.where for row in large.train] == [row.where for row in small.train]
    assert fingerprint(large.train) == fingerprint(small.train)
    assert list(large.train[2:5]) == small.train[2:5] and large.train[-1] == small.train[-1]


@pytest.mark.parametrize("mix", ["concat", "weights"])
def test_large_sources_are_mixed_on_disk_as_small_ones_in_memory(
    mix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    for name, count in (("a", 20), ("b", 90)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(count, name))
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, {"path": str(tmp_path / "b.jsonl")}]
    spec = DataSpec.model_validate({"sources": sources, "mix": mix, "eval_fraction": 0.2, "max_examples": 60})
    small = read_dataset(spec, 1)
    monkeypatch.setattr(data_load, "IN_MEMORY_BYTES", 0)
    large = read_dataset(spec, 1)
    assert isinstance(large.train, Stored) and isinstance(large.held, Stored)
    assert list(large.train) == small.train and list(large.held) == small.held


def test_mistakes_in_large_files_have_their_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "BLOCK", 20)
    monkeypatch.setattr(data_load, "IN_MEMORY_BYTES", 0)
    file = tmp_path / "my.jsonl"
    file.write_text('{"text": "aaaaaaaaaaaa"}\n\n{"text": ""}\n{"text": "b"}\n{"text"\n')
    with pytest.raises(RequestError) as caught:
        read_dataset(DataSpec(path=str(file)), 1)
    assert [str(p.source).rpartition(", ")[2] for p in caught.value.problems] == ["line 3", "line 5"]
    file.write_bytes('{"text": "aaaaaaaaaaaa"}\n{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(RequestError) as caught:
        read_dataset(DataSpec(path=str(file)), 1)
    assert str(caught.value.problems[0].source).endswith("line 2")


def test_the_hub_is_streamed_and_large_sets_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` reads a folder the way it reads a repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_bytes(lines(100))
    spec = DataSpec(source="hub", id="org/name", max_examples=9, streaming=True, eval_fraction=0.1)
    found = read_dataset(spec, 1)
    assert len(found.train) == 9 and 1 <= len(found.held) <= 2
    monkeypatch.setattr(data_load, "IN_MEMORY_ROWS", 50)
    monkeypatch.setattr(data_load, "PIECE", 30)
    found = read_dataset(DataSpec(source="hub", id="org/name", eval_fraction=0.0), 1)
    assert isinstance(found.train, Stored) and len(found.train) == 100
    assert found.train[99].where == "org/name train, row 100"
    with pytest.raises(ValueError, match="say how many"):
        DataSpec(source="hub", id="org/name", streaming=True)
