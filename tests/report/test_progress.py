"""The live bar: one per stage, whatever is measured meanwhile, and no word broken on a narrow terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from runner.report import terminal
from runner.report.progress import Progress

LINE = {"loss": 1.23456, "learning_rate": 1e-4, "tokens_per_second": 12345.6, "step_seconds": 2.0}
TITLE = "Answering 40 held-out prompts before training"


def screen(width: int) -> Console:
    """A terminal of so many columns; what it was sent is in its file."""
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, force_interactive=True)


def rendered(progress: Progress) -> list[str]:
    """The bars as they stand now, one line each."""
    assert progress._bars is not None
    paper = screen(progress.console.width)
    paper.print(*progress._bars.get_renderables())
    return [line.rstrip() for line in paper.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_a_stage_within_a_stage_leaves_the_outer_bar_as_it_is(width: int) -> None:
    progress = Progress(screen(width))
    with progress.stage("Training", "steps", 2000, 1):
        with progress.stage(TITLE, "prompts", 40):
            progress.advance(3, 40)
            outer, inner = rendered(progress)
            assert outer.startswith("Training ") and outer.endswith("1/2,000 steps")
            assert inner.startswith(f"{TITLE} ") and inner.endswith("3/40 prompts")
        for step in (2, 1234):
            progress.step(step, 2000, LINE)
        (bar,) = rendered(progress)
        assert bar.startswith("Training ") and "1,234/2,000 steps" in bar
        assert "loss 1.2346" in bar and "12,346 tokens/s" in bar
        assert ("lr 1.0e-04" in bar) == (width == 120)
        assert re.search(r"\d:\d\d:\d\d left$", bar) and len(bar) <= width
    assert progress._bars is None


def test_steps_of_a_minute_have_a_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(screen(80))
    with progress.stage("Training", "steps", 12):
        assert progress._bars is not None
        clock = [0.0]
        monkeypatch.setattr(progress._bars, "get_time", lambda: clock[0])
        for step in (1, 2):
            clock[0] = 60.0 * step
            progress.step(step, 12, LINE)
        assert rendered(progress)[0].endswith("0:10:00 left")


def test_a_note_is_broken_between_words_and_continued_below_its_words() -> None:
    console = screen(80)
    note = (
        "Data    120 examples, 9,323 tokens; packed into 120 sequences, 81% full; 40 held out (tokens from the cache)"
    )
    Progress(console).note(note)
    said = console.file.getvalue().splitlines()
    assert said == [
        "Data    120 examples, 9,323 tokens; packed into 120 sequences, 81% full; 40 held",
        "        out (tokens from the cache)",
    ]


def test_elsewhere_a_note_stays_one_line_and_stages_are_lines_of_their_own(tmp_path: Path) -> None:
    out, note = io.StringIO(), "word " * 40 + "[1,2]"
    progress = Progress(Console(file=out, width=80), terminal.appended(tmp_path / "run.log"))
    progress.note(note)
    with progress.stage("Training", "steps", 2), progress.stage(TITLE, "prompts", 40):
        progress.advance(40, 40)
    assert out.getvalue().splitlines() == [note, "Training …", f"{TITLE} …", "  40/40  "]
    assert (tmp_path / "run.log").read_text("utf-8") == out.getvalue()


def test_the_log_has_plain_lines_beside_a_live_bar(tmp_path: Path) -> None:
    progress = Progress(screen(80), terminal.appended(tmp_path / "run.log"))
    with progress.stage("Training", "steps", 2):
        progress.step(2, 2, LINE)
    assert (tmp_path / "run.log").read_text("utf-8").splitlines() == [
        "Training …", "  2/2  loss 1.2346  lr 1.0e-04  12,346 tokens/s"
    ]  # fmt: skip
