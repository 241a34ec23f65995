"""Shards: modes, compression, a manifest that is true, and going on after a kill as if nothing had been."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from runner.data import sharder
from runner.data.documents import documents
from runner.data.workspace import Workspace, is_whole, manifest_of, workspace_of
from runner.errors import RequestError
from runner.spec import DataSpec, Pretrain


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
    return place, sharder.shard(place, objective, data, seed)


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


@pytest.mark.parametrize("dies_at", [3, 20, 55, 99])
def test_after_a_kill_it_goes_on_to_the_same_shards(
    dies_at: int, tmp_path: Path, corpus: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = made(tmp_path / "whole", corpus, val_ratio=0.3, lines_per_shard=8)
    calls = 0

    def beat() -> None:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise KeyboardInterrupt

    objective = Pretrain(experiment="e", root=str(tmp_path / "work"), val_ratio=0.3, lines_per_shard=8)
    place = workspace_of(objective)
    assert place is not None
    with pytest.raises(KeyboardInterrupt):
        sharder.shard(place, objective, corpus, 0, beat=beat)
    assert not is_whole(place.train)
    sharder.shard(place, objective, corpus, 0)
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


def test_nothing_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="holds no document"):
        made(tmp_path, DataSpec(path=str(tmp_path / "empty.txt")))
