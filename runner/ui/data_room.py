"""Data: upload or name a file, and see it as training does; by the functions of `data preview` and `data stats`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Body, Request

from runner.config.compose import compose
from runner.data.inspect.preview import preview
from runner.data.inspect.stats import stats
from runner.data.readers.files import READABLE, kind_of_file
from runner.errors import Problem, RequestError, RunnerError
from runner.rundir.atomic_folder import unfinished
from runner.ui import confined
from runner.ui.compose_room import one_at_a_time
from runner.ui.form_request import command_line, request_of, words_of
from runner.ui.remedies import for_form
from runner.ui.safe_json import SafeJson

UPLOADS = "uploads"
"""Folder of uploaded files, in the working directory."""
_NAME = re.compile(r"[A-Za-z0-9][\w .-]{0,120}", re.ASCII)
MOST_ROWS = 20
MOST_PROBLEMS = 100


def router() -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api")

    @api.post("/upload")
    async def upload(request: Request, name: str = "") -> SafeJson:
        target = _target(name)
        target.parent.mkdir(exist_ok=True)
        part = unfinished(target, id(request))
        try:
            with part.open("xb") as stream:
                async for piece in request.stream():
                    stream.write(piece)
            part.replace(target)
        except OSError as error:
            raise RequestError(Problem(f"{target.name} cannot be written: {error.strerror}", "page")) from None
        finally:
            part.unlink(missing_ok=True)
        return SafeJson({"path": f"{UPLOADS}/{target.name}"})

    @api.post("/preview")
    def look(asked: dict[str, Any] = Body()) -> SafeJson:  # noqa: B008  # FastAPI's way
        rows = asked.get("rows")
        with one_at_a_time():
            words = words_of(asked)
            spec = compose(request_of(words))
            confined.check_spec(spec)
        found: dict[str, Any] = dict(preview(spec, min(rows, MOST_ROWS) if isinstance(rows, int) and rows > 0 else 3))
        found["num_problems"], found["problems"] = len(found["problems"]), found["problems"][:MOST_PROBLEMS]
        try:
            counted: Any = stats(spec)
        except RunnerError as error:
            counted = {"problems": for_form(error)[:MOST_PROBLEMS], "histogram": []}
        return SafeJson({"preview": found, "stats": counted, "command": command_line(words, "data preview")})

    return api


def _target(name: str) -> Path:
    """Where an uploaded file goes; RequestError for what is no name of rows, or is there already."""
    if not _NAME.fullmatch(name) or not kind_of_file(name):
        remedy = f"name it with letters, digits and . _ -, ending in {READABLE}"
        raise RequestError(Problem(f"{name[:100]!r} cannot be uploaded", "page", remedy))
    target = confined.inside(f"{UPLOADS}/{name}")
    if target.exists():
        what = f"{UPLOADS}/{name} is there already"
        raise RequestError(Problem(what, "page", "name that one, or rename yours before uploading it"))
    return target
