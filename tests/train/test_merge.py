"""`merge`: what it writes is base + adapter, in a folder that plain transformers loads; what is not, it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.errors import RequestError, RunFailedError
from runner.rundir.directory import RunDir
from runner.runs import worker_tasks
from runner.spec import RunSpec
from runner.train.merge import adapter as merging
from runner.train.merge import proof
from tests.conftest import ROOT, run_cli
from tests.support import tiny_llama
from tests.support.front import here, laptop, runner, spec_of, write

__all__ = ["here", "laptop"]

PROMPTS = [[5, 9, 33, 1, 6, 10, 34, 1], list(range(4, 44))]
ALL = ("method.rank=4", "eval.num_prompts=3")


def spec(run: RunDir) -> RunSpec:
    return RunSpec.model_validate(run.read("spec.json"))


def merge(run: RunDir, target: Path) -> dict[str, Any]:
    return merging.merge(spec(run), run, target, lambda line: None)


def exact(model: Any) -> list[torch.Tensor]:
    with proof.computing_in_fp32(model):
        return proof.logits(model, PROMPTS)


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of `dtype` of all sizes, zeros among them, as fp32."""
    torch.manual_seed(0)
    sizes = torch.logspace(-9, 3, 2000)
    return torch.cat([torch.zeros(8), torch.randn(2000) * sizes, torch.tensor([1.0, -2.0])]).to(dtype).float()


