"""Money while a pod runs: warnings at shares of the cap, earlier pods of the run, and what a stopped pod costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from runner.cloud import clock, executor, remote_run
from runner.cloud.budget import Meter
from runner.cloud.follow import Display, News
from runner.cloud.ledger import Ledger
from runner.cloud.rent_pod import acquire
from tests.support.emulated import Emulator
from tests.support.front import runner
from tests.support.rented import KEY, PLAN, rented_spec, run_of

HOUR = 3600.0


def told(meter: Meter, monkeypatch: pytest.MonkeyPatch, capsys: Any, minutes: list[float]) -> list[str]:
    """Lines that a launcher says of money while it follows a run, with a look at each of these minutes."""

    def follow(tell: Callable[[News], None], leave: bool) -> dict[str, Any]:
        for minute in minutes:
            monkeypatch.setattr(clock, "now", lambda at=minute: 60 * at)
            tell(News("tick"))
        return {}

    session: Any = SimpleNamespace(rented=SimpleNamespace(meter=meter), follow=follow)
    executor.follow(session, Display(Console(width=200)))
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_launcher_warns_at_50_80_and_100_percent_of_the_cap_once_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [minute / 2 for minute in range(260)]
    assert told(Meter(1.0, 0.0, cap_usd=2.0), monkeypatch, capsys, every) == [
        "Warning: $1.00 of $2.00 (where.max_usd) are used, 50%; the rest lasts 1 h 0 min",
        "Warning: $1.60 of $2.00 (where.max_usd) are used, 80%; the rest lasts 24 min 0 s",
        "Warning: $2.00 of $2.00 (where.max_usd) are used: the pod is ended",
    ]


@pytest.mark.parametrize(
    ("meter", "minutes", "said"),
    [
        (Meter(1.0, 0.0, cap_usd=2.0, before_usd=1.5), [0, 0.1], ["$1.50 of $2.00 …, 75%; the rest lasts 30 min 0 s"]),
        (Meter(1.0, 0.0, cap_usd=2.0), [10, 108, 30, 109], ["$1.80 of $2.00 …, 90%; the rest lasts 12 min 0 s"]),
        (Meter(1.0, 0.0, cap_usd=2.0), [10, 600], ["$10.00 of $2.00 …: the pod is ended"]),
        (Meter(60.0, 0.0, cap_usd=1.0), [0.9], ["$0.90 of $1.00 …, 90%; the rest lasts 6 s"]),
        (Meter(1.0, 0.0), [10, 6000], []),
        (Meter(0.0, 0.0, cap_usd=2.0), [10, 6000], []),
    ],
    ids=["a resumed run", "a laptop that slept, and a clock set back", "past it", "seconds", "no cap", "no price"],
)  # fmt: skip
def test_a_warning_names_the_real_share_and_is_not_said_twice(
    meter: Meter, minutes: list[float], said: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert told(replace(meter, _told=set()), monkeypatch, capsys, minutes) == [  # a meter remembers what it has told
        f"Warning: {line.replace('…', '(where.max_usd) are used')}" for line in said
    ]


def test_a_run_that_is_attached_to_counts_its_earlier_pods(
    emulator: Emulator, tmp_path: Path, state: Path, here: Path, hello: None
) -> None:
    spec, ledger = rented_spec("where.setup_minutes=0.2"), Ledger()
    run = run_of(spec, tmp_path / "runs")
    ledger.plan(
        "runner-before-0001", run_id=run.id, run_dir=str(run.path), gpu=None, cloud="secure", usd_per_hour=2.0,
        disk_gb=0.0, keep=False, volume=None, base=emulator.url, account="x", heartbeat_s=None,
    )  # fmt: skip
    now = clock.now()
    ledger.move("runner-before-0001", "RUNNING", "", pod_id="before", created=now - 3 * HOUR)
    ledger.move("runner-before-0001", "GONE", "", ended=now - HOUR)
    rented = acquire(run, spec, PLAN, KEY, print)
    rented.detach()
    again = remote_run._adopt(run.id, run.path)
    assert again.meter.before_usd == pytest.approx(4.0) and again.usd() == pytest.approx(4.0, abs=0.05)
    again.release()


def test_a_stopped_pod_costs_its_disk_alone_in_the_list(
    emulator: Emulator, state: Path, here: Path, hello: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pods", "up", "hw=rtx4090", "where.max_usd=5", "where.volume_gb=20", "--hours", "3", "--yes", "--json")
    made = json.loads(runner(*words).stdout)
    assert runner("pods", "stop", made["pod_id"]).exit_code == 0
    (row,) = json.loads(runner("pods", "--json").stdout)
    later = clock.now() + 10 * HOUR
    monkeypatch.setattr(clock, "now", lambda: later)
    (after,) = json.loads(runner("pods", "--json").stdout)
    assert after["state"] == "STOPPED" and after["usd"] == row["usd"] < 0.1
    assert after["usd_per_day_stopped"] > 0
