"""What is asked of a finished run: is it whole, does it go on as if nothing had been, does another program read it.

Every check is one number, how far apart two things are that should be equal, and a word where there is more to say.
Differences of losses are relative, those of weights absolute. All of it in one process, with plain transformers and
peft.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from runner.data.load import load_examples
from runner.data.loss_mask import IGNORED
from runner.errors import RequestError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import DataSpec, DeepSpeedSpec, Freeze, RunSpec
from runner.train import model_loading
from runner.train.export import export
from runner.train.merge.adapter import merge
from runner.train.model_loading import DTYPES
from runner.train.tokens import token_dataset

State = dict[str, torch.Tensor]
Answer = float | str | dict[str, str] | None
FAILED = "failed.txt"
"""A stack trace, left by `matrix_ranks` in the run directory."""


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def base(folder: Path, kind: str = "llama") -> Path:
    """A Llama with grouped-query attention and tied embeddings, 3 layers of width 64, 147,904 weights, and a
    tokenizer made from the demo's sentences; or a mixture of that size, with 4 experts of which a token meets 2."""
    disable_progress_bar()
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    examples, _ = load_examples(DataSpec(name="commands", source="commands"), 0)
    texts = (turn["content"] for example in examples for turn in (*example.prompt, *example.completion))
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<|im_end|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=1, eos_token_id=3,
        bos_token_id=None, **({} if kind == "llama" else EXPERTS | {"head_dim": 16}),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def weights(folder: Path) -> State:
    """What a model or adapter folder holds."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def apart(ours: State, theirs: State) -> float:
    """Largest absolute difference of any weight; infinite where names or shapes differ."""
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        return float("inf")
    return max(float((value.double() - theirs[name].double()).abs().max()) for name, value in ours.items())


def curves(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of any step's loss; infinite where steps are missing."""
    if len(ours) != len(theirs) or not ours:
        return float("inf")
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def losses(run: RunDir) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in run.metrics()]


def last_words(run: RunDir) -> str:
    """Why a run did not get to its end: the last line of its stack trace."""
    file = run.path / FAILED
    lines = file.read_text("utf-8").strip().splitlines() if file.is_file() else []
    return lines[-1] if lines else "ended without a message"


def answer(ask: Callable[[], float | str | None]) -> Answer:
    """What the check finds; its refusal, where the runner refuses; an error in words; None where there is no check."""
    try:
        return ask()
    except RequestError as error:
        return {"refused": re.sub(r"\S*/", "", error.problems[0].what)}  # without the folders of this machine
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"{type(error).__name__}: {first}"


def held_out(run: RunDir) -> dict[str, float]:
    """The loss that the run measured on held-out rows, before and after training."""
    measured = run.read("summary.json")["eval"]
    return {when: measured[when]["loss"] for when in ("before", "after")}


def trained(run: RunDir, plain: Sequence[float] | None) -> float | None:
    """Largest relative difference of a step's loss from `plain`, that of the same run without ZeRO. ValueError where
    it learned nothing."""
    loss = held_out(run)
    if not loss["after"] < loss["before"]:
        raise ValueError(f"the held-out loss went from {loss['before']} to {loss['after']}")
    return None if plain is None else curves(losses(run), plain)


def resumed(run: RunDir, again: RunDir) -> float | str:
    """Largest difference of any loss and any weight between a run and the same one, resumed half way."""
    if not (again.path / "summary.json").is_file():
        return last_words(run)
    return max(curves(losses(again), losses(run)), apart(weights(again.path / "model"), weights(run.path / "model")))


def alone(run: RunDir, single: RunDir) -> float | str:
    """Largest relative difference of a step's loss, and of the held-out loss, between two processes and one."""
    if not (single.path / "summary.json").is_file():
        return last_words(single)
    after = [[held_out(one)["after"]] for one in (run, single)]
    return max(curves(losses(run), losses(single)), curves(*after))


def saved(spec: RunSpec, run: RunDir, steps: Iterable[int]) -> float:
    """0 where every checkpoint is whole and `model/` holds what it should. ValueError with what is wrong: processes,
    files, names, numbers that are not finite, weights that should have trained and did not, or the other way round."""
    wrong = [] if run.read("environment.json")["processes"] == spec.hw.world_size else ["number of processes"]
    wrong += [] if checkpoints.complete(run) == list(steps) else [f"checkpoints are {checkpoints.complete(run)}"]
    for folder in (checkpoints.folder(run, step) for step in steps):
        wrong += [f"{folder.name}: {line}" for line in checkpoints.damage(folder)]
        if (folder / "latest").is_file() != (spec.deepspeed.name != "none"):
            wrong.append(f"{folder.name} is not of the stage that was asked for")
    state = weights(run.path / "model")
    wrong += [f"{name} is not finite" for name, value in state.items() if not value.isfinite().all()]
    wrong += _untrained(spec, state)
    if wrong:
        raise ValueError("; ".join(sorted(wrong)[:3]))
    return 0.0


def _untrained(spec: RunSpec, state: State) -> list[str]:
    """Weights that should have changed and did not, or should not and did; of an adapter, those that are zero."""
    if spec.method.adapts:
        return [f"{name} is zero" for name, value in state.items() if not value.any()]
    base = {name: value.to(DTYPES[spec.train.precision]) for name, value in weights(Path(spec.model.id)).items()}
    wrong = [f"{name} is in one of them only" for name in state.keys() ^ base.keys()]
    trains: tuple[str, ...] = ("model.",)
    if isinstance(spec.method, Freeze):
        trains = ("model.layers.1.", "model.layers.2.", *(f"model.{name}." for name in spec.method.extra_modules))
    for name in state.keys() & base.keys():
        if torch.equal(state[name], base[name]) == name.startswith(trains):
            wrong.append(f"{name} {'did not train' if name.startswith(trains) else 'was changed'}")
    return wrong


def reloaded(spec: RunSpec, run: RunDir) -> float:
    """Relative difference of the held-out loss: measured by the run, and by `model/` read back."""
    spec = spec.model_copy(update={"deepspeed": DeepSpeedSpec(name="none")})
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    if spec.method.adapts:
        model = PeftModel.from_pretrained(model_loading.load_model(spec, spec.model.id), str(run.path / "model"))
    else:
        model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    return abs(held_out_loss(spec, model, tokenizer) / held_out(run)["after"] - 1)


def held_out_loss(spec: RunSpec, model: Any, tokenizer: Any) -> float:
    """As a run measures it, a mean over the labels, but every document alone: in one sequence of its own, where the run
    had packed several into one."""
    total, count = 0.0, 0
    model.eval()
    for row in token_dataset.tokenise(load_examples(spec.data, spec.train.seed)[1], tokenizer, spec).rows:
        ends = torch.tensor(row.get("seq_lengths", [len(row["input_ids"])])).cumsum(0).tolist()
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            ids, labels = (torch.tensor([row[key][begin:end]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != IGNORED).sum())
    return total / count


def exported(spec: RunSpec, run: RunDir, step: int, target: Path) -> float:
    """Largest difference between `model/` and what `export` makes of the last checkpoint."""
    export(spec, run, step, target, _silent)
    return apart(weights(target), weights(run.path / "model"))


def merged(spec: RunSpec, run: RunDir, target: Path) -> float | None:
    """Largest difference of a logit of the merged model as a share of what its rounding to 16 bits explains; None
    without an adapter."""
    if not spec.method.adapts:
        return None
    facts = merge(spec, run, target, _silent)
    return float(facts["typical_difference"] / facts["typical_bound"])


_silent: Callable[[str], None] = lambda line: None  # noqa: E731  # one line
