"""Network volumes by S3, as RunPod serves them: the bucket is the volume's id. The server is moto's.

moto keeps its objects in memory. So before a request the files of the volume that have changed are given to it, and
after one that writes, the objects that have changed become files: pods and S3 see the same.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

from runner.emulator.answers import Json
from runner.emulator.state import World, volume_folder

Environ = Json
REGION = "us-east-1"


class VolumeStore:
    """An S3 server for the network volumes of a world, until `close`."""

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.access_key = "user_" + secrets.token_hex(10)
        self.secret_key = "rps_" + secrets.token_hex(20)
        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._seen: dict[str, dict[str, tuple[int, int, str]]] = {}
        """Volume → key → modification time and size of the file, etag of the object, when both were the same."""
        self._server = make_server(host, 0, self._answer, threaded=True, request_handler=_Quiet)
        threading.Thread(target=self._server.serve_forever, name="emulated S3", daemon=True).start()
        self.url = f"http://{host}:{self._server.server_port}"

    def close(self) -> None:
        """End the server and forget its objects."""
        self._server.shutdown()
        self._server.server_close()
        for volume in self._seen:
            _backend().buckets.pop(volume, None)
            s3_backends.bucket_accounts.pop(volume, None)

    def _answer(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        volume = environ.get("PATH_INFO", "").lstrip("/").partition("/")[0]
        key = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if key is None or key[1] != self.access_key:
            return _refusal(403, "InvalidAccessKeyId")(environ, start)
        if volume and volume not in self.world.volumes:  # buckets come with volumes, and are not made by S3
            return _refusal(404, "NoSuchBucket")(environ, start)
        with self._lock:
            if volume:
                self._take_in(volume)
            answer = list(self._moto(environ, start))
            if volume and environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE"):
                self._give_out(volume)
        return answer

    def _take_in(self, volume: str) -> None:
        """Files → objects."""
        backend, seen = _backend(), self._seen.setdefault(volume, {})
        if volume not in backend.buckets:
            backend.create_bucket(volume, REGION)
        folder = volume_folder(self.world.root, volume)
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
        for key in [key for key in seen if key not in files]:
            backend.delete_object(volume, key)
            del seen[key]
        for key, file in files.items():
            stat = file.stat()
            if seen.get(key, ())[:2] != (stat.st_mtime_ns, stat.st_size):
                stored = backend.put_object(volume, key, file.read_bytes(), disable_notification=True)
                seen[key] = (stat.st_mtime_ns, stat.st_size, stored.etag)

    def _give_out(self, volume: str) -> None:
        """Objects → files."""
        objects, seen = _backend().buckets[volume].keys, self._seen[volume]
        folder = volume_folder(self.world.root, volume)
        for key in [key for key in seen if key not in objects]:
            (folder / key).unlink(missing_ok=True)
            del seen[key]
        for key in list(objects.keys()):
            stored = objects[key]
            if seen.get(key, ("", "", ""))[2] == stored.etag or key.endswith("/") or ".." in key.split("/"):
                continue
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stored.value)
            seen[key] = (file.stat().st_mtime_ns, file.stat().st_size, stored.etag)


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: object) -> None:
        """Discard the line."""


def _backend() -> Any:
    return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]


def _refusal(status: int, code: str) -> Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return Response(text, status, mimetype="application/xml")
