"""The web application: RunPod's paths below /v2, and the emulator's own below /_emulator."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from runner.emulator import (
    account_api,
    admin_api,
    billing_api,
    catalog_api,
    clusters_api,
    graphql_api,
    pods_api,
    serverless_api,
    storage_api,
)
from runner.emulator.errors import MEDIA_TYPE, ApiProblem
from runner.emulator.middleware import Front
from runner.emulator.state import World

PARTS = (
    pods_api,
    catalog_api,
    storage_api,
    account_api,
    billing_api,
    serverless_api,
    clusters_api,
    graphql_api,
    admin_api,
)


def application(world: World) -> ASGIApp:
    """Everything that answers."""
    app = FastAPI(title="RunPod REST v2, emulated", docs_url=None, redoc_url=None, openapi_url=None)
    for part in PARTS:
        app.include_router(part.router(world))

    @app.exception_handler(ApiProblem)
    def say(request: Request, problem: ApiProblem) -> JSONResponse:
        return JSONResponse(problem.content(), problem.status, headers=problem.headers(), media_type=MEDIA_TYPE)

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> JSONResponse:
        return say(request, ApiProblem(500, f"{type(error).__name__}: {error}"))

    return Front(app, world)
