"""Network volumes: made once, even if the answer is lost; found by id or name; their files by S3, without a pod.

S3 is at `https://s3api-<data centre>.runpod.io`; a bucket is named by the id of its volume.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.cloud.clock import pace
from runner.cloud.provider_errors import CloudError, UnclearError
from runner.cloud.runpod.account_key import KEYS_PAGE
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.json_types import Volume
from runner.config.did_you_mean import nearest
from runner.errors import CannotRunError, Problem, RequestError
from runner.report.invocation import install

# $/GB-month, standard kind: 0.07 for the first terabyte, 0.05 beyond (docs.runpod.io/pods/pricing, as of 2026-11-20).
USD_PER_GB, USD_PER_GB_BEYOND, FIRST_GB = 0.07, 0.05, 1000
LOOKS = 5


def usd_per_month(size_gb: int) -> float:
    """Return the monthly price of a volume."""
    return round(min(size_gb, FIRST_GB) * USD_PER_GB + max(0, size_gb - FIRST_GB) * USD_PER_GB_BEYOND, 2)


def create(api: Api, name: str, size_gb: int, data_center: str) -> Volume:
    """A new one. RequestError where the name is taken or the data centre has none."""
    if any(volume.name == name for volume in api.volumes()):
        raise RequestError(Problem(f"there is a network volume {name} already", "command line", "take another name"))
    centers = {center.id: center for center in api.data_centers()}
    if data_center not in centers or not centers[data_center].volume_types:
        able = sorted(i for i, center in centers.items() if center.volume_types)
        near = nearest(data_center, able)
        what = f"RunPod has no network volumes in {data_center}"
        remedy = f"did you mean {near}?" if near and near != data_center else f"one of {', '.join(able)}"
        raise RequestError(Problem(what, "--data-center", remedy))
    try:
        return api.create_volume(name, size_gb, data_center)
    except UnclearError as error:  # not sent again: a second volume would be paid for as well
        for look in range(LOOKS):
            time.sleep(2.0 * pace(api.base) * look)
            found = [volume for volume in api.volumes() if volume.name == name]
            if found:
                return found[0]
        remedy = "look again: python -m runner volumes"
        raise UnclearError(Problem(f"{error}; no volume {name} has appeared", None, remedy)) from None


def find_volume(api: Api, word: str) -> Volume:
    """Find a volume by id or name; RequestError if there is none, or more than one."""
    volumes = api.volumes()
    found = [v for v in volumes if v.id == word] or [v for v in volumes if v.name == word]
    if len(found) == 1:
        return found[0]
    if found:
        ids = " or ".join(f"{v.id} ({v.data_center})" for v in found)
        raise RequestError(Problem(f"{len(found)} network volumes are called {word}", "command line", f"by id: {ids}"))
    near = nearest(word, {v.name: v.name for v in volumes} | {v.id: v.id for v in volumes})
    remedy = f"did you mean {near}?" if near else "python -m runner volumes lists them"
    raise RequestError(Problem(f"there is no network volume {word}", "command line", remedy))


def delete(api: Api, volume: Volume) -> None:
    """Confirmed: CloudError where it is still there."""
    for look in range(LOOKS):
        time.sleep(2.0 * pace(api.base) * look)
        api.delete_volume(volume.id)
        if all(other.id != volume.id for other in api.volumes()):
            return
    remedy = "it is paid for: try again, or delete it at https://console.runpod.io/user/storage"
    raise CloudError(Problem(f"volume {volume.id} is still there", None, remedy))


Say = Callable[[str], None]


def put_files(api: Api, volume: str, source: Path, target: str, say: Say) -> list[str]:
    """Send a file or a folder; paths in the volume. A target with / at its end, or none, is a folder."""
    found = find_volume(api, volume)
    client = _client(found.data_center)
    if source.is_dir():
        inside = sorted(file for file in source.rglob("*") if file.is_file())
        files = {file: f"{target.strip('/')}/{file.relative_to(source)}" for file in inside}
    else:
        files = {source: f"{target}{source.name}" if target.endswith("/") or not target else target}
    sent = []
    with _spoken():
        for file, path in files.items():
            path = path.lstrip("/")
            client.upload_file(str(file), found.id, path)
            sent.append(path)
            say(f"{file} → {found.name}:{path} ({file.stat().st_size:,} bytes)")
    return sent


def get_files(api: Api, volume: str, source: str, target: Path, say: Say) -> list[Path]:
    """Bring a file, or all below a folder; RequestError where there is nothing of that name."""
    found = find_volume(api, volume)
    client = _client(found.data_center)
    source = source.strip("/")
    brought = []
    with _spoken():
        for row in _listed(client, found.id, source):
            path = row["path"]
            if path != source and source and not path.startswith(f"{source}/"):
                continue
            inside = path.removeprefix(source).lstrip("/")
            if ".." in Path(inside).parts:
                raise RequestError(Problem(f"{path} would be written outside of {target}"))
            name = inside or (Path(path).name if target.is_dir() else "")
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(found.id, path, str(file))
            brought.append(file)
            say(f"{found.name}:{path} → {file}")
    if not brought:
        remedy = f"python -m runner volumes ls {volume}"
        raise RequestError(Problem(f"volume {found.name} has no {source}", "command line", remedy))
    return brought


def list_files(api: Api, volume: str, prefix: str) -> list[dict[str, object]]:
    """Files whose path begins with `prefix`: path and size."""
    found = find_volume(api, volume)
    client = _client(found.data_center)
    with _spoken():
        return list(_listed(client, found.id, prefix.lstrip("/")))


def s3_endpoint(data_center: str) -> str:
    """Return the S3 endpoint of a data centre; `AWS_ENDPOINT_URL_S3` takes precedence."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or f"https://s3api-{data_center.lower()}.runpod.io"


def _client(data_center: str) -> Any:
    """A client of that data centre. CannotRunError without the package, RequestError without keys."""
    try:
        from boto3 import Session  # 0.3 s
        from botocore.config import Config
    except ImportError:
        what = "S3 needs boto3, which is not installed"
        raise CannotRunError(Problem(what, None, install("cloud"))) from None
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if missing := [name for name in names if not os.environ.get(name)]:
        remedy = f"make S3 keys at {KEYS_PAGE} and export them; they are not the API key"
        raise RequestError(Problem(f"{' and '.join(missing)} not set: volumes have keys of their own", None, remedy))
    config = Config(retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=10, read_timeout=60)
    session = Session()  # not the default one, which keeps the keys that it met first
    return session.client("s3", endpoint_url=s3_endpoint(data_center), region_name=data_center.lower(), config=config)


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield {"path": item["Key"], "size": item["Size"]}


@contextmanager
def _spoken() -> Iterator[None]:
    """Errors of the S3 client in words."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("botocore", "boto3")):
            raise
        raise CloudError(Problem(f"S3: {error}", None, "check the keys, and that the volume is there")) from None
