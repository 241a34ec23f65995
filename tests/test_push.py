"""A finished run goes to the Hub whole: huggingface_hub itself, against a server that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.report.card import card
from runner.rundir import RunDir
from tests.conftest import run_cli, spec_of

TOKEN = "hf_testtokentesttokentesttoken"
SUMMARY = {
    "train": {"loss_first": 4.6, "loss_last": 0.01, "steps": 294, "tokens": 69512, "trainable_parameters": 4884480},
    "eval": {
        "num_prompts": 40,
        "before": {"loss": 4.7, "num_exact": 0, "exact_match": 0.0},
        "after": {"loss": 0.01, "num_exact": 40, "exact_match": 1.0},
    },
}


class Hub:
    """The requests of a commit, as the Hub answers them: create, preupload, the card's metadata, commit."""

    def __init__(self) -> None:
        hub = self
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[dict[str, bytes]] = []
        self.status = 200

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    hub.answer(self, 401, {"error": "Invalid username or password."})
                elif hub.status != 200:
                    hub.answer(self, hub.status, {"error": "no"})
                else:
                    hub.answer(self, 200, hub.serve(self.path, body))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def serve(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.repos[wanted["name"]] = wanted
            return {"url": f"{self.url}/{wanted['organization']}/{wanted['name']}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        assert path == "/api/models/me/tuned/commit/main"
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.commits.append({name: base64.b64decode(content) for name, content in files.items()})
        return {"commitUrl": f"{self.url}/me/tuned/commit/{'0' * 40}", "commitOid": "0" * 40}


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    yield found
    found.server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run, its adapter a few bytes."""
    done = RunDir.create(spec_of(f"run.output_dir={tmp_path / 'runs'}"))
    (done.path / "model").mkdir()
    (done.path / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    (done.path / "model" / "adapter_config.json").write_text("{}", "utf-8")
    (done.path / "loss.png").write_bytes(b"picture")
    done.write("summary.json", SUMMARY)
    return done


def push(run: RunDir, hub: Hub, *words: str, token: str = TOKEN) -> Any:
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(run.path.parent / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return run_cli("push", str(run.path), *words, **env)


def test_weights_card_and_spec_go_in_one_commit_to_a_private_repository(run: RunDir, hub: Hub) -> None:
    done = push(run, hub, "me/tuned", "--json")
    assert done.returncode == 0, done.stderr
    (commit,) = hub.commits
    assert hub.repos["tuned"]["visibility"] == "private"
    assert commit["adapter_model.safetensors"] == b"weights" and commit["loss.png"] == b"picture"
    assert json.loads(commit["spec.json"]) == run.read("spec.json")
    assert json.loads(done.stdout)["files"] == sorted(commit)
    assert commit["README.md"].decode().startswith("---\nlibrary_name: peft")
    assert not any(TOKEN.encode() in content for content in commit.values())


@pytest.mark.parametrize(
    ("words", "token", "status", "code", "said"),
    [
        (["me/tuned"], "hf_wrong", 200, 2, "the Hub does not accept the token"),
        (["me/tuned"], TOKEN, 403, 2, "may not write to me/tuned"),
        (["me/tuned"], TOKEN, 500, 1, "the Hub answered 500"),
        (["tuned"], TOKEN, 200, 2, "write ORG/NAME"),
        (["me/tuned", "--merged"], TOKEN, 200, 2, "python -m runner merge"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_words(
    run: RunDir, hub: Hub, words: list[str], token: str, status: int, code: int, said: str
) -> None:
    hub.status = status
    done = push(run, hub, *words, token=token)
    assert done.returncode == code
    assert said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_told_in_words(run: RunDir, hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    done = push(run, hub, "me/tuned")
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_the_card_says_what_the_hub_reads(run: RunDir) -> None:
    spec = spec_of("model=mistral7b", "method=qlora4", "hw=h100x3", "data=guanaco")
    text = card(spec, run, "me/tuned", adapter=True, picture=False)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == spec.model.id and metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == [spec.data.id]
    assert "| held-out prompts answered exactly | 0 of 40 | 40 |" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tuned")' in text and "loss.png" not in text
