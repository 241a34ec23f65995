"""Chat: the model of a run and its base, in one process of its own that holds one model and can be ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from runner.errors import Problem, RequestError
from runner.report.text import without_control_sequences
from runner.rundir.directory import RunDir
from runner.runs.worker_tasks import no_model_yet, refuse_reward_model, single_process_environment
from runner.ui import confined
from runner.ui.run_feed import event
from runner.ui.safe_json import SafeJson, to_json

MODULE = "runner.train.chat_process"


class Question(BaseModel):
    """What is asked of a model."""

    run: str = Field(max_length=300)
    side: Literal["tuned", "base"]
    prompt: str = Field(max_length=20_000)
    max_new_tokens: int = Field(256, ge=1, le=2048)
    temperature: float = Field(0.0, ge=0, le=2)


class ModelProcess:
    """At most one child with one model; a question to another run ends it and starts another."""

    def __init__(self) -> None:
        self._asking = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._run: str | None = None

    def answer(self, run: RunDir, question: Question) -> Iterator[dict[str, Any]]:
        """Pieces of an answer as they come: `{"text": …}`, at last `{"done": …}` or `{"error": …}`."""
        with self._asking:
            process = self._started(run)
            assert process.stdin is not None and process.stdout is not None
            whole = False
            try:
                process.stdin.write(question.model_dump_json() + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    said = json.loads(line)
                    whole = "done" in said or "error" in said
                    yield said
                    if whole:
                        return
            except (OSError, ValueError):
                pass
            finally:
                if not whole:  # the page was closed in the middle: what is still generated is nobody's
                    process.kill()
                    process.wait()
            yield {"error": "stopped"}

    def _started(self, run: RunDir) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None and self._run == run.id:
            return self._process
        self.stop()
        command = [sys.executable, "-m", MODULE, str(run.spec_file)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            encoding="utf-8", env=single_process_environment(),
        )  # fmt: skip
        self._run = run.id
        return self._process

    def stop(self) -> bool:
        """End the child and free its memory; True if there was one."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return False
        process.kill()
        process.wait()
        return True


def router(output_dir: Path, models: ModelProcess) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api")

    @api.post("/chat")
    def chat(question: Question) -> StreamingResponse:
        run = confined.run_of(question.run, output_dir)
        refuse_reward_model(run.spec)
        if question.side == "tuned" and not (run.path / "model").is_dir():
            raise no_model_yet(run)
        if not question.prompt.strip():
            raise RequestError(Problem("the prompt is empty", "page"))
        return StreamingResponse(_events(run, question), media_type="text/event-stream")

    def _events(run: RunDir, question: Question) -> Iterator[str]:
        for said in models.answer(run, question):
            clean = {k: without_control_sequences(v) if isinstance(v, str) else v for k, v in said.items()}
            yield event("piece", to_json(clean))

    @api.post("/chat/stop")
    def stop() -> SafeJson:
        return SafeJson({"stopped": models.stop()})

    return api
