"""A finished model leaves for S3 (a real S3 server of moto's) or the Hub, with what tells where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from runner.errors import RequestError, RunFailedError
from runner.execute.upload import main, upload
from runner.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run-1")
    (run.path / "model").mkdir(parents=True)
    (run.path / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    run.write("summary.json", {"state": "done"})
    run.write("spec.json", {"name": "x"})
    return run


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    values = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s"}
    for name, value in {**values, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    yield "bucket"
    server.stop()


def test_to_s3(run: RunDir, s3: str) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket=s3)
    assert upload(run, f"s3://{s3}/models/mine") == f"s3://{s3}/models/mine"
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket=s3)["Contents"]}
    assert keys == {
        "models/mine/adapter_model.safetensors", "models/mine/run/summary.json", "models/mine/run/spec.json",
    }  # fmt: skip


def test_a_bucket_that_is_not_there(run: RunDir, s3: str) -> None:
    with pytest.raises(RunFailedError, match="s3://nowhere/x failed"):
        upload(run, "s3://nowhere/x")


def test_the_hub_out_of_reach_is_said(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert main([str(run.path), "org/name"]) == 1


def test_without_a_model_there_is_nothing_to_upload(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(RequestError, match="has no model"):
        upload(run, "org/name")
