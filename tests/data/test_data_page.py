"""docs/data.md says what is so: its rows are of the formats it names, its names are all there are."""

from __future__ import annotations

import json
import re
import typing

from runner.data.chat_template import named_templates
from runner.data.row_formats import detect_format
from runner.data.row_parsers import FORMATS
from runner.paths import ASSETS
from runner.spec import DataSpec, Sft
from tests.support.rows import canonical_row

PAGE = (ASSETS / "docs" / "data.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", PAGE, re.MULTILINE)


def test_every_format_stands_there_with_a_row_that_is_one() -> None:
    assert {name for name, _ in ROWS} == set(FORMATS)
    for name, row in ROWS:
        kind = "unpaired" if name == "unpaired" else None
        spec = DataSpec(path="x")
        assert detect_format(json.loads(row), spec, kind) == name
        canonical_row(json.loads(row), "row 1", spec, kind)


def test_templates_and_choices_are_all_there() -> None:
    listed = PAGE.partition("one of these names: ")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", listed) == list(named_templates())
    choices = typing.get_args(Sft.model_fields["loss_on"].annotation)
    assert set(choices) <= {row.partition("`")[2].partition("`")[0] for row in PAGE.splitlines() if row[:3] == "| `"}
    for key in ("on_error", "on_long", "mix"):
        for choice in typing.get_args(DataSpec.model_fields[key].annotation):
            assert choice in PAGE
