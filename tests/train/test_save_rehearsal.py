"""What is saved at the end is tried before the first step, so that no finished run is lost at its save."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer, modeling_utils
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from runner.errors import CannotRunError, RequestError, RunFailedError
from runner.launcher.supervisor import remove_reports
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.train import checkpoint_saving, model_loading, model_saving
from runner.train.model_saving import fix_generation_config
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama
from tests.train.test_merge import merge

Change = Callable[[Any], None]


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    more = ("train.max_steps=4", "eval.num_prompts=0", "method=full", "train.save_every_steps=2")
    return [*tiny_llama.words(tmp_path), *more, f"run.output_dir={tmp_path / 'runs'}"]


def published(folder: Path, **values: Any) -> None:
    """Change the base's generation config."""
    file = folder / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 2} | values))


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": False, "temperature": 0.6},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"do_sample": False, "min_p": 0.1, "typical_p": 0.5},
        {"early_stopping": True, "length_penalty": 0.8},
        {"pad_token_id": -1},
        {"output_scores": True, "output_attentions": True},
    ],
    ids=str,
)
def test_values_without_effect_are_taken_out(values: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama.base(tmp_path / "base")
    published(tmp_path, **values)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.generation_config.eos_token_id = [1, 2]  # as training does
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "saved")
    line = fix_generation_config(model) or ""
    assert all(name in line for name in values if name != "do_sample")
    model.save_pretrained(tmp_path / "saved")
    again = GenerationConfig.from_pretrained(tmp_path / "saved")
    again.validate(strict=True)
    assert not again.do_sample and again.eos_token_id == [1, 2] and again.max_new_tokens == 7
    assert fix_generation_config(model) is None


def test_what_has_an_effect_stays(tmp_path: Path) -> None:
    tiny_llama.base(tmp_path / "base")
    published(tmp_path, do_sample=True, temperature=0.6, top_p=0.9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (
        fix_generation_config(model) is None
        and model.generation_config.temperature == 0.6
        and model.generation_config.top_p == 0.9
    )


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_of_such_a_base_is_saved(method: str, asked: list[str], tmp_path: Path) -> None:
    published(tmp_path, do_sample=False, temperature=0.6)
    _, run = train_here(spec_of(*asked, f"method={method}"))
    if method == "lora":
        merge(run, tmp_path / "merged")
    folder = tmp_path / "merged" if method == "lora" else run.path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.generation_config.temperature is None and checkpoints.complete(run) and not list(run.path.glob(".*"))


@pytest.mark.parametrize(
    "values",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["w5"]},
        {"repetition_penalty": 0.0},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"eos_token_id": "w2"},
        {"eos_token_id": [1, None]},
    ],
    ids=str,
)
def test_answers_are_greedy_whatever_is_published(values: dict[str, Any], asked: list[str], tmp_path: Path) -> None:
    """The same answers as of a base that publishes the tokens alone; and what has an effect elsewhere is saved."""
    published(tmp_path, eos_token_id=[1])
    more = ("eval.num_prompts=2", "eval.max_new_tokens=4", "train.max_steps=1")
    _, plain = train_here(spec_of(*asked, *more))
    published(tmp_path, **{"eos_token_id": [1], **values})
    _, run = train_here(spec_of(*asked, *more))
    for name in ("answers_before.jsonl", "answers_after.jsonl"):
        assert (run.path / name).read_text() == (plain.path / name).read_text()
    saved = GenerationConfig.from_pretrained(run.path / "model")
    assert 1 in stops(saved) and all(isinstance(token, int) for token in stops(saved))
    if "eos_token_id" not in values:
        assert {name: getattr(saved, name) for name in values} == values


def stops(config: GenerationConfig) -> list[Any]:
    found = config.eos_token_id
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("text", ['{"num_return_sequences": 4}', '{"early_stopping": "always"}', "[]"])
def test_one_that_transformers_refuses_is_named(text: str, asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "base" / "generation_config.json").write_text(text)
    with pytest.raises(RequestError) as refused:
        train_here(spec_of(*asked))
    (problem,) = refused.value.problems
    assert "cannot load" in problem.what and "generation_config.json" in (problem.remedy or "")


def tangled(model: Any) -> None:
    """Two layers that share their weights, which the architecture does not say."""
    model.model.layers[1].mlp = model.model.layers[0].mlp


def with_a_set(model: Any) -> None:
    model.config.custom = {"a", "b"}


def never_stopping(model: Any) -> None:
    model.generation_config.max_new_tokens = -1


