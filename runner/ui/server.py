"""The page's application and the command that serves it."""

from __future__ import annotations

import errno
import secrets
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from rich.console import Console
from starlette.types import ASGIApp

from runner.errors import Problem, RequestError, RunnerError
from runner.paths import VENDOR
from runner.ui import chat_room, compose_room, data_room, pods_room, runs_room
from runner.ui.guard import LOCAL_NAMES, Access, Guard
from runner.ui.remedies import for_form
from runner.ui.safe_json import SafeJson

STATIC = Path(__file__).with_name("static")
SHORTEST_TOKEN = 16
"""Characters of a token of one's own: the drawn one has 43."""


def application(access: Access, output_dir: Path, models: chat_room.ModelProcess | None = None) -> ASGIApp:
    """Everything that answers, behind the guard; `models` is the process that chats."""
    app = FastAPI(title="runner", docs_url=None, redoc_url=None, openapi_url=None)
    models = models or chat_room.ModelProcess()
    for room in (compose_room, data_room, pods_room):
        app.include_router(room.router())
    app.include_router(runs_room.router(output_dir))
    app.include_router(chat_room.router(output_dir, models))

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC))
    app.mount("/vendor", StaticFiles(directory=VENDOR))

    @app.exception_handler(RunnerError)
    def say(request: Request, error: RunnerError) -> SafeJson:
        return SafeJson({"exit_code": error.exit_code, "problems": for_form(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> SafeJson:
        return say(request, RequestError(Problem("the request is not what the page sends", "page")))

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> SafeJson:
        what = f"the server has met an error that it does not know: {type(error).__name__}"
        return SafeJson({"exit_code": 1, "problems": for_form(RunnerError(Problem(what, "server")))}, 500)

    return Guard(app, access)


def serve(console: Console, host: str, port: int, token: str | None, output_dir: Path) -> int:
    """Serve until Ctrl-C; exit code 0. RequestError for a port in use, and for another host without a token."""
    if host not in LOCAL_NAMES and token is None:
        what = f"--host {host}: whoever reaches this port and has the token can start runs and spend money"
        remedy = f"choose a token: RUNNER_UI_TOKEN={secrets.token_urlsafe(24)} python -m runner ui --host {host}"
        raise RequestError(Problem(what, "command line", remedy))
    if token is not None and len(token) < SHORTEST_TOKEN:
        what = f"the token has {len(token)} characters"
        raise RequestError(
            Problem(what, "--token", f"use {SHORTEST_TOKEN} or more, such as {secrets.token_urlsafe(24)}")
        )
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    names = () if host in LOCAL_NAMES else (socket.gethostname(), socket.getfqdn())
    access = Access(token or secrets.token_urlsafe(32), port, host, names)
    shown = f"[{host}]" if ":" in host else socket.gethostname() if host in ("0.0.0.0", "::") else host
    given = token or access.token
    console.print(f"Page    http://{shown}:{port}/?token={given}", markup=False, highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends the page; runs go on.", markup=False, highlight=False, soft_wrap=True)
    models = chat_room.ModelProcess()
    config = uvicorn.Config(
        application(access, output_dir, models), http="h11", ws="none", lifespan="off", log_level="error",
        access_log=False, server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    try:
        with suppress(KeyboardInterrupt):  # uvicorn sends itself the signal again, once it has closed
            uvicorn.Server(config).run([listening])
    finally:
        models.stop()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket at that address; RequestError where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except socket.gaierror:
        what = f"--host {host} is no address of this machine"
        raise RequestError(Problem(what, "command line", "leave it out: 127.0.0.1")) from None
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = f"port {port} is in use" if taken else f"{host}:{port} cannot be listened on: {error.strerror}"
        remedy = "python -m runner ui --port 0 takes any free one" if taken else "choose another --port or --host"
        raise RequestError(Problem(what, "--port", remedy)) from None
    return listening
