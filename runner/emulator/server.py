"""The emulator: its web application, a server on a loopback port with a world behind it, and the command.

`/_emulator` is what has no counterpart at RunPod: faults, the clock and the state, without a key."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from rich.console import Console
from starlette.types import ASGIApp

from runner.emulator import account_api, catalog_api, graphql_api, pods_api, serverless_api
from runner.emulator.answers import MEDIA_TYPE, ApiProblem, Json
from runner.emulator.container import sshd
from runner.emulator.faults import KINDS, Fault, parsed
from runner.emulator.middleware import Front
from runner.emulator.pods import Pod
from runner.emulator.settings import RESTRICTED, Clock, Settings
from runner.emulator.state import Exchange, World
from runner.errors import CannotRunError, Problem, RequestError

PARTS = (pods_api, catalog_api, account_api, serverless_api, graphql_api)


def application(world: World) -> ASGIApp:
    """Everything that answers."""
    app = FastAPI(title="RunPod REST v2, emulated", docs_url=None, redoc_url=None, openapi_url=None)
    for part in PARTS:
        app.include_router(part.router(world))
    app.include_router(admin_router(world))

    @app.exception_handler(ApiProblem)
    def say(request: Request, problem: ApiProblem) -> JSONResponse:
        return JSONResponse(problem.content(), problem.status, headers=problem.headers(), media_type=MEDIA_TYPE)

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> JSONResponse:
        return say(request, ApiProblem(500, f"{type(error).__name__}: {error}"))

    return Front(app, world)


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

    def restricted_key(self, kind: str) -> str:
        """Another key of the account, which may do less: `settings.RESTRICTED` has the kinds."""
        if kind not in RESTRICTED:
            raise ValueError(f"{kind!r} is no kind of key: {', '.join(RESTRICTED)}")
        key = "rpa_" + secrets.token_hex(20).upper()
        self.world.settings.restricted[key] = kind
        return key

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
        """Remove all faults."""
        self.world.clear()

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


REALISTIC = {"provision_s": 8.0, "pull_s": 28.0, "runtime_s": 5.0, "ssh_delay_s": 6.0, "restart_s": 2.0}
"""With an image that the machine has already; without it the pull alone takes 9 to 13 minutes."""


def serve(console: Console, port: int, root: Path | None, faults: list[Fault], with_s3: bool, **settings: Any) -> int:
    """Exit code 0 after SIGINT or SIGTERM. RequestError for a port in use; CannotRunError without sshd."""
    if sys.platform != "linux":
        what = "an emulated pod is made of what only Linux has"
        raise CannotRunError(Problem(what, "emulate", "run it in a Linux container or virtual machine"))
    if sshd() is None:
        what = "there is no sshd on this machine, and an emulated pod is a real ssh server"
        raise CannotRunError(Problem(what, "emulate", "install it: apt-get install openssh-server rsync"))
    speed = settings.pop("speed", 1.0)
    with _folder(root) as folder, _started(folder, port, settings) as emulator:
        emulator.clock.set_speed(speed)
        for fault in faults:
            emulator.world.inject(fault)
        # Whole lines at any width: they are pasted into a shell.
        say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        for name, value in {**emulator.env, **(emulator.serve_s3() if with_s3 else {})}.items():
            say(f"export {name}={shlex.quote(value)}")
        say(f"# a RunPod on this machine, until Ctrl-C; faults: POST {emulator.url}/_emulator/faults")
        stop.wait()
        say(f"# billed {emulator.billed():.4f} US$ (not charged); {len(emulator.pods())} pods ended")
    return 0


def faults_of(texts: tuple[str, ...]) -> list[Fault]:
    """Parse the faults of the command line; RequestError with all that are invalid."""
    found, problems = [], []
    for text in texts:
        try:
            found.append(parsed(text))
        except ValueError as error:
            problems.append(Problem(str(error), f"--fault {text}", "docs/emulator.md has them all"))
    if problems:
        raise RequestError(*problems)
    return found


@contextlib.contextmanager
def _folder(root: Path | None) -> Iterator[Path]:
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="runner-emulator-", ignore_cleanup_errors=True) as made:
        yield Path(made)


def _started(root: Path, port: int, settings: Json) -> Emulator:
    try:
        return Emulator(root, port, **settings)
    except OSError as error:
        what = f"port {port} of 127.0.0.1 cannot be listened on: {error.strerror}"
        raise RequestError(Problem(what, "--port", "leave --port out for any free one")) from None


def admin_router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/_emulator")

    @api.get("/faults")
    def faults() -> Json:
        return {"faults": world.faults.listed(), "kinds": KINDS}

    @api.post("/faults", status_code=201)
    def inject(body: Json) -> Json:
        try:
            fault = Fault(**{name: value for name, value in body.items() if name not in ("id", "used")})
        except (TypeError, ValueError) as error:
            raise ApiProblem(422, str(error)) from None
        return {"struck": world.inject(fault), **asdict(fault)}

    @api.delete("/faults", status_code=204)
    def clear() -> Response:
        world.clear()
        return Response(status_code=204)

    @api.delete("/faults/{number}", status_code=204)
    def clear_one(number: int) -> Response:
        world.faults.clear(number)
        return Response(status_code=204)

    @api.post("/clock")
    def clock(body: Json) -> Json:
        """speed, advance_s, skew_s."""
        if "speed" in body:
            world.clock.set_speed(float(body["speed"]))
        world.clock.advance(float(body.get("advance_s", 0.0)))
        world.clock.skew_s = float(body.get("skew_s", world.clock.skew_s))
        return {"speed": world.clock.speed, "billed_s": world.clock.billed(), "skew_s": world.clock.skew_s}

    @api.post("/balance")
    def balance(body: Json) -> Json:
        """Set the total of the account's deposits; it may be less than what is billed already."""
        world.settings.balance_usd = float(body["usd"])
        return {"usd": world.settings.balance_usd, "billed_usd": world.billed()}

    @api.get("/pods")
    def pods() -> Json:
        """Dead and alive, with what each has cost."""
        names = ("id", "name", "status", "data_center", "restarts", "created")
        found = world.engine.all_pods()
        return {"pods": [{**{n: getattr(p, n) for n in names}, "gpu": p.gpu_id, "usd": p.usd()} for p in found]}

    @api.get("/exchanges")
    def exchanges() -> Json:
        return {"exchanges": [asdict(exchange) for exchange in list(world.exchanges)]}

    return api