@pytest.mark.parametrize("change", [tangled, with_a_set, never_stopping], ids=lambda change: change.__name__)
def test_what_cannot_be_saved_is_refused_before_the_first_step(
    change: Change, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = model_loading.load_to_train

    def changed(*some: Any) -> Any:
        model = kept(*some)
        change(model)
        return model

    monkeypatch.setattr(model_loading, "load_to_train", changed)
    with pytest.raises(RequestError, match="the trained model could not be saved"):
        train_here(spec_of(*asked))
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "metrics.jsonl").exists() and not list(folder.glob(".*"))


def test_a_tokenizer_that_cannot_be_saved_is_found(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *some: Any, **more: Any) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", broken)
    with pytest.raises(RequestError, match="Object of type set"):
        train_here(spec_of(*asked))


def test_a_card_that_cannot_be_written_is_found(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*some: Any) -> None:
        raise ValueError("no card")

    monkeypatch.setattr(model_saving, "write_card", broken)
    with pytest.raises(RequestError, match="no card"):
        train_here(spec_of(*asked))


@pytest.mark.parametrize("refused", ["room", "write"])
def test_a_disk_that_will_not_take_it_is_found(
    refused: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused == "room":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    else:

        def full(self: Any, *some: Any, **more: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Trainer, "_save", full)
    with pytest.raises(CannotRunError, match="GiB free" if refused == "room" else "No space left on device") as found:
        train_here(spec_of(*asked))
    assert found.value.exit_code == 3 and not list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_a_checkpoint_that_was_cut_off_does_not_count_and_resume_ends_the_run(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only config.json of the last checkpoint is written; then the run dies."""
    spec = spec_of(*asked)
    kept = Trainer._save

    def cut_off(self: Any, output_dir: str, state_dict: Any = None) -> None:
        if not output_dir.endswith("checkpoint-4"):
            return kept(self, output_dir, state_dict)
        self.model.config.save_pretrained(output_dir)
        raise OSError(28, "No space left on device")

    run = RunDir.create(spec)
    monkeypatch.setattr(Trainer, "_save", cut_off)
    with pytest.raises(OSError, match="No space left"):
        train_here(spec, run)
    assert [file.name for file in checkpoints.folder(run, 4).iterdir()] == ["config.json"]
    assert checkpoints.newest(run) == 2
    monkeypatch.setattr(Trainer, "_save", kept)
    remove_reports(run)
    train_here(spec, run)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4] and checkpoints.newest(run) == 4
    AutoModelForCausalLM.from_pretrained(run.path / "model")


def test_a_run_whose_last_save_failed_is_resumed_without_another_step(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(*asked)
    run, kept = RunDir.create(spec), model_saving.save_model
    monkeypatch.setattr(
        model_saving, "save_model", lambda *some: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        train_here(spec, run)
    lines = list(run.metrics())
    assert not (run.path / "model").exists() and checkpoints.newest(run) == 4
    monkeypatch.setattr(model_saving, "save_model", kept)
    remove_reports(run)
    train_here(spec, run)
    assert list(run.metrics()) == lines
    AutoModelForCausalLM.from_pretrained(run.path / "model")


@pytest.mark.parametrize("files", [["config.json"], ["config.json", "trainer_state.json"], ["model.safetensors"]])
def test_nothing_is_sealed_without_weights_and_state(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RunFailedError, match="does not count as a checkpoint"):
        checkpoint_saving._check_complete(tmp_path)


def test_equal_runs_of_a_sweep_try_it_once(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/sweeps/one").mkdir(parents=True)
    tried: list[str] = []
    rehearse = model_saving.rehearse_save

    def counted(spec: Any, run: RunDir, *more: Any) -> None:
        tried.append(run.id)
        rehearse(spec, run, *more)

    monkeypatch.setattr(model_saving, "rehearse_save", counted)
    runs = []
    for words in (["train.learning_rate=1e-3"], ["train.learning_rate=2e-3"], ["train.max_length=48"]):
        spec = spec_of(*asked, "train.max_steps=1", *words)
        run = RunDir.create(spec)
        run.write("status.json", {**run.status, "sweep": "one"})
        train_here(spec, run)
        runs.append(run.id)
    assert tried == [runs[0], runs[2]]


def test_weights_that_a_rehearsal_did_not_write_are_let_go_at_once() -> None:
    weight = torch.zeros(1)
    kept = weakref.ref(weight)
    with model_saving._weightless():
        modeling_utils.safe_save_file({"weight": weight}, "model.safetensors", metadata={"format": "pt"})
    del weight
    assert kept() is None
