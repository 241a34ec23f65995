"""Every kept figure and price says from when it is; old ones are named here, and refuse a release."""

from __future__ import annotations

import json
import warnings
from datetime import date, timedelta
from pathlib import Path

import pytest

from benchmarks import age
from benchmarks.__main__ import BENCHMARKS, changes, main
from benchmarks.bench import ROOT, Benchmark

TODAY = date.today()


def test_old_figures_and_prices_are_named() -> None:
    """A warning here: time alone breaks no test. .github/workflows/release.yml runs `python -m benchmarks --age`."""
    for one in [*age.ages(BENCHMARKS.values()), *age.prices()]:
        assert one.days >= 0, one
        if one.old:
            warnings.warn(str(one), stacklevel=1)
    assert "python -m benchmarks --age" in (ROOT / ".github/workflows/release.yml").read_text("utf-8")


def test_what_a_benchmark_measures_is_there() -> None:
    for benchmark in BENCHMARKS.values():
        assert all((ROOT / path).exists() for path in benchmark.measures), benchmark.name


@pytest.mark.parametrize(("days", "commits", "old"), [(60, 100, False), (61, 0, True), (0, 101, True)])
def test_a_figure_is_old_by_days_or_by_commits(days: int, commits: int | None, old: bool) -> None:
    one = age.Age("data", TODAY, days, commits)
    assert one.old == old and ("python -m benchmarks data" in str(one)) == old


def test_commits_since_count_only_where_they_touch_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def git(*words: str) -> str:
        asked.append(words)
        return {"rev-parse": "false", "rev-list": "7"}[words[0]]

    file = tmp_path / "results" / "x.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"date": (TODAY - timedelta(days=3)).isoformat(), "commit": "abc"}))
    monkeypatch.setattr(age, "git", git)
    monkeypatch.setattr(age, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.bench.RESULTS", file.parent)
    bench = Benchmark("x", lambda _: None, lambda _: {}, lambda _: "", measures=("runner/data", "conf"))
    (one,) = age.ages([bench])
    assert (one.days, one.commits) == (3, 7)
    assert asked[-1] == ("rev-list", "--count", "abc..HEAD", "--", "runner/data", "conf")


def test_a_release_is_refused_for_an_old_price(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(age, "ages", lambda _: [])
    monkeypatch.setattr(age, "MOST_PRICE_DAYS", -1)
    assert main(["--age"]) == 1
    assert "look it up again in conf/hw/h100.yaml" in capsys.readouterr().out


def test_a_price_needs_a_day_and_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(age, "load_choice", lambda *_: {"usd_per_hour": 1.0, "price_date": "2026-11-09"})
    with pytest.raises(ValueError, match="needs a day and a source"):
        list(age.prices())


def test_measuring_says_which_statements_changed() -> None:
    before = "# Plan\n\nA plan takes 362 ms.\n\nMeasured on 2026-11-01 with x\n"
    after = "# Plan\n\nA plan takes 340 ms.\n\nMeasured on 2026-11-30 with x\n"
    assert changes(before, after) == ["  -A plan takes 362 ms.", "  +A plan takes 340 ms."]
