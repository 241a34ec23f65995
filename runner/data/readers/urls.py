"""Files behind URLs: `s3://` and `gs://` by Arrow's own clients, any other by fsspec.

Arrow comes with `datasets`, while s3fs would want a botocore of its own, other than boto3's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import IO, Any, TypeVar

from runner.errors import Problem, RequestError

T = TypeVar("T")
GCS_PATIENCE = timedelta(minutes=1)
"""Without keys or network Arrow would try again for a quarter of an hour."""


class UnreachableError(RequestError):
    """The place did not answer, or not to this machine: another one may reach it."""


def ask_file_system(url: str, question: Callable[[Any, str], T]) -> T:
    """`question(file system, path in it)`; RequestError where the place cannot be reached, in one line."""
    try:
        return question(*_system(url))
    except ImportError as error:
        raise UnreachableError(Problem(f"{url}: {error}", None, "install what it names")) from None
    except Exception as error:  # whatever a file system raises for a place that cannot be reached
        kind = RequestError if _is_missing(error) else UnreachableError
        error = error.__cause__ if kind is UnreachableError and isinstance(error.__cause__, Exception) else error
        reason = str(error).split("\n")[0] or type(error).__name__
        raise kind(Problem(f"{url} cannot be read: {reason}", None, "check the address and the keys")) from None


def _is_missing(error: BaseException) -> bool:
    """The place answers, and has no such file. fsspec says so of a web server that does not answer, too."""
    cause = error.__cause__
    told = getattr(cause, "status", None) in (404, 410)
    return isinstance(error, FileNotFoundError) and (cause is None or told or _is_missing(cause))


def fetch_url(url: str) -> bytes:
    """The content of one file."""

    def read(system: Any, path: str) -> bytes:
        with system.open(path, "rb") as opened:
            content: bytes = opened.read()
            return content

    return ask_file_system(url, read)


def url_size(url: str) -> int:
    """Bytes of one file; 0 where the place does not say."""
    return ask_file_system(url, lambda system, path: int(system.size(path) or 0))


@contextmanager
def open_url(url: str) -> Iterator[IO[bytes]]:
    """One file, read as it comes; RequestError where it cannot be opened."""
    with ask_file_system(url, lambda system, path: system.open(path, "rb")) as stream:
        yield stream


def scheme_of(url: str) -> str:
    """`s3` of `s3://bucket/my.jsonl`; empty for a path."""
    return url.partition("://")[0] if "://" in url else ""


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it. Keys come from where each store's own tools take them."""
    scheme, path = scheme_of(url), url.partition("://")[2].rstrip("/")
    if scheme not in ("s3", "gs"):
        found: tuple[Any, str] = import_module("fsspec.core").url_to_fs(url)
        return found
    fs: Any = import_module("pyarrow.fs")  # 0.2 s with fsspec, and only URLs need it
    client = _s3(fs, path.partition("/")[0]) if scheme == "s3" else fs.GcsFileSystem(retry_time_limit=GCS_PATIENCE)
    return import_module("fsspec.implementations.arrow").ArrowFSWrapper(client, skip_instance_cache=True), path


def _s3(fs: Any, bucket: str) -> Any:
    """Endpoint and region by the variables of the AWS tools; without them the bucket is asked for its region."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        return fs.S3FileSystem(endpoint_override=host, scheme=scheme or "https", region=region or "us-east-1")
    return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket))