def steps(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance to the next number of `dtype`, away from zero."""
    outwards = torch.tensor(torch.inf, dtype=dtype)
    return torch.nextafter(weight.abs().to(dtype), outwards).float() - weight.abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_smaller_than_a_step_is_kept_on_average(dtype: torch.dtype) -> None:
    weight = grid(dtype).clamp(min=2**-13)  # away from where fp16's steps no longer shrink
    update = 0.1 * steps(weight, dtype)
    assert torch.equal((weight + update).to(dtype).float(), weight)  # rounded to nearest all of it is lost
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(merging.round_stochastically(weight, dtype, generator).float(), weight)  # what is exact stays
    signs = [1] * 50 + [-1] * 50
    draws = [merging.round_stochastically(weight + sign * update, dtype, generator).float() for sign in signs]
    moved = torch.stack([(draw - weight) / steps(weight, dtype) for draw in draws])
    assert moved[:50].mean() == pytest.approx(0.1, abs=0.005) and moved[50:].mean() == pytest.approx(-0.1, abs=0.005)
    assert set(moved.unique().tolist()) <= {-1.0, -0.5, 0.0, 1.0}  # neighbours only; below 2^n the step is half


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_yardstick_moves_weights_as_rounding_does(dtype: torch.dtype) -> None:
    weight = grid(dtype)
    assert torch.equal(proof.rounded_again({"w"}, dtype, 0)("other", weight), weight)
    drawn = (proof.rounded_again({"w"}, dtype, 0)("w", weight) - weight) / steps(weight, dtype)
    within = weight + torch.rand(len(weight)) * steps(weight, dtype)  # anywhere between two neighbours
    rounded = (merging.round_stochastically(within, dtype, torch.Generator()).float() - within) / steps(weight, dtype)
    assert torch.equal(drawn[:8], torch.zeros(8))
    for moved in (drawn[weight != 0], rounded[weight != 0]):
        assert moved.abs().max() <= 1 and moved.pow(2).mean() == pytest.approx(1 / 6, rel=0.06)


def test_an_int8_weight_is_unpacked_to_what_its_kernel_multiplies_with() -> None:
    torch.manual_seed(0)
    layer: Any = Linear8bitLt(64, 32, bias=True, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
    layer.to("cpu").train()  # on a CPU the training kernel leaves the activations alone
    x = torch.randn(7, 64)
    theirs = layer(x)
    torch.testing.assert_close(functional.linear(x, proof.dequantised(layer), layer.bias), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "tied"),
    [
        (["method=lora"], True),
        (["method=qlora4"], True),
        (["method=qlora8"], False),
        (["method=qlora4", "method.use_dora=true", "method.use_rslora=true", "method.modules_to_save=[norm]"], False),
        (["method=qlora8", "method.use_dora=true", "method.target_modules=[q_proj,down_proj]"], True),
        (["method=lora", "method.target_modules=[q_proj]", "method.modules_to_save=[embed_tokens]"], True),
        (["method=lora", "method.init=pissa", "train.precision=fp32"], True),
    ],
    ids=["lora", "qlora4", "qlora8", "dora4", "dora8", "embeddings", "pissa"],
)
def test_merged_is_base_and_adapter(words: list[str], tied: bool, train: Callable[..., Any], tmp_path: Path) -> None:
    finished, run = train(*tiny_llama.words(tmp_path, tied=tied), *ALL, *words)
    expected = exact(finished.model)
    target = tmp_path / "merged"
    facts = merge(run, target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    found = proof.agreement(expected, exact(loaded))
    assert facts["typical_difference"] <= facts["typical_bound"] and facts["max_difference"] <= facts["max_bound"]
    assert found.typical_difference <= 2 * facts["typical_bound"]  # other prompts than the run's: about as far apart
    assert facts["prompts"] == "held-out prompts" and facts["positions"] > 20 and facts["top1"] > 0.9
    untouched = AutoModelForCausalLM.from_pretrained(spec(run).model.id)
    assert proof.agreement(expected, exact(untouched)).typical_difference > 10 * facts["typical_bound"]

    config = json.loads((target / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert loaded.generation_config.eos_token_id == [1, 2] and loaded.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(target).chat_template == tiny_llama.TEMPLATE
    assert not list(target.glob("adapter*")) and not list(tmp_path.glob(".*"))


def packed_again(model: Any, dtype: torch.dtype) -> Any:
    """PEFT's own way: into the packed weight, which is packed anew; then unpacked as by transformers."""
    return model.merge_and_unload().dequantize(dtype)


def on_the_published_base(model: Any, dtype: torch.dtype) -> Any:
    """The common way: 16-bit weights that the adapter has never met."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=dtype)
    other = get_peft_model(plain, model.peft_config["default"])
    set_peft_model_state_dict(other, state)
    return other.merge_and_unload()


def without_adapter(model: Any, dtype: torch.dtype) -> Any:
    return model.unload().dequantize(dtype)


def test_a_wrong_merge_is_refused_and_leaves_nothing(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = train(*tiny_llama.words(tmp_path), *ALL, "method=qlora4")
    for wrong in (packed_again, on_the_published_base, without_adapter):

        def fold(model: Any, dtype: torch.dtype, wrong: Any = wrong) -> tuple[Any, set[str]]:
            merged = wrong(model, dtype)
            return merged, {name for name, _ in merged.named_parameters() if "_proj" in name}

        monkeypatch.setattr(merging, "fold", fold)
        with pytest.raises(RunFailedError, match="not base \\+ adapter"):
            merge(run, tmp_path / "merged")
        assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".*"))


def test_rounding_is_measured_again_before_a_merge_is_refused(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding sends one token of many to another expert, four draws may show nothing of it."""
    _, run = train(*tiny_llama.words(tmp_path), *ALL, "method=lora", "train.max_steps=2")
    kept, seeds = proof._rounded_once_more, []

    def drawn(*some: Any) -> proof.Agreement:
        seeds.append(some[-1])
        return kept(*some) if some[-1] >= least else proof.Agreement(0.0, 0.0, 1.0, 1)

    monkeypatch.setattr(proof, "_rounded_once_more", drawn)
    for least, expected in ((0, 4), (6, 7)):
        seeds.clear()
        merge(run, tmp_path / f"merged{least}")
        assert seeds == list(range(expected))
    least = 99
    with pytest.raises(RunFailedError, match="not base \\+ adapter"):
        merge(run, tmp_path / "merged")
    assert len(seeds) == 7 + proof.MOST_DRAWS


def test_the_command_merges_once_and_says_what_it_found(train: Callable[..., Any], tmp_path: Path) -> None:
    _, run = train(*tiny_llama.words(tmp_path), "method=lora", "eval.num_prompts=0", "train.max_steps=2")
    done = run_cli("merge", str(run.path), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["prompts"] == "fixed texts" and facts["folder"] == str(run.path / "merged")
    assert 0 < facts["typical_difference"] <= facts["typical_bound"] and facts["own_arithmetic"]["top1"] > 0.5
    again = runner("merge", str(run.path), "--json")
    assert again.exit_code == 2 and "merged exists" in again.stdout
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_whole_weights_have_nothing_to_merge(method: str, here: Path) -> None:
    run = RunDir.create(spec_of(f"method={method}", "hw=cpu", f"run.output_dir={here}"))
    answer = runner("merge", str(run.path))
    assert answer.exit_code == 2 and f"nothing to merge: method={method}" in answer.stderr


def test_a_run_without_an_adapter_says_its_state(here: Path) -> None:
    run = RunDir.create(spec_of("method=qlora4", "hw=cpu", f"run.output_dir={here}"))
    run.set_status("interrupted")
    answer = runner("merge", str(run.path))
    assert answer.exit_code == 2 and "interrupted" in answer.stderr
    assert "there is no run" in runner("merge", str(here / "nothing")).stderr


def test_nothing_is_left_of_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out in the middle of writing."""
    write(
        tmp_path / "killed.py",
        "import os, pathlib, signal, sys\n"
        "from runner.rundir.atomic_folder import whole\n"
        "with whole(pathlib.Path(sys.argv[4])) as folder:\n"
        "    (folder / 'half').write_text('a weight')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(worker_tasks, "MODULE", "killed")
    with pytest.raises(RunFailedError, match="SIGKILL"):
        worker_tasks.produce_in_worker("merge", RunDir(tmp_path), tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(RequestError, match=r"killed\.py exists"):
        worker_tasks.produce_in_worker("merge", RunDir(tmp_path), tmp_path / "killed.py")
