"""`export`: a checkpoint becomes what the final save writes, whoever wrote it, and however many processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.errors import RequestError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import export as exporting
from tests.conftest import ROOT, run_cli
from tests.support import tiny_llama
from tests.support.front import here, laptop, runner, spec_of

__all__ = ["here", "laptop"]

Weights = dict[str, torch.Tensor]


def export(run: RunDir, step: int, target: Path) -> dict[str, Any]:
    spec = RunSpec.model_validate(run.read("spec.json"))
    return exporting.export(spec, run, step, target, lambda line: None)


def files(folder: Path) -> dict[str, Any]:
    """What a folder says, file by file; a model card is no part of it."""
    found: dict[str, Any] = {file.name: json.loads(file.read_text("utf-8")) for file in folder.glob("*.json")}
    if "adapter_config.json" in found:
        found["adapter_config.json"]["target_modules"].sort()  # a set in PEFT
    for file in folder.glob("*.jinja"):
        found[file.name] = file.read_text("utf-8")
    return found


def weights(folder: Path) -> Weights:
    (file,) = folder.glob("*.safetensors")
    return dict(load_file(file))


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    "words",
    [
        ["method=full"],
        ["method=freeze", "method.layers=[1]", "method.extra_modules=[norm]"],
        ["method=lora", "method.use_dora=true", "method.modules_to_save=[norm]"],
        ["method=qlora4"],
        ["method=lora", "method.init=olora"],
    ],
    ids=["full", "freeze", "dora", "qlora4", "olora"],
)
def test_the_last_checkpoint_is_the_final_save(
    words: list[str], train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = shutil.rmtree  # all but the start of an adapter, as in a run not yet finished
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: path.name == "initial_adapter" or removed(path, **more))
    _, run = train(*tiny_llama.words(tmp_path), *words, "train.save_every_steps=5", "eval.num_prompts=0")
    facts = export(run, 5, tmp_path / "out")
    assert not facts["sharded"]
    assert_same(weights(tmp_path / "out"), weights(run.path / "model"))
    assert files(tmp_path / "out") == files(run.path / "model")


@pytest.mark.parametrize("words", [["method=full"], ["method=freeze"], ["method=lora"]], ids=lambda words: words[0])
def test_a_reward_model_keeps_its_head(words: list[str], train: Callable[..., Any], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{n}", "chosen": f"w{n + 1}", "rejected": f"w{n + 2}"} for n in range(4, 20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["objective=reward", f"data.path={pairs}", "train.max_steps=2", "eval.num_prompts=0"]
    _, run = train(*tiny_llama.words(tmp_path), *words, *more)
    empty = exporting._model_without_weights(
        str(tmp_path / "base"), RunSpec.model_validate(run.read("spec.json")), where="meta"
    )
    assert empty.score.weight.shape == (1, 64)  # what the shards of a DeepSpeed checkpoint are put into
    export(run, 2, tmp_path / "out")
    assert_same(weights(tmp_path / "out"), weights(run.path / "model"))
    assert any("score" in name for name in weights(tmp_path / "out"))
    assert files(tmp_path / "out") == files(run.path / "model")


def test_a_start_that_is_gone_is_said(train: Callable[..., Any], tmp_path: Path) -> None:
    words = ["method=lora", "method.init=pissa", "train.precision=fp32", "train.max_steps=1"]
    _, run = train(*tiny_llama.words(tmp_path), *words, "train.save_every_steps=1", "eval.num_prompts=0")
    with pytest.raises(RequestError, match="initial_adapter is gone"):
        export(run, 1, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


CASES = {
    "full1": (["method=full"], {"stage": 1, "bare": False, "frozen": None}),
    "full3": (["method=full"], {"stage": 3, "bare": True, "frozen": None}),
    "freeze2": (["method=freeze"], {"stage": 2, "bare": True, "frozen": None}),
    "freeze3": (["method=freeze"], {"stage": 3, "bare": True, "frozen": False}),
    "lora3": (["method=lora", "method.modules_to_save=[norm]"], {"stage": 3, "bare": True, "frozen": None}),
    "lora2": (["method=lora", "method.use_dora=true"], {"stage": 2, "bare": True, "frozen": True}),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """A checkpoint of every case, by two real ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    base = tiny_llama.words(folder)
    runs = {
        name: RunDir.create(spec_of(*base, *words, f"run.output_dir={folder / name}"))
        for name, (words, _) in CASES.items()
    }
    listed = folder / "cases.json"
    listed.write_text(json.dumps([{"run": str(run.path), **CASES[name][1]} for name, run in runs.items()]), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "zero_checkpoints.py"), str(listed)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for run in runs.values():
        checkpoints.seal(checkpoints.folder(run, 2), {"step": 2})
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shards_become_the_weights_that_the_model_held(name: str, sharded: dict[str, RunDir], tmp_path: Path) -> None:
    run = sharded[name]
    held: Weights = torch.load(run.path / "weights.pt")
    facts = export(run, 2, tmp_path / "out")
    assert facts["sharded"]
    base = AutoModelForCausalLM.from_pretrained(RunSpec.model_validate(run.read("spec.json")).model.id)
    trained = {n for n, p in base.named_parameters() if not torch.equal(p, held.get(n, p))}
    if facts["kind"] == "adapter":
        loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "out"))
        wanted = {n for n in held if "lora_" in n or "modules_to_save" in n}
        assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}
        assert len(weights(tmp_path / "out")) == len(wanted)
    else:
        loaded, wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), set(held)
        assert 0 < len(trained) <= len(held) and (len(trained) == len(held)) == name.startswith("full")
        assert loaded.dtype == torch.bfloat16 and loaded.generation_config.max_new_tokens == 7
    found = dict(loaded.named_parameters())
    for each in wanted:
        assert torch.equal(found[each].float(), held[each].float()), each
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_llama.TEMPLATE


