"""docs/deepspeed.md explains the keys of the five JSONs, all of them and no others, and says what is so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from runner.paths import DEEPSPEED_CONFIGS
from runner.plan.zero_config import resolved_config
from runner.report.failure_causes import CAUSES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "deepspeed.md").read_text("utf-8")
SHORT = {"zero1": "1", "zero2": "2", "zero2_offload": "2o", "zero3": "3", "zero3_offload": "3o"}


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEEPSPEED_CONFIGS / f"{name}.json").read_text("utf-8"))
    return loaded


def flat(part: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf."""
    for key, value in part.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def rows(heading: str) -> dict[str, list[str]]:
    """First cell → the other cells of the table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    found = {row[0].strip("`"): row[1:] for row in cells[2:]}
    assert len(found) == len(cells) - 2, "a row is listed twice"
    return found


def test_every_key_is_explained_with_the_files_that_have_it() -> None:
    occurs: dict[str, list[str]] = {}
    for name, short in SHORT.items():
        for key, _ in flat(config(name)):
            occurs.setdefault(key, []).append(short)
    explained = rows("The keys")
    assert {key: row[0].split() for key, row in explained.items()} == occurs
    assert all(len(row) == 3 and len(row[1]) > 20 and row[2] for row in explained.values())


def test_auto_becomes_what_the_page_says() -> None:
    told = {key: row[-1] for key, row in rows('What "auto" becomes').items()}
    became: dict[str, str] = {}
    for name in SHORT:
        resolved = resolved_config(
            config(name), micro_batch=2, accumulation=4, world=8, hidden_size=4096, precision="bf16", max_grad_norm=1.0
        )
        became |= {key: json.dumps(dict(flat(resolved))[key]) for key, value in flat(config(name)) if value == "auto"}
    assert told == became


def test_every_choice_has_a_row() -> None:
    assert set(rows("Which one")) == {"none", *SHORT}


def test_failures_and_remedies_are_those_that_are_told() -> None:
    told = {what: row[0] for what, row in rows("When it fails").items()}
    known = {cause.what: cause.remedy for cause in CAUSES}
    assert told and told.items() <= known.items()
    assert {what for what in known if re.search("DeepSpeed|NCCL|nodes|rendezvous", what)} <= set(told)
