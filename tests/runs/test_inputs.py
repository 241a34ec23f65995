"""What a run reads is looked for before anything is made; what is closed or far away is said in one line."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from runner.config import credentials
from runner.hub import config_json
from runner.rundir.directory import RunDir
from tests.conftest import run_cli
from tests.support.front import refused, runner, write

pytestmark = pytest.mark.usefixtures("here")

NOWHERE = "http://127.0.0.1:9"
ROW = '{"prompt": "a", "completion": "b"}\n'
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """A Hub with org/open, org/odd (of a kind nobody plans) and org/gated."""

    def do_GET(self) -> None:
        repo = self.path.split("/resolve/")[0].removeprefix("/")
        kinds = {"org/open": "llama", "org/huge": "llama", "org/odd": "rwkv"}
        self.send_response(200 if repo in kinds else 403 if "gated" in repo or "meta-llama" in repo else 404)
        self.end_headers()
        sizes = {"num_hidden_layers": 2000, "hidden_size": 8192} if repo == "org/huge" else {}
        self.wfile.write(json.dumps({**CONFIG, "model_type": kinds.get(repo), **sizes}).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(here.parent / f"{here.name}-hf"))
    monkeypatch.setenv("RUNNER_CACHE", str(here.parent / f"{here.name}-cache"))
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config_json, "_unreachable", {})
    yield
    server.shutdown()


# ── files ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_data_that_are_not_there_are_refused_before_anything_is_made(here: Path, verb: str) -> None:
    write(here / "train.jsonl", ROW)
    assert "/nope.jsonl does not exist" in refused(here, verb, "data=file", "data.path=/nope.jsonl")
    said = refused(here, verb, "data=file", "data.path=trian.jsonl")
    assert "trian.jsonl does not exist (data.path) → did you mean data.path=train.jsonl?" in said
    said = refused(here, verb, "data=file", "data.path=train.jsonl", "data.eval_path=held/out.jsonl")
    assert "held/out.jsonl does not exist, nor does the folder held (data.eval_path)" in said
    said = refused(here, verb, "data.chat_template=mine.jinja")
    assert "mine.jinja does not exist (data.chat_template)" in said
    assert "no file fits rows-*.jsonl" in refused(here, verb, "data=file", "data.path=rows-*.jsonl")
    said = refused(here, verb, "data=file", "data.sources=[{path: train.jsonl}, {path: more.jsonl}]")
    assert "more.jsonl does not exist (data.sources.1.path)" in said
    assert ", or one of chatml, " in refused(here, verb, "data.chat_template=/x/y")


RENTED = ("run", "where=runpod", "hw=rtx4090", "model=mistral7b", "method=qlora4", "train.max_steps=9", "data=file")
GRPO = ("objective=grpo", "train.batch_size=8", "train.micro_batch_size=8")


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (("data.path='~/typo.jsonl'",), "typo.jsonl does not exist", "correct data.path"),
        (("data.path=/data/typo.jsonl",), "on a pod's new disk there is nothing", "where.volume"),
        (("data.path=gs://rows/a.jsonl",), "a pod has no keys of Google's", "volumes put"),
        (("data.path=s3://rows/a.jsonl",), "AWS_ACCESS_KEY_ID is not set", "aws configure export-credentials"),
        (("data.path=train.jsonl", *GRPO, "objective.rewards=[mina.py:score]"), "mina.py does not", "FILE.py:FUNCTION"),
    ],
)
def test_what_a_pod_would_not_find_is_said_before_one_is_rented(
    words: tuple[str, ...], what: str, remedy: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    (here / "train.jsonl").write_text(ROW)
    result = runner(*RENTED, *words)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert what in said and remedy in said


@pytest.mark.parametrize("word", ["objective.shards=reuse", "objective.tokenizer=/workspace/tokenizer"])
def test_what_a_rented_pretraining_would_not_find_is_said_before_one_is_rented(here: Path, word: str) -> None:
    words = ("plan", "recipe=pretrain_22m", "where=runpod", "hw=rtx4090", word)
    refusal = runner(*words)
    assert refusal.exit_code == 2 and "on a pod's new disk there" in " ".join(refusal.output.split())
    assert runner(*words, "where.volume=mine").exit_code == 0


def test_a_volume_may_have_what_is_not_here(here: Path) -> None:
    result = runner(*RENTED, "data.path=/workspace/rows.jsonl", "where.volume=mine")
    assert "rows.jsonl" not in result.output  # something else may be missing, such as a key


def test_all_that_is_missing_is_said_at_once(here: Path) -> None:
    said = refused(here, "data=file", "data.path=a.jsonl", "data.eval_path=b.jsonl", "data.chat_template=c.jinja")
    assert all(name in said for name in ("a.jsonl", "b.jsonl", "c.jinja"))


def test_a_sweep_none_of_whose_points_can_run_is_refused_as_a_whole(here: Path) -> None:
    said = refused(here, "-m", "data=file", "data.path=a.jsonl,b.jsonl")
    assert "a.jsonl does not exist" in said and "b.jsonl does not exist" in said


@pytest.mark.slow
@pytest.mark.parametrize("path", ["rows.jsonl", "rows-*.jsonl", "folder", "s3://bucket/rows.jsonl"])
def test_what_may_be_there_is_left_to_whoever_reads_it(here: Path, started: list[RunDir], path: str) -> None:
    for name in ("rows.jsonl", "rows-1.jsonl", "folder/a.jsonl", "t.jinja"):
        write(here / name, ROW)
    runner("data=file", f"data.path={path}", "data.chat_template=chatml", "train.max_steps=1")
    assert len(started) == 1


# ── models ─────────────────────────────────────────────────────────────────────────────────────


def of_hub(model_id: str, *words: str) -> Result:
    return runner("model=hub", f"model.id={model_id}", "train.max_steps=1", *words)


def test_a_model_that_can_only_be_a_folder_has_to_be_one(here: Path) -> None:
    said = refused(here, "model=hub", "model.id=./nofolder")
    assert "there is no folder ./nofolder with a config.json" in said
    write(here / "run" / "model" / "adapter_config.json", "{}")
    write(here / "run" / "spec.json", "{}")
    said = refused(here, "model=hub", "model.id=run/model/")
    assert "it holds an adapter: python -m runner merge run, and write model.id=run/merged" in said
    assert "the Hub has no config.json for org/none" in refused(here, "model=hub", "model.id=org/none")


def test_a_model_folder_without_weights_or_tokenizer_is_planned_and_not_run(here: Path) -> None:
    """transformers makes a tokenizer without a vocabulary of such a folder: every row would be empty."""
    write(here / "base" / "config.json", json.dumps(CONFIG))
    said = refused(here, "model.id=base", "train.max_steps=1")
    assert "base has no weights (model.id)" in said and "base has no tokenizer (model.id)" in said
    assert runner("plan", "model.id=base", "hw=h100").exit_code == 0
    for name in ("model.safetensors", "tokenizer_config.json"):
        write(here / "base" / name, "")
    assert "has no" not in runner("model.id=base", "train.max_steps=1", "train.micro_batch_size=9000").output


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"training_args.bin": "", "vocab.json": ""}, "base has no weights (model.id) → copy model.safetensors"),
        ({"m.gguf": ""}, "base has no weights (model.id) → write model.gguf_file=m.gguf"),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": '{"base_model_name_or_path": "org/open"}'},
            "base has no weights (model.id) → it holds an adapter; name its base model: model.id=org/open",
        ),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": "{}", "../spec.json": "{}"},
            "it holds an adapter: python -m runner merge ., and write model.id=./merged",
        ),
        (
            {
                "a.safetensors": "", "tokenizer.model": "",
                "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}',
            },
            "base has no b.safetensors, which model.safetensors.index.json names (model.id) → copy b.safetensors",
        ),
    ],
)  # fmt: skip
def test_a_model_folder_has_weights_that_transformers_loads(here: Path, files: dict[str, str], said: str) -> None:
    for name, content in {"config.json": json.dumps(CONFIG), **files}.items():
        write(here / "base" / name, content)
    (here / "base" / "pytorch_model.bin").symlink_to("nowhere")
    assert said in refused(here, "model.id=base", "train.max_steps=1")


def tensors(values: int, length: int = 0) -> bytes:
    """A safetensors file of one tensor with so many values, of which `length` bytes more are there than it says."""
    header = json.dumps({"w": {"dtype": "BF16", "shape": [values], "data_offsets": [0, 2 * values]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(2 * values + length)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tensors(9)[:-1], "model.safetensors has 88 bytes, and by its header 89: it is damaged (model.id) → copy"),
        (tensors(9, length=3), "model.safetensors has 92 bytes, and by its header 89: it is damaged"),
        (tensors(9)[:40], "model.safetensors has 40 bytes and no whole header: it is damaged"),
        (b"", "model.safetensors has 0 bytes and no whole header: it is damaged"),
        (b"\x05\0\0\0\0\0\0\0[1,2]", "model.safetensors has a header that is none: it is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
         "model.safetensors is a pointer of Git LFS, without the weights (model.id) → git -C base lfs pull"),
    ],
)  # fmt: skip
def test_weights_that_are_damaged_are_found_before_the_run(here: Path, content: bytes, said: str) -> None:
    """By header and size alone: a worker would find it after the start, or on a rented pod."""
    for name in ("config.json", "tokenizer.json"):
        write(here / "base" / name, json.dumps(CONFIG))
    (here / "base" / "model.safetensors").write_bytes(content)
    assert said in refused(here, "model.id=base", "train.max_steps=1")
    (here / "base" / "model.safetensors").write_bytes(tensors(9))
    assert "damaged" not in runner("model.id=base", "train.max_steps=1", "train.micro_batch_size=9000").output


def test_every_damaged_shard_is_named(here: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        write(here / "base" / name, json.dumps(CONFIG))
    for name, content in (("a", tensors(9)), ("b", tensors(9)[:50]), ("c", b"")):
        (here / "base" / f"{name}.safetensors").write_bytes(content)
    named = {"weight_map": {name: f"{name}.safetensors" for name in "abc"}}
    write(here / "base" / "model.safetensors.index.json", json.dumps(named))
    said = refused(here, "model.id=base", "train.max_steps=1")
    assert "b.safetensors has 50 bytes" in said and "c.safetensors has 0 bytes" in said and "a.safetensors" not in said


def test_a_model_folder_below_the_home_folder_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell replaces the `~` of model.id=~/base."""
    monkeypatch.setenv("HOME", str(here))
    write(here / "base" / "config.json", json.dumps(CONFIG))
    shown = json.loads(runner("show", "--json", "model.id=~/base").stdout)
    assert shown["model"]["id"] == str(here / "base") and shown["model"]["architecture"] == "llama"
    assert f"{here}/base has no weights" in refused(here, "model.id=~/base", "train.max_steps=1")
    assert f"there is no folder {here}/none" in refused(here, "model.id=~/none", "train.max_steps=1")
    words = ("hw=h100x3", "deepspeed=zero3_offload", "deepspeed.nvme_path=~/nvme", "model=mistral7b", "method=full")
    assert json.loads(runner("show", "--json", *words).stdout)["deepspeed"]["nvme_path"] == str(here / "nvme")


