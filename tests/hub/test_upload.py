"""A model leaves for S3 (a real S3 server of moto's) with its card, and checkpoints of which the last ones stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from runner.errors import RequestError, RunFailedError
from runner.hub.upload import push_checkpoint, push_run, target_of
from runner.rundir.directory import RunDir
from tests.conftest import spec_of
from tests.hub.test_push import SUMMARY


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(spec_of(f"run.output_dir={tmp_path}"))
    (run.path / "model").mkdir(parents=True)
    (run.path / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    run.write("summary.json", SUMMARY)
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


def keys(bucket: str, prefix: str) -> set[str]:
    return {entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]}


def test_a_model_with_its_card(run: RunDir, s3: str) -> None:
    boto3.client("s3").create_bucket(Bucket=s3)
    assert push_run(run.path, f"s3://{s3}/models/mine")["url"] == f"s3://{s3}/models/mine"
    names = ("adapter_model.safetensors", "summary.json", "spec.json", "README.md")
    assert keys(s3, "models") == {f"models/mine/{name}" for name in names}
    assert run.read("pushed.json") == {"url": f"s3://{s3}/models/mine", "folder": "model"}


def test_the_last_checkpoints_stay(run: RunDir, s3: str, tmp_path: Path) -> None:
    boto3.client("s3").create_bucket(Bucket=s3)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    (folder / "COMPLETE").write_bytes(b"{}")
    for step in (2, 4, 10):
        push_checkpoint(run, folder, step, 2, target_of(f"s3://{s3}/mine"))
    names = ("weights", "COMPLETE")
    assert keys(s3, "mine") == {f"mine/checkpoints/checkpoint-{step}/{name}" for step in (4, 10) for name in names}
    assert run.read("pushed.json")["checkpoint"] == 10


def test_a_bucket_that_is_not_there(run: RunDir, s3: str) -> None:
    with pytest.raises(RunFailedError, match="s3://nowhere/x failed"):
        push_run(run.path, "s3://nowhere/x")


def test_without_a_model_there_is_nothing_to_upload(run: RunDir) -> None:
    (run.path / "summary.json").unlink()
    with pytest.raises(RequestError, match="has no model"):
        push_run(run.path, "org/name")
