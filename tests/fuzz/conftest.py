"""The fuzz tests' profile: seconds per target, and what was run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz import fuzzing


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or written to, the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many inputs each target had."""
    if fuzzing.COUNTS:
        terminalreporter.section("fuzz: inputs")
        for name, (inputs, refused, seconds) in sorted(fuzzing.COUNTS.items()):
            terminalreporter.line(f"{inputs:>10,}  {name}: {refused:,} refused in words, {seconds:.0f} s")
        terminalreporter.line(f"{sum(one[0] for one in fuzzing.COUNTS.values()):>10,}  in all")