@pytest.mark.slow
def test_shards_of_another_model_are_refused(sharded: dict[str, RunDir], tmp_path: Path) -> None:
    from runner.errors import RunFailedError

    run = RunDir.create(spec_of(*tiny_llama.words(tmp_path), "method=lora", f"run.output_dir={tmp_path / 'runs'}"))
    (run.path / "checkpoints").mkdir()
    checkpoints.folder(run, 2).symlink_to(checkpoints.folder(sharded["full3"], 2))
    with pytest.raises(RunFailedError, match="does not fit the run's model"):
        export(run, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_takes_the_newest_whole_checkpoint(sharded: dict[str, RunDir]) -> None:
    run = sharded["full3"]
    checkpoints.folder(run, 7).mkdir()  # never finished
    done = run_cli("export", str(run.path), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "folder": str(run.path / "export-2"), "kind": "model", "step": 2, "sharded": True,
    }  # fmt: skip
    assert "checkpoint 7 is incomplete" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(run.path / "export-2").config.num_hidden_layers == 3


def test_a_checkpoint_that_does_not_count_is_refused(here: Path) -> None:
    run = RunDir.create(spec_of("hw=cpu", f"run.output_dir={here}"))
    answer = runner("export", str(run.path))
    assert answer.exit_code == 2 and "no complete checkpoint" in answer.stderr
    for step in (2, 4, 6):
        checkpoints.folder(run, step).mkdir(parents=True)
        (checkpoints.folder(run, step) / "weights").write_text("all of them")
    for step in (2, 4):
        checkpoints.seal(checkpoints.folder(run, step), {})
    (checkpoints.folder(run, 4) / "weights").write_text("half of")
    answer = runner("export", str(run.path), "--step", "6")
    assert answer.exit_code == 2 and "is incomplete" in answer.stderr and "complete ones: 2, 4" in answer.stderr
    answer = runner("export", str(run.path), "--step", "4", "--json")
    problem = json.loads(answer.stdout)["problems"][0]
    assert answer.exit_code == 2 and "weights has 7 of 11 bytes" in problem["what"] and problem["remedy"].endswith(" 2")
    assert "no checkpoint 5" in runner("export", str(run.path), "--step", "5").stderr
