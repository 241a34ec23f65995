"""A run costs what its hours, its GPUs and its disk cost; what has no price costs "unknown"."""

from __future__ import annotations

import pytest

from runner.plan import cost


def test_an_hour_of_training_on_a_rented_machine_is_held_longer() -> None:
    run = cost.hours(training_s=3600, evaluation_s=360, download_gb=15, load_gb=15, save_gb=15, rented=True)
    assert run.setup == pytest.approx(14 / 60)  # 11 minutes for the image, 3 to start
    assert run.download * 3600 == pytest.approx(60)  # 15 GB at 0.25 GB/s
    assert [run.load * 3600, run.save * 3600] == pytest.approx([15, 30])
    assert run.total == pytest.approx(1 + 0.1 + (14 * 60 + 60 + 15 + 30) / 3600)


def test_loading_takes_longer_the_slower_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LOAD_GB_S", 2.0)
    assert cost.hours(training_s=0, load_gb=30).load * 3600 == pytest.approx(15)


def test_a_machine_of_ones_own_pulls_no_image() -> None:
    assert cost.hours(training_s=60).total * 3600 == pytest.approx(80)  # and 20 s to import, load and tokenise


def test_money_is_hours_times_gpus_and_the_disk_meanwhile() -> None:
    """Of all the hours, not those of training alone: the machine and its disk are paid for from start to end."""
    run = cost.Hours(setup=10, download=1, load=2, training=40, evaluation=15, save=5)
    found = cost.usd(run, 2.0, num_gpus=3, disk_gb=200)
    assert found is not None
    assert (found.compute_usd, found.usd_per_hour) == (438, 6)
    assert found.storage_usd == pytest.approx(200 * 0.10 / 10)  # 73 hours are a tenth of a month
    assert found.total_usd == pytest.approx(440)


def test_without_a_price_the_cost_is_unknown_and_not_nothing() -> None:
    run = cost.hours(training_s=3600)
    assert cost.usd(run, None, num_gpus=1, disk_gb=100) is None
    free = cost.usd(run, 0.0, num_gpus=1)
    assert free is not None and free.total_usd == 0
