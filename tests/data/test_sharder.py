"""Shards: modes, compression, a manifest that is true, and going on after a kill as if nothing had been."""

from __future__ import annotations

import bz2
import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from runner.data.pretraining import corpus_checks, sharder
from runner.data.pretraining.documents import documents
from runner.data.pretraining.workspace import Workspace, is_ready, is_whole, manifest_of, workspace_of
from runner.data.readers import sources
from runner.errors import RequestError
from runner.spec import DataSpec, Pretrain
from tests.support.front import spec_of


@pytest.fixture
def corpus(tmp_path: Path) -> DataSpec:
    """A hundred documents, one a line, and two empty lines."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"document {i}\n" for i in range(50)) + "\n\n" + "".join(f"more {i}\n" for i in range(50)))
    return DataSpec(path=str(file))


def made(tmp_path: Path, data: DataSpec, seed: int = 0, **knobs: Any) -> tuple[Workspace, sharder.Sharded]:
    """Shards below `tmp_path/work`."""
    objective = Pretrain(experiment="e", root=str(tmp_path / "work"), **knobs)
    place = workspace_of(objective)
    assert place is not None
    return place, sharder.make_shards(place, objective, data, seed)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def test_prod_takes_all_and_smoke_the_first(tmp_path: Path, corpus: DataSpec) -> None:
    place, found = made(tmp_path, corpus, mode="prod", lines_per_shard=30)
    assert [shard["lines"] for shard in found.train["shards"]] == [30, 30, 30, 10]
    assert found.val is None and is_whole(place.train)
    assert list(sharder.lines_of(place.train)) == list(documents(corpus))
    _, smoke = made(tmp_path / "s", corpus, mode="smoke", take=7)
    assert smoke.train["lines"] == 7


def test_split_sends_a_share_to_validation_and_loses_nothing(tmp_path: Path, corpus: DataSpec) -> None:
    place, found = made(tmp_path, corpus, val_ratio=0.3, lines_per_shard=8)
    train, val = set(sharder.lines_of(place.train)), set(sharder.lines_of(place.val))
    assert not train & val and len(train | val) == 100
    assert found.val and 15 <= found.val["lines"] <= 45
    _, again = made(tmp_path / "again", corpus, val_ratio=0.3, lines_per_shard=8)
    assert again.train["shards"] == found.train["shards"]
    _, other = made(tmp_path / "other", corpus, seed=1, val_ratio=0.3, lines_per_shard=8)
    assert other.train["shards"] != found.train["shards"]


def test_a_validation_corpus_of_its_own(tmp_path: Path, corpus: DataSpec) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": f"held\n{i}"}) + "\n" for i in range(5)))
    place, found = made(tmp_path, corpus.model_copy(update={"eval_path": str(held)}))
    assert found.train["lines"] == 100 and found.val and found.val["lines"] == 5
    assert next(sharder.lines_of(place.val)) == "held 0"  # a document is one line


def test_gzip(tmp_path: Path, corpus: DataSpec) -> None:
    place, _ = made(tmp_path, corpus, mode="prod", gzip=True)
    (name,) = contents(place.train)
    assert name == "shard-00000.txt.gz"
    assert gzip.decompress(contents(place.train)[name]).count(b"\n") == 100
    assert list(sharder.lines_of(place.train)) == list(documents(corpus))


class Killed(BaseException):
    """Nothing is tidied up."""


@pytest.mark.parametrize("ends", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("dies_at", [3, 20, 55, 99])
def test_after_a_kill_it_goes_on_to_the_same_shards_or_trains_on_those_there(
    ends: type[BaseException], dies_at: int, tmp_path: Path, corpus: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = made(tmp_path / "whole", corpus, val_ratio=0.3, lines_per_shard=8)
    calls = 0

    def beat() -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise ends

    objective = Pretrain(experiment="e", root=str(tmp_path / "work"), val_ratio=0.3, lines_per_shard=8)
    place = workspace_of(objective)
    assert place is not None
    with pytest.raises(ends):
        sharder.make_shards(place, objective, corpus, 0, beat=beat)
    assert not is_whole(place.train)
    reuse = objective.model_copy(update={"shards": "reuse"})
    kept = {text for folder in (place.train, place.val) for text in sharder.lines_of(folder)}
    if ends is KeyboardInterrupt:  # all that was read
        assert kept == set(list(documents(corpus))[:dies_at])
    if is_ready(place.train, "reuse"):
        said: list[str] = []
        found = sharder.make_shards(place, reuse, corpus, 0, said.append)
        assert (
            not found.made
            and list(sharder.lines_of(place.train)) == list(sharder.lines_of(whole.train))[: found.train["lines"]]
        )
        assert f"the first {found.train['last'] + 1} documents of a stream that was interrupted" in said[0]
    else:
        assert ends is Killed and dies_at < 20
        with pytest.raises(RequestError, match="holds no shards"):
            sharder.make_shards(place, reuse, corpus, 0)
    sharder.make_shards(place, objective, corpus, 0)
    for cut, meant in ((place.train, whole.train), (place.val, whole.val)):
        assert contents(cut) == contents(meant)
        assert manifest_of(cut) == manifest_of(meant)


def test_what_is_there_is_reused_made_anew_or_in_the_way(tmp_path: Path, corpus: DataSpec) -> None:
    place, first = made(tmp_path, corpus, mode="prod")
    assert first.made
    _, second = made(tmp_path, corpus, mode="prod", shards="reuse")
    assert not second.made and second.train == first.train
    _, third = made(tmp_path, corpus, mode="smoke", take=5, shards="anew")
    assert third.made and third.train["lines"] == 5
    (place.train / "shard-00000.txt").unlink()  # lost
    _, fourth = made(tmp_path, corpus, mode="smoke", take=5)
    assert fourth.made and fourth.train == third.train
    (place.train / "shard-00000.txt").unlink()
    with pytest.raises(RequestError) as caught:
        made(tmp_path, corpus, mode="prod")
    assert "was begun with another mode, take" in str(caught.value)


@pytest.mark.parametrize("change", ["rows", "longer", "field", "held", "sources", "hub", "mode"])
def test_shards_of_other_documents_are_refused_with_the_ways_out(tmp_path: Path, corpus: DataSpec, change: str) -> None:
    file, held = Path(str(corpus.path)), tmp_path / "held.txt"
    held.write_text("held out\n")
    corpus = DataSpec(path=str(file), eval_path=str(held))
    _, first = made(tmp_path, corpus)
    moved = file.rename(tmp_path / "moved.txt")
    corpus = DataSpec(path=str(moved), eval_path=str(held))
    assert made(tmp_path, corpus)[1].train == first.train  # moved, and the same
    lines, knobs = moved.read_text().splitlines(keepends=True), {}
    match change:
        case "rows":
            moved.write_text("".join([lines[0].replace("0", "9"), *lines[1:]]))
        case "longer":
            moved.write_text("".join([*lines, "one more\n"]))
        case "field":
            corpus = corpus.model_copy(update={"text_field": "body"})
        case "held":
            held.write_text("other\n")
        case "sources":
            corpus = DataSpec.model_validate({"sources": [{"path": str(moved), "weight": 2}], "eval_path": str(held)})
        case "hub":
            corpus = DataSpec(source="hub", id="org/rows", eval_split="test")
        case "mode":
            knobs = {"mode": "smoke"}
    with pytest.raises(RequestError) as caught:
        made(tmp_path, corpus, **knobs)
    (problem,) = caught.value.problems
    assert "was made with another " + ("mode, take" if change == "mode" else "source") in problem.what
    assert "objective.shards=anew" in str(problem.remedy) and "objective.experiment=NAME" in str(problem.remedy)
    assert made(tmp_path, corpus, shards="reuse", **knobs)[1].train == first.train
    if change not in ("hub", "field"):
        again = made(tmp_path, corpus, shards="anew", **knobs)[1]
        assert again.made and (again.train["shards"] != first.train["shards"] or change in ("held", "sources", "mode"))


def test_another_seed_or_size_of_shards_is_said(tmp_path: Path, corpus: DataSpec) -> None:
    place, first = made(tmp_path, corpus)
    said: list[str] = []
    objective = Pretrain(experiment="e", root=str(tmp_path / "work"), lines_per_shard=7)
    assert sharder.make_shards(place, objective, corpus, 5, said.append).train == first.train
    assert "made with another lines_per_shard, seed than asked for now" in said[0]


def test_a_large_corpus_is_told_apart_by_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHOLE_BYTES", 0)
    file = tmp_path / "large.txt"
    file.write_bytes(b"a" * 20_000_000)
    before = sources.files_digest([str(file)])
    assert sources.files_digest([str(file)]) == before
    for content in (b"a" * 20_000_001, b"a" * 19_999_999 + b"b", b"b" + b"a" * 19_999_999):
        file.write_bytes(content)
        assert sources.files_digest([str(file)]) != before


@pytest.mark.parametrize("mix", ["concat", "weights", "until_exhausted"])
def test_several_sources_are_mixed_and_a_cut_changes_nothing(mix: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"a {n}\n" for n in range(30)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"b {n}"}) + "\n" for n in range(300)))
    sources = [
        {"path": str(tmp_path / "a.txt"), "weight": 1},
        {"path": str(tmp_path / "b.jsonl"), "weight": 3, "max_examples": 200, "fields": {"text": "body"}},
    ]
    data = DataSpec.model_validate({"sources": sources, "mix": mix})
    found = list(documents(data, seed=5))
    assert list(documents(data, seed=5, skip=40)) == found[40:]
    kinds = Counter(text[0] for text in found)
    if mix == "concat":
        assert found == [f"a {n}" for n in range(30)] + [f"b {n}" for n in range(200)]
    elif mix == "weights":  # all of both, the rarer one again and again
        assert set(found) == {f"a {n}" for n in range(30)} | {f"b {n}" for n in range(200)}
        assert 2 < kinds["b"] / kinds["a"] < 4.5
    else:
        assert kinds["a"] == 30 and 50 < kinds["b"] < 200
    place, _ = made(tmp_path, data, seed=5, mode="prod")
    assert list(sharder.lines_of(place.train)) == found
    said: list[str] = []
    objective = Pretrain(experiment="e", root=str(tmp_path / "work"))
    other = data.model_copy(update={"mix": "concat" if mix != "concat" else "weights"})
    with pytest.raises(RequestError, match="made with another source, mode, val_ratio") as caught:
        sharder.make_shards(place, objective, other, 5, said.append)
    assert "objective.shards=anew" in str(caught.value.problems[0].remedy) and not said


@pytest.mark.parametrize("ending", ["parquet", "jsonl.zst", "csv", "txt.bz2"])
def test_a_corpus_in_any_kind_of_file(ending: str, tmp_path: Path) -> None:
    file, texts = tmp_path / f"corpus.{ending}", [f"document {n}, with a comma" for n in range(20)]
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"text": texts}), file)
    elif ending == "csv":
        file.write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    elif ending == "txt.bz2":
        file.write_bytes(bz2.compress("\n\n".join(texts).encode()))
    else:
        with pyarrow.CompressedOutputStream(str(file), "zstd") as out:
            out.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    assert list(documents(DataSpec(path=str(file)))) == texts


def test_every_broken_line_of_a_piece_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{\n[]\n{"body": "b"}\n')
    with pytest.raises(RequestError) as caught:
        list(documents(DataSpec(path=str(tmp_path / "c.jsonl"))))
    assert [str(p.source).rpartition(", ")[2] for p in caught.value.problems] == ["line 2", "line 3"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="holds no document"):
        made(tmp_path, DataSpec(path=str(tmp_path / "empty.txt")))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("again", [[4], [1, 1, 2], [3, 17, 40]])
def test_interrupted_again_and_again_it_comes_to_the_same_shards(
    packed: bool, again: list[int], tmp_path: Path, corpus: DataSpec
) -> None:
    knobs: dict[str, Any] = {"mode": "prod", "lines_per_shard": 8, "gzip": packed}
    whole, _ = made(tmp_path / "whole", corpus, **knobs)
    objective = Pretrain(experiment="e", root=str(tmp_path / "work"), **knobs)
    place = workspace_of(objective)
    assert place is not None
    for count in again:
        with pytest.raises(KeyboardInterrupt):
            sharder.make_shards(place, objective, corpus, 0, beat=partial(_end, iter(range(count - 1))))
        assert len(list(sharder.lines_of(place.train))) == manifest_of(place.train)["lines"]
    made(tmp_path, corpus, **knobs)
    assert contents(place.train) == contents(whole.train) and manifest_of(place.train) == manifest_of(whole.train)


def _end(left: Any) -> None:
    if next(left, None) is None:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_data_prepare_keeps_what_was_read_and_a_run_trains_on_it(number: int, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the document of number {n} in a long row\n" for n in range(2_000_000)))
    words = ["model=scratch_22m", "method=full", "objective=pretrain", "objective.experiment=e", "hw=cpu",
             "objective.mode=prod", f"data.path={corpus}", "objective.lines_per_shard=1000",
             "train.max_length=256"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", "data", "prepare", *words], cwd=tmp_path, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    manifest = tmp_path / "datasets/train/e/manifest.json"
    while not manifest.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in out + err, out + err
    facts = json.loads(manifest.read_text())
    assert 1000 <= facts["lines"] == facts["last"] + 1 < 2_000_000 and facts["complete"] is False
    assert f"interrupted: {facts['lines']:,} documents are kept" in out
    assert "objective.shards=reuse trains on them" in " ".join(out.split())
    place = Workspace(tmp_path, "e")
    assert list(sharder.lines_of(place.train))[-1] == f"the document of number {facts['last']} in a long row"
    spec = spec_of(*words, "objective.shards=reuse", f"objective.root={tmp_path}")
    found = corpus_checks.lengths_of(spec)
    assert found is not None and found.num_examples == facts["lines"]
