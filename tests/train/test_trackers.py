"""A tracker gets what a run measures, read back by its own reader; one that cannot be reached or used stops no run."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from runner.cloud import transfer
from runner.config import tracker_packages
from runner.config.pod_packages import extra_requirements
from runner.errors import CannotRunError
from runner.launcher import local
from runner.report.progress import Progress
from runner.train.trackers import Tracker, tracker_of, without_password
from tests.conftest import ROOT, spec_of, train_here
from tests.support import tiny_llama

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow keeps its address and its open run for the whole process."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
    yield
    mlflow.end_run()
    mlflow.set_tracking_uri(None)


def trained(folder: Path, *words: str) -> Any:
    """Three steps of a tiny model."""
    base = [*tiny_llama.words(folder), f"run.output_dir={folder / 'runs'}", "train.max_steps=3", "eval.num_prompts=0"]
    return train_here(spec_of(*base, *words))[1]


def read_back(run: Any) -> Any:
    """The one run of a store, as MLflow's client reads it."""
    client = mlflow.MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'mine'")
    (found,) = client.search_runs([experiment.experiment_id])
    return client, found


def test_mlflow_has_every_step_and_the_summary(tmp_path: Path) -> None:
    run = trained(tmp_path, "track=mlflow", "track.project=mine")
    client, found = read_back(run)
    assert found.info.run_name == run.id and found.info.status == "FINISHED"
    history = {point.step: point.value for point in client.get_metric_history(found.info.run_id, "loss")}
    assert history == pytest.approx({line["step"]: line["loss"] for line in run.metrics()}, abs=1e-4)
    assert found.data.metrics["summary.eval.after.loss"] == run.summary["eval"]["after"]["loss"]
    assert found.data.params["max_steps"] == str(len(history))


def test_a_server_that_cannot_be_reached_stops_no_run_and_no_password_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: notes.append(text))
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@127.0.0.1:{taken.getsockname()[1]}")
        run = trained(tmp_path, "track=mlflow", "track.project=mine")
    (note,) = [note for note in notes if note.startswith("MLflow")]
    assert "127.0.0.1 cannot be reached" in note and "s3cret" not in note
    assert run.state() == "done" and read_back(run)[1].info.status == "FINISHED"
    assert not [file for file in run.path.rglob("*.json*") if b"s3cret" in file.read_bytes()]


def test_other_processes_of_a_run_track_nothing(tmp_path: Path) -> None:
    spec = spec_of("track=mlflow")
    assert type(tracker_of(spec, Any, print, main=False)) is Tracker  # type: ignore[arg-type]


def test_a_tracker_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = util.find_spec
    monkeypatch.setattr(tracker_packages.util, "find_spec", lambda name: None if name == "mlflow" else found(name))
    with pytest.raises(CannotRunError) as refused:
        local.check_here(spec_of("track=mlflow", "hw=cpu"))
    (problem,) = refused.value.problems
    assert problem.what == "track=mlflow needs MLflow, which is not installed"
    assert "[mlflow]" in str(problem.remedy) and "pip install" in str(problem.remedy)


def test_a_pod_gets_the_package_and_the_secrets_of_its_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(transfer, "place_secret", lambda connection, file, content: sent.append(content))
    for name, value in (("HF_TOKEN", "hf"), ("MLFLOW_TRACKING_TOKEN", "t"), ("WANDB_API_KEY", "w")):
        monkeypatch.setenv(name, value)

    class At:
        run_id, connection = "run", None

    assert transfer.send_secrets(At(), spec_of("track=mlflow")) == ["HF_TOKEN", "MLFLOW_TRACKING_TOKEN"]  # type: ignore[arg-type]
    assert "WANDB" not in sent[0]
    for address, names in (("sqlite:////home/me/m.db", []), ("https://me:pw@host", ["MLFLOW_TRACKING_URI"])):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        told = transfer.send_secrets(At(), spec_of("track=mlflow"))  # type: ignore[arg-type]
        assert told == ["HF_TOKEN", *names, "MLFLOW_TRACKING_TOKEN"]
    assert {"mlflow-skinny>=3.17", "sqlalchemy>=2.1", "alembic>=1.20"} <= set(
        extra_requirements(spec_of("track=mlflow"))
    )
    assert "mlflow-skinny>=3.17" not in extra_requirements(spec_of())


def test_what_a_pod_installs_is_what_the_extra_lists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    package = tracker_packages.TRACKER_PACKAGES["mlflow"]
    assert sorted(package.requirements) == sorted(extras["mlflow"])


def test_passwords_in_addresses_are_not_shown() -> None:
    assert without_password("https://me:pw@mlflow.example.com/x") == "https://…@mlflow.example.com/x"
    assert without_password("https://mlflow.example.com/@x") == "https://mlflow.example.com/@x"
