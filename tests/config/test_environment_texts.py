"""Environment variables of `hw.env` are texts, as written, wherever they are written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.support.front import here, laptop, problems_of, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

WRITTEN = {
    "A": "yes", "B": "010", "C": "1.10", "D": "12:30", "E": "1_000", "F": "0x1F", "G": "no", "H": "True", "I": "1e3",
    "J": "0o17", "K": "2026-11-30", "L": ".5", "M": "+1", "N": "on", "O": "0,1", "P": "-0", "Q": "NaN", "R": ".inf",
}  # fmt: skip


def test_in_a_recipe_and_in_hardware_of_ones_own(here: Path) -> None:
    lines = "".join(f"    {key}: {value}\n" for key, value in WRITTEN.items())
    write(here / "mine.yaml", f"defaults: [config, _self_]\nhw:\n  env:\n{lines}")
    assert spec_of("mine.yaml").hw.env == WRITTEN
    profile = f"name: mine\naccelerator: cpu\nenv:\n{lines}".replace("\n    ", "\n  ")
    write(here / "own/hw/mine.yaml", profile)
    assert spec_of("hw=mine", config_dirs=(here / "own",)).hw.env == WRITTEN
    write(here / "own/try.yaml", "defaults: [config, override /hw: mine, _self_]\nhw: {env: {A: 007, Z: null}}\n")
    assert spec_of("own/try.yaml").hw.env == {**WRITTEN, "A": "007"}


def test_on_the_command_line(here: Path) -> None:
    env = spec_of(*(f"hw.env.{key}={value}" for key, value in WRITTEN.items())).hw.env
    assert env == WRITTEN
    odd = {"A": "a b", "B": "it's", "C": '"', "D": "a\\", "E": "[x]", "F": "{a: 1}", "G": "$HOME", "H": "é", "I": "a=b"}
    assert spec_of(*(f"hw.env.{key}={value}" for key, value in odd.items() if value[0] not in "'\"")).hw.env == {
        key: value for key, value in odd.items() if value[0] not in "'\""
    }
    assert spec_of("hw.env.A='0,1'", 'hw.env.B="x"', "hw.env.C=").hw.env == {"A": "0,1", "B": "x", "C": ""}
    assert spec_of("hw.env={A: 010, B: yes, C: 1.10}").hw.env == {"A": "010", "B": "yes", "C": "1.10"}
    write(here / "spec.json", runner("show", "--json", "hw.env.A=010").stdout)
    assert spec_of("spec.json", "hw.env.B=1.10").hw.env == {"A": "010", "B": "1.10"}


def test_they_reach_show_as_texts(here: Path) -> None:
    shown = runner("show", "--json", *shlex.split("hw.env.CUDA_VISIBLE_DEVICES=0,1 hw.env.X=1.10"))
    assert json.loads(shown.stdout)["hw"]["env"] == {"CUDA_VISIBLE_DEVICES": "0,1", "X": "1.10"}


def test_what_is_no_text_is_refused(here: Path) -> None:
    write(here / "mine.yaml", "defaults: [config, _self_]\nhw:\n  env:\n    A: [0, 1]\n    B: {c: 1}\n")
    assert {p.source for p in problems_of("mine.yaml").values()} == {"mine.yaml:4", "mine.yaml:5"}
