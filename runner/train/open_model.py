"""Load the model of a finished run on this machine's hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from runner.machine import detect, torch_build
from runner.rundir.directory import RunDir
from runner.spec import DeepSpeedSpec, Full, HardwareSpec, RunSpec
from runner.train import model_loading, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def local_spec(spec: RunSpec, say: Callable[[str], None] = lambda line: None) -> RunSpec:
    """`spec` as its model can be loaded here: on one GPU or the CPU, in arithmetic and attention that it has.

    `say` hears why GPUs that are there are not used.
    """
    hw = _hardware(spec.hw, say)
    train = {"precision": _precision(spec.train.precision, hw), "attention": spec.train.attention}
    if spec.train.attention.startswith("flash") and not (hw.flash_attention and train["precision"] != "fp32"):
        train["attention"] = "auto"
    method = spec.method
    if isinstance(method, Full):  # nothing trains: what was saved has 16 bits
        method = method.model_copy(update={"master_weights": False})
    changed = {"hw": hw, "method": method, "deepspeed": DeepSpeedSpec(name="none")}
    return spec.model_copy(update=changed | {"train": spec.train.model_copy(update=train)})


def _hardware(hw: HardwareSpec, say: Callable[[str], None]) -> HardwareSpec:
    """torch has the last word: only what it sees can be used."""
    machine = detect.detect()
    one = {"name": "local", "num_nodes": 1, "num_processes": None, "hostfile": None, "rendezvous": None, "env": {}}
    if torch.cuda.is_available():
        ampere = torch.cuda.get_device_capability(0) >= (8, 0)
        gpu = {"accelerator": "cuda", "num_gpus": 1, "bf16": ampere, "flash_attention": ampere}
        return hw.model_copy(update=one | gpu | {"gpu": torch.cuda.get_device_name(0)})
    for line in [*_unseen(machine), *machine.remarks]:
        say(f"On the CPU: {line}")
    cpu = {"accelerator": "cpu", "num_gpus": 0, "bf16": machine.cpu_bf16, "flash_attention": False, "gpu": None}
    return hw.model_copy(update=one | cpu | {"num_cpus": machine.num_cpus})


def _unseen(machine: detect.Machine) -> list[str]:
    """GPUs that the driver shows and torch does not."""
    if not machine.gpus:
        return []
    build = torch_build.installed_torch()
    reason = torch_build.why_not(build, machine.gpus, torch_build.driver()) if build else None
    why = f"torch {torch.__version__} does not see {machine}"
    return [f"{why}, {reason[0]}; {reason[1]}" if reason else f"{why}: python -m runner doctor looks for the reason"]


def _precision(trained: str, hw: HardwareSpec) -> str:
    """The run's own arithmetic, else this machine's: fp16 where a GPU has no bf16, fp32 where a CPU has neither."""
    if trained == "bf16" and not hw.bf16:
        return "fp16" if hw.accelerator == "cuda" else "fp32"
    return "fp32" if trained == "fp16" and hw.accelerator == "cpu" else trained


def load_finished(spec: RunSpec, run: RunDir, *, base: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a finished run, loaded as a user of plain transformers and peft would; an adapter's base
    stops where its template ends a turn. `spec` is the run's as `local_spec` gives it."""
    model, tokenizer = _loaded(spec, run, base=base)
    stop_tokens.align(model, tokenizer)
    return model, tokenizer


def _loaded(spec: RunSpec, run: RunDir, *, base: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = run.path / "model"
    if not spec.method.adapts and not base:
        elsewhere = {"package": None, "gguf_file": None, "revision": None, "from_scratch": False}
        tuned = spec.model_copy(update={"model": spec.model.model_copy(update=elsewhere | {"id": str(folder)})})
        return model_loading.load_model(tuned, str(folder)), AutoTokenizer.from_pretrained(folder)
    source = model_loading.source_of(spec.model)
    tokenizer = model_loading.load_tokenizer(spec, source)
    model = model_loading.load_model(spec, source)
    if base:
        return model, tokenizer
    return PeftModel.from_pretrained(model, str(folder)), tokenizer
