"""The reference page is what the schema says, for every key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import pages
from docs.generate import choices, reference


def test_every_key_has_a_sentence() -> None:
    assert reference.undocumented() == [], "write a sentence under these fields in runner/spec/"


@pytest.mark.parametrize("name", ["docs/reference.md", "docs/choices.md", "README.md"])
def test_page_is_up_to_date(name: str) -> None:
    written, generated = {**reference.pages(), **choices.pages()}[name]
    assert written == generated, f"{name} differs from what it is generated from: run `make docs`"


def test_pages_of_benchmarks_show_the_results_that_are_kept() -> None:
    drifted = [file.name for file, text in pages() if file.read_text("utf-8") != text]
    assert drifted == [], "run `python -m benchmarks --docs`"


@pytest.mark.parametrize(
    "row",
    [
        "| `train.learning_rate` | number > 0 and < 1 | `0.0002` | Peak learning rate. |",
        "| `train.micro_batch_size` | whole number or `auto` | `auto` | ",
        "| `train.packing` | true or false | `true` | ",
        "| `run.metric_mode` | one of `auto`, `min`, `max` | `auto` | ",
        "| `model.revision` | text or null | `null` | ",
        "| `hw.env` | mapping of names to texts | `{}` | ",
    ],
)
def test_types_and_defaults_are_in_plain_words(row: str) -> None:
    assert row in reference.page()


def test_a_key_that_variants_share_stands_there_once() -> None:
    (row,) = [line for line in reference.page().splitlines() if line.startswith("| `method.rank` ")]
    assert row.endswith("| `lora`, `qlora4`, `qlora8` |")


def test_a_variant_without_a_name_of_its_own_has_those_of_its_files() -> None:
    lines = reference.page().splitlines()
    assert any(line.startswith("- `method=") and "`method=ia3`" in line and "`method=loha`" in line for line in lines)
    (row,) = [line for line in lines if line.startswith("| `method.peft_type` ")]
    assert row.endswith("`ia3`, `loha`, `lokr`, `oft`, `vera` |")  # behind those of somebody who adds one
    assert not any(line.startswith("- :") or "valuess" in line for line in lines)


def test_what_is_written_about_run_files_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run_files.md").write_text("`spec.json`: the run.\n", "utf-8")
    monkeypatch.setattr(reference, "RUN_FILES", tmp_path / "run_files.md")
    assert reference.page().endswith("\n\n## Files of a run\n\n`spec.json`: the run.\n")


def test_it_needs_no_torch() -> None:
    code = "import sys, docs.generate.reference as r; r.page(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