def test_a_folder_that_may_be_of_the_hub_is_not_run_without_its_config(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    for name in ("model.safetensors", "tokenizer.json"):
        write(here / "org" / "base" / name, "")
    assert "org/base has no config.json (model.id)" in refused(here, "model.id=org/base", "train.max_steps=1")


def test_a_hub_model_is_planned_before_it_runs(started: list[RunDir]) -> None:
    result = of_hub("org/open")
    assert result.exit_code == 0, result.output
    assert "\nPlan    " in result.output and "no plan" not in result.output
    assert started[0].read("plan.json")["trainable_parameters"] > 0
    assert started[0].read("spec.json")["model"]["num_layers"] == 2


def test_a_hub_model_that_cannot_fit_is_refused(here: Path) -> None:
    result = of_hub("org/huge")
    assert result.exit_code == 3 and "GiB at its peak" in result.output
    assert list(here.iterdir()) == []


def test_a_kind_that_nobody_plans_runs_with_one_note(started: list[RunDir]) -> None:
    result = of_hub("org/odd")
    assert len(started) == 1
    assert result.output.count("no plan") == 1 and "no plan: model_type rwkv is not known" in result.output
    assert "model.architecture" not in result.output


def test_without_a_network_there_is_one_clear_note(started: list[RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    result = of_hub("org/open")
    assert len(started) == 1
    (note,) = [line for line in result.output.splitlines() if "Hub" in line and line.startswith("Note")]
    assert "no plan: the Hub cannot be reached for org/open" in note


def test_a_model_of_the_catalogue_is_missed_in_one_note_too(
    started: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    result = runner("model=qwen3_0_6b", "train.max_steps=1")
    assert len(started) == 1
    (note,) = [line for line in result.output.splitlines() if "Hub cannot be reached" in line]
    assert note.endswith("its weights are not here, so loading it will fail")


def test_a_hub_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(config_json.UnreachableError):
        config_json.fetch("org/open")
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **options: pytest.fail("asked again"))
    with pytest.raises(config_json.UnreachableError, match="cannot be reached for org/other"):
        config_json.fetch("org/other")


# ── gated ──────────────────────────────────────────────────────────────────────────────────────

GATED = ("model=llama3_2_1b", "train.max_steps=1")


def test_a_gated_model_without_a_key_is_refused_and_noted(here: Path) -> None:
    said = refused(here, *GATED)
    assert "meta-llama/Llama-3.2-1B is gated on the Hugging Face Hub, and HF_TOKEN is not set" in said
    assert "accept its licence at https://huggingface.co/meta-llama/Llama-3.2-1B, then export HF_TOKEN=…" in said
    plan = json.loads(runner("plan", "--json", *GATED).stdout)
    assert any("Llama-3.2-1B is gated: accept its licence" in note for note in plan["notes"])


def test_a_key_whose_licence_is_not_accepted_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "accept its licence" in refused(here, *GATED)
    assert not any("gated" in note for note in json.loads(runner("plan", "--json", *GATED).stdout)["notes"])


def test_a_key_of_hf_auth_login_counts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(here.parent / f"{here.name}-token", "hf_mine\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(file))
    assert credentials.hub_token() == "hf_mine"
    assert not any("gated" in note for note in json.loads(runner("plan", "--json", *GATED).stdout)["notes"])


@pytest.mark.parametrize("name", ["HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN"])
def test_a_key_by_another_name_counts(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "hf_mine")
    assert credentials.hub_token() == "hf_mine"
    monkeypatch.setenv("HF_TOKEN", " ")
    credentials.export_hub_token()
    assert os.environ["HF_TOKEN"] == "hf_mine"  # what huggingface_hub reads


# ── for real ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_libraries_keep_quiet_about_a_hub_that_is_not_there(here: Path) -> None:
    words = ("model=qwen3_0_6b", "hw=cpu", "train.max_steps=1", "train.max_length=64")
    done = run_cli(*words, cwd=here, HF_ENDPOINT=NOWHERE, HF_HOME=str(here / "hf"))
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert "Retry" not in said and "HEAD" not in said and "Traceback" not in said
    assert "cannot be reached to load Qwen/Qwen3-0.6B" in said
    assert "nothing was started" not in said
    assert said.count("\n") < 15, said
