"""The cache of tokens, whoever writes it and however they end: an entry is there whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.rundir import atomic_folder
from tests.conftest import ROOT, spec_of
from tests.data.test_loss_mask import SPECIAL, body

__all__ = ["body"]  # a fixture

# A process that makes the entry: in the middle it says so, and goes on when it is told to.
WRITER = """
import json, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from runner.data.examples import Example
from runner.spec import RunSpec
from runner.train.tokens import token_dataset
from runner.train.tokens import text_dataset

class Rows(list):
    passes = 0  # the first is for the fingerprint
    def __iter__(self):
        self.passes += 1
        for number, row in enumerate(super().__iter__()):
            if self.passes == 2 and number == 2500:
                print("writing", flush=True)
                sys.stdin.readline()
            yield row

kind, folder = sys.argv[1], Path(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
spec = RunSpec.model_validate_json((folder / "spec.json").read_text("utf-8"))
rows = Rows(Example(text=f"{n}? " * (n % 5 + 1)) for n in range(2600))
found = {"dataset": token_dataset, "text": text_dataset}[kind].tokenise(rows, tokenizer, spec)
print(json.dumps({"from_cache": found.from_cache, "tokens": found.num_tokens, "rows": found.rows["input_ids"][:]}))
"""


@pytest.fixture(scope="module")
def given(body: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a spec."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("given")
    (folder / "tokenizer.json").write_text(body, "utf-8")
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL).save_pretrained(
        folder / "tokenizer"
    )
    spec = spec_of("train.max_length=64", "train.packing=false", "data.num_proc=1")
    (folder / "spec.json").write_text(spec.model_dump_json(), "utf-8")
    return folder


def writer(kind: str, given: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, kind, str(given)], cwd=ROOT,
        env={**os.environ, "RUNNER_CACHE": str(cache), "WANDB_MODE": ""},  # offline, transformers prints a line
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def writing(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """Waits until it is in the middle of an entry."""
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "tokenised").iterdir())


@pytest.mark.parametrize("kind", ["dataset", pytest.param("text", marks=pytest.mark.slow)])
def test_after_a_killed_process_two_at_once_end_with_one_whole_entry(kind: str, given: Path, tmp_path: Path) -> None:
    with writing(writer(kind, given, tmp_path)) as killed:
        killed.kill()
    (left,) = entries(tmp_path)
    assert left.suffix == ".tmp"
    with writer(kind, given, tmp_path) as one, writer(kind, given, tmp_path) as two:
        for process in (one, two):
            writing(process)  # which it would not be with what it found
        assert [path.suffix for path in entries(tmp_path)] == [".tmp"] * 3  # nor is another's taken away
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        first, second = (json.loads(process.communicate()[0]) for process in (one, two))
    assert first == second and not first["from_cache"]
    assert len(first["rows"]) == 2600 and sum(map(len, first["rows"])) == first["tokens"]
    for path in (left, *left.iterdir()):
        os.utime(path, (time.time() - atomic_folder.LEFT_BEHIND - 60,) * 2)
    with atomic_folder.cached(left.parent / "another", lambda: False):
        assert not left.exists()
    (_, entry) = sorted(entries(tmp_path), key=lambda path: path.name != "another")
    assert sorted(file.name for file in entry.iterdir()) == ["facts.json", "rows.arrow"]
    assert json.loads((entry / "facts.json").read_text("utf-8"))["num_tokens"] == first["tokens"]


def test_the_first_one_stays_and_one_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    good = (target / "whole").is_file
    for name, stays in (("first", "first"), ("second", "first")):
        with atomic_folder.cached(target, good) as folder:
            (folder / "whole").write_text(name)
        assert (target / "whole").read_text() == stays
    (target / "whole").rename(target / "torn")
    with atomic_folder.cached(target, good) as folder:
        (folder / "whole").write_text("third")
    assert (target / "whole").read_text() == "third" and [path.name for path in tmp_path.iterdir()] == ["entry"]
