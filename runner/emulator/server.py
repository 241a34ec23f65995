"""The emulator as an object: a server on a loopback port with its world behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvicorn

from runner.emulator.app import application
from runner.emulator.clocks import Clock
from runner.emulator.faults import Fault
from runner.emulator.pods import Pod
from runner.emulator.settings import Settings
from runner.emulator.state import Exchange, World

HOST = "127.0.0.1"
STARTING_S = 30.0


class Emulator:
    """A RunPod at `.url`, until `close`; a context manager, too.

    `root` is where pods and volumes are kept; port 0 is any free one. Settings are those of `Settings`.
    """

    def __init__(self, root: Path, port: int = 0, **settings: Any) -> None:
        self.world = World(root.absolute(), Settings(**settings))
        self._s3: Any = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except OSError:
            self.world.close()
            raise
        self.url = self.world.engine.base_url = f"http://{HOST}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            application(self.world), http="h11", ws="none", lifespan="off", log_level="critical", access_log=False,
            date_header=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="emulator", daemon=True)
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + STARTING_S
        while not self._server.started:
            if time.monotonic() > end or not self._thread.is_alive():
                raise RuntimeError("the emulator's server did not start")
            time.sleep(0.005)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every pod; folders stay."""
        if self._s3 is not None:
            self._s3.close()
        self.world.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    @property
    def key(self) -> str:
        """The account's API key."""
        return self.world.settings.key

    @property
    def env(self) -> dict[str, str]:
        """The two variables that make RunPod's SDK, and this runner, talk to the emulator."""
        return {"RUNPOD_API_BASE_URL": self.url, "RUNPOD_API_KEY": self.key}

    def serve_s3(self) -> dict[str, str]:
        """Serve network volumes by S3, too: the variables that say where and with which keys."""
        from runner.emulator.s3 import VolumeStore  # moto: 1.5 s, and only for those who ask for it

        if self._s3 is None:
            self._s3 = VolumeStore(self.world, HOST)
        keys = {"AWS_ACCESS_KEY_ID": self._s3.access_key, "AWS_SECRET_ACCESS_KEY": self._s3.secret_key}
        return {"AWS_ENDPOINT_URL_S3": self._s3.url, **keys}

    @property
    def clock(self) -> Clock:
        """Its clock: `set_speed`, `advance`, `skew_s`."""
        return self.world.clock

    def inject(self, kind: str, **values: Any) -> Fault:
        """Put a fault in force; `Fault` has the values, `faults.KINDS` the kinds. An event happens at once."""
        fault = Fault(kind, **values)
        self.world.inject(fault)
        return fault

    def clear(self) -> None:
        """No more faults."""
        self.world.faults.clear()
        self.world.clock.skew_s = 0.0

    def pods(self) -> dict[str, Pod]:
        """Pods that exist, by id, stopped ones included; a bill runs for each."""
        with self.world.engine.lock:
            return dict(self.world.engine.pods)

    def billed(self, pod: str | None = None) -> float:
        """US$ so far: of a pod by id or name, dead or alive, or of everything."""
        return self.world.billed(pod)

    @property
    def exchanges(self) -> deque[Exchange]:
        """Requests and their answers, oldest first."""
        return self.world.exchanges
