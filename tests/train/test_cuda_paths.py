"""What a run on GPUs would be given, asserted on a machine without one: weights, environment, arithmetic, clocks."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from runner.cloud.agent import install
from runner.cloud.provider import PodRequest
from runner.cloud.runpod.json_types import request_body
from runner.errors import CannotRunError, RequestError
from runner.launcher import local, torchrun
from runner.machine import detect, gpus, kernels, torch_build
from runner.machine.detect import Machine
from runner.machine.gpus import Gpu, Unusable
from runner.machine.torch_build import Driver, Torch
from runner.plan.autograd.attention import mask
from runner.plan.autograd.head import embed
from runner.plan.autograd.ops import Block, LayerKind
from runner.plan.autograd.tape import Tape
from runner.plan.choose_stage import job_of
from runner.plan.memory import setting_of
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.report.failure_causes import cause_of
from runner.report.progress import Progress
from runner.report.tables import headline
from runner.resolve import plan_inputs
from runner.rundir.directory import RunDir
from runner.spec import RunPodPlace, RunSpec
from runner.train import chat, model_loading, open_model, trainable_weights
from runner.train.distributed import Ranks
from runner.train.objectives import objective_of
from runner.train.trainers import callbacks, trainer_settings
from runner.train.trainers.loss_guard import LossGuard
from tests.conftest import spec_of, train_here
from tests.machine.test_hardware import H100, T4, V100, fake_nvml, put_nvidia_smi, root_with
from tests.support import preferences, tiny_llama
from tests.support.front import LAPTOP

EIGHT = tuple(replace(H100, uuid=f"GPU-{number}") for number in range(8))
MACHINES = {
    "h100": ("hw=h100",), "h100x3 zero3": ("hw=h100x3", "deepspeed=zero3"), "t4": ("hw=t4",), "v100": ("hw=v100",),
    "rtx4090x2": ("hw=rtx4090x2", "deepspeed=none"),
}  # fmt: skip
METHODS = ("full", "freeze", "lora", "qlora4", "qlora8")
FP32_IN_TF32 = ("train.precision=fp32", "train.tf32=true")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def on(*words: str) -> RunSpec:
    """A resolved run for hardware that this machine need not have."""
    spec: RunSpec = spec_of("model=smollm2_135m", *words)
    return spec


def machine(*found: Gpu, **facts: Any) -> Machine:
    return replace(LAPTOP, gpus=found, **facts)


def seen(monkeypatch: pytest.MonkeyPatch, of: Machine) -> None:
    monkeypatch.setattr(detect, "detect", lambda: of)


# ── loading ────────────────────────────────────────────────────────────────────────────────────


class Asked(Exception):
    """`from_pretrained` was called: nothing is loaded."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that `from_pretrained` gets."""
    found: dict[str, Any] = {}

    def record(source: str, **arguments: Any) -> None:
        found.update(arguments)
        raise Asked

    for kind in (model_loading.AutoModelForCausalLM, model_loading.AutoModelForSequenceClassification):
        monkeypatch.setattr(kind, "from_pretrained", record)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MACHINES)
def test_from_pretrained_gets_what_the_machine_computes_with(
    name: str, method: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = "zero3" in name
    if sharded and method == "qlora8":  # bitsandbytes' 8 bits are not sharded
        with pytest.raises(RequestError, match=r"8-bit|8 bits|qlora8|QLoRA"):
            on(*MACHINES[name], f"method={method}")
        return
    monkeypatch.setenv("LOCAL_RANK", "1" if "x" in name else "0")
    spec = on(*MACHINES[name], f"method={method}")
    with pytest.raises(Asked):
        model_loading.load_model(spec, "somewhere")
    width = FP16 if name in ("t4", "v100") else BF16
    packing = asked.pop("quantization_config", None)
    assert asked.pop("dtype") == (FP32 if method == "full" and not sharded else width)
    assert asked == {
        "attn_implementation": None,  # varlen takes its place when the model is there
        "revision": spec.model.revision,
        # ZeRO-3 shards as it loads; every other process fills the GPU that is its own.
        **({} if sharded else {"device_map": {"": 1 if "x" in name else 0}}),
    }
    assert (packing is not None) == method.startswith("qlora")
    if method == "qlora4":
        assert (packing.bnb_4bit_compute_dtype, packing.bnb_4bit_quant_storage) == (width, width)
        assert (packing.bnb_4bit_quant_type, packing.bnb_4bit_use_double_quant) == ("nf4", True)
    if method == "qlora8":
        assert (packing.load_in_8bit, packing.llm_int8_threshold) == (True, 6.0)


def test_flash_attention_is_refused_in_fp32_where_it_was_asked_for() -> None:
    with pytest.raises(RequestError, match="has kernels for 16 bits alone"):
        on("hw=h100", "train.precision=fp32", "train.attention=flash_attention_2")


# ── the trainer's arguments ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("installed", [True, False])
def test_trainer_arguments(name: str, installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "has_liger", lambda: installed)
    spec = on(*MACHINES[name])
    found = trainer_settings.shared_settings(spec, RunDir(tmp_path), 10, [])
    half = name in ("t4", "v100")
    assert (found["bf16"], found["fp16"], found["use_cpu"]) == (not half, half, False)
    assert found["dataloader_pin_memory"] is True
    assert found["activation_checkpointing"] is bool(spec.train.gradient_checkpointing)
    assert found["optim"] == "adamw_torch_fused"
    # `train.liger=auto`: "on a GPU where liger-kernel is installed"; not its loss, beside TRL's own head.
    assert found["use_liger_kernel"] is installed
    assert found["liger_kernel_config"] == ({"fused_linear_cross_entropy": False} if installed else None)


def test_tf32_is_torchs_own_setting_unless_asked_for(tmp_path: Path) -> None:
    for words, expected in (((), None), (("train.precision=fp32",), None), (FP32_IN_TF32, True)):
        found = trainer_settings.shared_settings(on("hw=h100", *words), RunDir(tmp_path), 10, [])
        assert found["tf32"] is expected


def test_the_plan_counts_and_names_tf32() -> None:
    words = ("model=llama3_8b", "method=lora", "hw=h100", "train.micro_batch_size=1")
    runs = [spec_of(*words, *more) for more in (("train.precision=fp32",), FP32_IN_TF32)]
    plain, fast = (plan_inputs.plan(run, []) for run in runs)
    assert (plain.precision, fast.precision) == ("fp32", "tf32")
    assert plain.step_seconds and fast.step_seconds and fast.step_seconds < plain.step_seconds / 2
    assert plain.peak_gib == fast.peak_gib
    assert ", tf32, " in headline(on("hw=h100", *FP32_IN_TF32), "here")


def test_liger_is_off_on_a_cpu_and_refused_there_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "has_liger", lambda: True)
    assert trainer_settings.shared_settings(on("hw=cpu"), RunDir(tmp_path), 10, [])["use_liger_kernel"] is False
    assert trainer_settings.shared_settings(on("hw=h100", "train.liger=false"), RunDir(tmp_path), 10, [])[
        "use_liger_kernel"
    ] is (False)
    with pytest.raises(RequestError, match=r"train\.liger=true needs a GPU"):
        on("hw=cpu", "train.liger=true")


def test_liger_is_off_for_a_model_that_it_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patches = tmp_path / "liger_kernel" / "transformers" / "monkey_patch.py"
    patches.parent.mkdir(parents=True)
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    patches.write_text('MODEL_TYPE_TO_APPLY_LIGER_FN = {\n    "llama": apply_liger_kernel_to_llama,\n}\n')
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(architecture: str | None, liger: str = "auto") -> RunSpec:
        spec = on("hw=h100", f"train.liger={liger}")
        return spec.model_copy(update={"model": spec.model.model_copy(update={"architecture": architecture})})

    assert [kernels.liger(of(name)) for name in ("llama", "opt", None)] == [True, False, True]
    seen(monkeypatch, machine(H100))
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0", (13, 0)))
    monkeypatch.setattr(torch_build, "driver", lambda: Driver("580.82", (13, 0)))
    monkeypatch.setattr(kernels, "no_compiler", lambda: None)
    local.check_installed_torch(of("llama", "true"))
    with pytest.raises(CannotRunError, match="the installed liger-kernel has no kernels for opt models"):
        local.check_installed_torch(of("opt", "true"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def trainer_of(spec: RunSpec, other: RunSpec | None = None) -> Any:
    """The trainer of a run on this CPU; `other` is what it is told to compute with."""
    run = RunDir.create(spec)
    objective = objective_of(other or spec)
    examples = objective_of(spec).read()
    source = model_loading.source_of(spec.model)
    tokenizer = model_loading.load_tokenizer(spec, source)
    tokenised = objective_of(spec).tokenise_all(examples, tokenizer)
    told = other or spec
    model = model_loading.load_to_train(told, source, tokenizer)
    trainable_weights.mark_trainable(told, model)
    guard = LossGuard(spec.train, run, Ranks(), lambda line: None)
    settings = objective_of(spec).trainer_settings(run, 6, [])
    return objective.build_trainer(source, model, tokenizer, tokenised, args=settings, guard=guard)


# ── attention masks ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_plan_counts_the_mask_that_the_model_makes(packed: bool, attention: str, method: str, folder: Path) -> None:
    """Of a batch by the trainer's own collator: packed rows of two documents each, or rows of which one is full."""
    words = f"method={method}", f"train.attention={attention}", f"train.packing={str(packed).lower()}"
    found: Any = None
    for b, s in ((1, 32), (2, 32), (3, 32), (4, 16)):
        batch = f"train.max_length={s}", f"train.micro_batch_size={b}", f"train.batch_size={b}"
        spec = spec_of(*tiny_llama.words(folder), *words, *batch)
        found = found or trainer_of(spec)
        lengths = [s if packed or not row else s - row for row in range(b)]
        extra = {"seq_lengths": [5, s - 5]} if packed else {}
        real = mask_made(spec, found, [{"input_ids": [4] * n, "labels": [4] * n, **extra} for n in lengths])
        shape = shape_of(spec.model)
        training = training_of(shape, spec.method, "bf16", deepspeed=False)
        block = Block(Tape(), shape, setting_of(training, job_of(spec), b))
        hidden, _ = embed(block, LayerKind(training.trains.embedding), needs_grad=False)
        counted = [storage.size for storage in mask(block, hidden.width)]
        if real is None:  # without padding SDPA is told that the row is causal: the plan has the mask of a padded one
            assert (attention, packed, b) == ("sdpa", False, 1)
            continue
        assert counted == [real.numel() * real.element_size()], (b, s, real.shape)


def mask_made(spec: RunSpec, found: Any, rows: list[dict[str, Any]]) -> torch.Tensor | None:
    """The mask that the first layer gets when the trainer computes the loss of a batch of these rows."""
    made: list[Any] = []
    layer = next(module for name, module in found.model.named_modules() if name.endswith("layers.0"))
    hook = layer.register_forward_pre_hook(lambda _, args, more: made.append(more["attention_mask"]), with_kwargs=True)
    found.model.eval()  # whose loss the guard does not look at
    with torch.no_grad(), trainer_settings.autocast(spec):
        found.compute_loss(found.model, found.data_collator(rows))
    hook.remove()
    (mask,) = made
    return mask


# ── fp16: nothing that trains has 16 bits ──────────────────────────────────────────────────────

SAVED = "method.modules_to_save=[embed_tokens,lm_head]"
TRAINED = [
    ("sft", "method=lora"), ("sft", "method=lora", SAVED), ("sft", "method=lora", "method.use_dora=true"),
    ("sft", "method=lora", "method.init=pissa"), ("sft", "method=qlora4"), ("sft", "method=qlora4", SAVED),
    ("sft", "method=qlora4", "method.use_dora=true"), ("sft", "method=qlora8"), ("sft", "method=freeze"),
    ("sft", "method=full"), ("sft", "method=qlora4", 'data.add_tokens=["<x>"]'), ("dpo", "method=qlora4"),
    ("dpo", "method=qlora4", "objective.loss=simpo"), ("kto", "method=qlora4"), ("orpo", "method=qlora4"),
    ("reward", "method=lora"), ("reward", "method=qlora4"), ("reward", "method=freeze"), ("grpo", "method=qlora4"),
]  # fmt: skip


def built(folder: Path, words: tuple[str, ...]) -> Any:
    """The trainer of a run in fp16, on the CPU: what is looked at is the width of its weights."""
    objective, *more = words
    rows = {"grpo": ("objective.num_generations=2", "objective.max_new_tokens=4")}.get(objective, ())
    spec = spec_of(*preferences.words(folder, f"objective={objective}", "train.packing=false", *rows, *more))
    return trainer_of(spec, spec.model_copy(update={"train": spec.train.model_copy(update={"precision": "fp16"})}))


@pytest.mark.parametrize("words", TRAINED, ids=" ".join)
def test_what_trains_under_fp16_is_fp32(words: tuple[str, ...], folder: Path) -> None:
    found = built(folder, words)
    widths = {name: p.dtype for name, p in found.model.named_parameters() if p.requires_grad}
    assert widths and set(widths.values()) == {FP32}, widths
    if words[1] != "method=full":
        assert FP16 in {p.dtype for p in found.model.parameters()}  # the base stays as narrow as it was


def test_an_adapter_that_is_resumed_in_fp16_stays_fp32(folder: Path, tmp_path: Path) -> None:
    found = built(folder, ("sft", "method=qlora4"))
    found.model.save_pretrained(tmp_path)
    found._load_from_checkpoint(str(tmp_path))
    assert {p.dtype for p in found.model.parameters() if p.requires_grad} == {FP32}


def test_under_deepspeed_a_bf16_adapter_becomes_fp16_which_it_scales_itself() -> None:
    spec = on("hw=v100x8", "method=qlora4", "deepspeed=zero3")
    model = torch.nn.Linear(2, 2, dtype=BF16)
    trainable_weights.set_training_dtype(spec, model)
    assert {p.dtype for p in model.parameters()} == {FP16}


def test_the_plan_counts_the_width_that_trains() -> None:
    def widths(*words: str) -> tuple[int, int]:
        spec = on(*words)
        found = training_of(shape_of(spec.model), spec.method, spec.train.precision, deepspeed=False)
        return found.adapter_width, found.trained_width

    assert widths("hw=t4", "method=qlora4", SAVED) == (4, 4)
    assert widths("hw=t4", "method=lora", SAVED) == (4, 4)
    assert widths("hw=h100", "method=qlora4", SAVED) == (2, 2)


# ── clocks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose work takes 10 s and is only waited for by `torch.cuda.synchronize`."""
    said: list[str] = []
    now = [100.0]

    def wait() -> None:
        said.append("synchronize")
        now[0] += 10.0 if len(said) % 2 == 0 else 0.0

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    return said


def test_a_step_takes_as_long_as_the_gpu_needs(launches: list[str], tmp_path: Path) -> None:
    writer = callbacks.MetricsWriter(None, RunDir(tmp_path), Progress(Console(quiet=True)))
    writer.on_step_begin(None, None, None)
    writer.on_step_end(None, None, None)
    assert (writer.seconds, launches) == (10.0, ["synchronize", "synchronize"])


def test_without_a_gpu_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("there is no GPU"))
    assert callbacks.clock() > 0


# ── environment ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "setting", "shown"),
    [
        (("hw=h100",), None, "0"),
        (("hw=h100x3", "deepspeed=zero3"), None, "0,1,2"),
        (("hw=h100x8", "deepspeed=zero3"), None, None),  # nothing to hide
        (("hw=h100",), "4,5", "4"),
        (("hw=h100x3", "deepspeed=zero3"), "7, 5,3,1", "7,5,3"),
        (("hw=h100",), "GPU-3,GPU-4", "GPU-3"),
        (("hw=h100", "hw.env.CUDA_VISIBLE_DEVICES='6,7'"), None, "6"),
    ],
)
def test_the_processes_see_exactly_the_gpus_of_the_run(
    words: tuple[str, ...], setting: str | None, shown: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(*EIGHT))
    there = detect.detect(root_with(tmp_path, dev__nvidiactl=""))
    spec = on(*words)
    seen(monkeypatch, there)
    environment = torchrun.process_environment(spec)
    assert environment.get("CUDA_VISIBLE_DEVICES") == (shown if shown is not None else setting)
    chosen = setting is None and shown is not None and "hw.env" not in words[-1]
    assert environment.get("CUDA_DEVICE_ORDER") == ("PCI_BUS_ID" if chosen else None)


@pytest.mark.parametrize(("setting", "names"), [("5,1", 2), ("", 0), (" , ", 0)])
def test_fewer_gpus_in_hw_env_than_the_run_has_processes_are_refused(
    setting: str, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(monkeypatch, machine(*EIGHT))
    spec = on("hw=h100x3", "deepspeed=zero3", f"hw.env.CUDA_VISIBLE_DEVICES='{setting}'")
    with pytest.raises(CannotRunError, match=f"needs 3 GPUs, and hw.env.CUDA_VISIBLE_DEVICES={setting} names {names}"):
        local.check_here(spec)


def test_gpus_that_will_do_are_named_where_the_first_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, machine(T4, *EIGHT[:3]))
    with pytest.raises(CannotRunError) as caught:
        local.check_here(on("hw=h100x3", "deepspeed=zero3"))
    assert "export CUDA_VISIBLE_DEVICES=GPU-0,GPU-1,GPU-2 " in str(caught.value.problems[0].remedy)
    seen(monkeypatch, machine(T4, H100))
    with pytest.raises(CannotRunError) as caught:
        local.check_here(on("hw=h100x3", "deepspeed=zero3"))
    assert "CUDA_VISIBLE_DEVICES" not in str(caught.value.problems[0].remedy)


def test_one_dead_gpu_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = look(monkeypatch, tmp_path, nvml_of(*EIGHT[:4], dead=2))
    assert [gpu.uuid for gpu in there.gpus] == ["GPU-0", "GPU-1", "GPU-3"]
    assert "GPU 2 does not answer: GPU is lost" in str(there)
    monkeypatch.setattr(detect, "detect", lambda: there)
    spec = on("hw=local", "deepspeed=none")
    assert (spec.hw.accelerator, spec.hw.num_gpus) == ("cuda", 3)
    assert torchrun.process_environment(spec)["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1,GPU-3"


def test_a_dead_gpu_that_was_named_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    there = look(monkeypatch, tmp_path, nvml_of(*EIGHT[:4], dead=2))
    assert [gpu.uuid for gpu in there.gpus] == ["GPU-3"]
    monkeypatch.setattr(detect, "detect", lambda: there)
    assert torchrun.process_environment(on("hw=local"))["CUDA_VISIBLE_DEVICES"] == "GPU-3"


@pytest.mark.parametrize(
    ("files", "variable", "value"),
    [
        ({}, None, "expandable_segments:True"),
        ({"dev__dxg": ""}, None, None),  # Windows' subsystem for Linux
        ({"proc__sys__kernel__osrelease": "5.15.167.4-microsoft-standard-WSL2\n"}, None, None),
        ({}, "PYTORCH_CUDA_ALLOC_CONF", None),  # torch's older name, which ours would hide
    ],
)
def test_expandable_segments(
    files: dict[str, str], variable: str | None, value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:64")
    wsl = gpus.is_wsl(root_with(tmp_path, **files))
    monkeypatch.setattr(gpus, "is_wsl", lambda: wsl)
    seen(monkeypatch, machine(H100))
    assert torchrun.process_environment(on("hw=h100")).get("PYTORCH_ALLOC_CONF") == value


# ── GPUs of other kinds ────────────────────────────────────────────────────────────────────────


def nvml_of(*found: Gpu, dead: int | None = None, unified: bool = False, slices: int | None = None) -> types.ModuleType:
    """NVML of a machine with a GPU that fell off the bus, with unified memory, or with MIG on."""
    module = fake_nvml(*found)
    plain = dict(vars(module))

    def error(code: int, text: str) -> Exception:
        made: Exception = plain["NVMLError"](text)
        made.value = code
        return made

    def handle(index: int) -> Any:
        if index == dead:
            raise error(15, "GPU is lost")
        return plain["nvmlDeviceGetHandleByIndex"](index)

    def memory(of: Any) -> Any:
        if unified:
            raise error(3, "Not Supported")
        return plain["nvmlDeviceGetMemoryInfo"](of)

    def part(of: Any, number: int) -> Gpu:
        if number >= (slices or 0):
            raise error(6, "Not Found")
        return Gpu(f"{of.name} MIG 3g.40gb", f"MIG-{number}", 39.25, of.compute_capability)

    vars(module).update(nvmlDeviceGetHandleByIndex=handle, nvmlDeviceGetMemoryInfo=memory)
    if slices is not None:
        vars(module).update(
            nvmlDeviceGetMigMode=lambda of: (1, 1), nvmlDeviceGetMaxMigDeviceCount=lambda of: 7,
            nvmlDeviceGetMigDeviceHandleByIndex=part,
        )  # fmt: skip
    return module


def look(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvml: types.ModuleType | None, **files: str) -> Machine:
    (tmp_path / "bin").mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return detect.detect(root_with(tmp_path, **(files or {"dev__nvidiactl": ""})))


GB10 = Gpu("GB10", "GPU-spark", 0.0, 12.1)


def test_unified_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = look(monkeypatch, tmp_path, nvml_of(GB10, unified=True))
    assert there.gpus == (replace(GB10, memory_gib=64.0, unified=True),)
    monkeypatch.setattr(detect, "detect", lambda: there)
    hw = on("hw=local").hw
    assert (hw.accelerator, hw.num_gpus, hw.memory_gib, hw.bf16) == ("cuda", 1, 64.0, True)


@pytest.mark.parametrize("said", ["[N/A]", "[Not Supported]", "Not Supported"])
def test_unified_memory_by_nvidia_smi(said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    put_nvidia_smi(tmp_path, f"echo 'NVIDIA GB10, GPU-spark, {said}, 12.1'")
    assert look(monkeypatch, tmp_path, None).gpus == (replace(GB10, memory_gib=64.0, unified=True),)


def test_a_dead_gpu_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    lost = "echo 'Unable to determine the device handle for GPU1: 0000:3B:00.0: GPU is lost'"
    put_nvidia_smi(tmp_path, f"echo 'NVIDIA H100 80GB HBM3, GPU-cc33, 81559, 9.0'; {lost}; exit 15")
    there = look(monkeypatch, tmp_path, None)
    assert there.gpus == (H100,)
    assert "GPU 1 does not answer" in str(there) and not there.by_number


def test_mig_slices_are_gpus_of_which_a_run_takes_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = look(monkeypatch, tmp_path, nvml_of(H100, slices=2))
    assert [(gpu.uuid, gpu.memory_gib) for gpu in there.gpus] == [("MIG-0", 39.25), ("MIG-1", 39.25)]
    monkeypatch.setattr(detect, "detect", lambda: there)
    spec = on("hw=local")
    assert (spec.hw.num_gpus, spec.hw.memory_gib) == (1, 39.25)
    assert torchrun.process_environment(spec)["CUDA_VISIBLE_DEVICES"] == "MIG-0"
    two = on("hw=local", "hw.num_gpus=2")
    assert "NCCL joins no MIG slices" in str(detect.why_not_here(two.hw, there))


@pytest.mark.parametrize(("setting", "uuids"), [("MIG-1", ["MIG-1"]), ("0", ["MIG-0"]), ("MIG-", []), ("MIG-9", [])])
def test_a_slice_that_was_named(
    setting: str, uuids: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [gpu.uuid for gpu in look(monkeypatch, tmp_path, nvml_of(H100, slices=2)).gpus] == uuids


def test_mig_slices_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    listed = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-cc33)\n  MIG 3g.40gb     Device  0: (UUID: MIG-aa)\n"
        "  MIG 1g.10gb     Device  1: (UUID: MIG-bb)"
    )
    rows = "NVIDIA H100 80GB HBM3, GPU-cc33, 81559, 9.0"
    put_nvidia_smi(tmp_path, f'if [ "$1" = -L ]; then echo "{listed}"; else echo "{rows}"; fi')
    found = look(monkeypatch, tmp_path, None).gpus
    assert [(gpu.uuid, gpu.name, gpu.memory_gib) for gpu in found] == [
        ("MIG-aa", "H100 80GB HBM3 MIG 3g.40gb", 38.0), ("MIG-bb", "H100 80GB HBM3 MIG 1g.10gb", 9.5),
    ]  # fmt: skip


def test_mig_without_a_slice_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = look(monkeypatch, tmp_path, nvml_of(H100, slices=0))
    (one,) = there.unusable
    assert there.gpus == () and "MIG is on, and no slice of it is here" in one.what and "-cgi 0 -C" in one.remedy


def broken_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return look(monkeypatch, tmp_path, fake_nvml(H100, init_fails=True))


@pytest.mark.parametrize(
    ("files", "system", "what"),
    [
        ({"dev__kfd": ""}, ("Linux", "x86_64"), "an AMD GPU (ROCm) is not used"),
        ({"proc__x": ""}, ("Darwin", "arm64"), "Apple's GPU (MPS) is not used"),
        ({"proc__x": ""}, ("Darwin", "x86_64"), None),
        ({"proc__x": ""}, ("Linux", "x86_64"), None),
    ],
)
def test_what_is_not_nvidias_is_named(
    files: dict[str, str], system: tuple[str, str], what: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpus.platform, "system", lambda: system[0])
    monkeypatch.setattr(gpus.platform, "machine", lambda: system[1])
    there = look(monkeypatch, tmp_path, None, **files)
    assert [one.what.partition(":")[0] for one in there.unusable] == ([what] if what else [])
    assert (f"{what}" in str(there)) == bool(what)
    local._check_gpus()  # the CPU it is, and a note says so


def test_the_cpu_never_takes_the_place_of_a_broken_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = broken_driver(monkeypatch, tmp_path)
    monkeypatch.setattr(detect, "detect", lambda: there)
    with pytest.raises(CannotRunError) as caught:
        local.check_here(on("hw=local"))
    (problem,) = caught.value.problems
    assert "does not answer: Driver/library version mismatch" in problem.what
    assert str(problem.remedy).endswith("hw=cpu")
    local.check_here(on("hw=cpu"))
    monkeypatch.setattr(detect, "detect", lambda: replace(there, visible_devices=""))  # GPUs are hidden on purpose
    local.check_here(on("hw=local"))


def test_notes_of_a_run_name_what_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.config.command_line import Request
    from runner.resolve.steps import resolved

    amd = Unusable("an AMD GPU is not used", "hw=cpu")
    seen(monkeypatch, machine(unusable=(amd,)))
    assert str(amd) in resolved(Request(overrides=("hw=local",)))[1]
    assert str(amd) not in resolved(Request(overrides=("hw=cpu",)))[1]
    seen(monkeypatch, machine(visible_devices="9", num_hidden_gpus=4))
    notes = resolved(Request(overrides=("hw=local",)))[1]
    assert "CUDA_VISIBLE_DEVICES=9 hides all 4 GPUs: the run is on the CPU" in notes


# ── torch's build ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gpu", "build", "driver", "what", "remedy"),
    [
        (H100, (13, 0), Driver("550.54.15", (12, 4)), "the driver serves CUDA 12.4", "index-url .*whl/cu126"),
        (H100, (13, 0), Driver("570.86", None), "the driver is 570.86", "install driver 580"),
        (V100, (13, 0), Driver("580.82", (13, 0)), "without kernels for Tesla V100", "index-url .*whl/cu126"),
        (Gpu("B200", "GPU-b", 179.0, 10.0), (13, 0), Driver("570.86", (12, 8)), "serves CUDA 12.8", "whl/cu129"),
        (Gpu("P100", "GPU-p", 16.0, 6.0), (12, 8), Driver("570.86", (12, 8)), "without kernels for P100", "whl/cu126"),
        (Gpu("Tesla K80", "GPU-k", 11.2, 3.7), (12, 6), Driver("560.35", (12, 6)), "for Tesla K80", "^no build has"),
        (Gpu("B200", "GPU-b", 179.0, 10.0), (10, 2), Driver("580.82", (13, 0)), "for B200", "CUDA 12.8 or later"),
        (H100, None, Driver("580.82", (13, 0)), "a CPU build, which does not see the GPUs", "CUDA build"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_refused_before_anything_starts(
    gpu: Gpu, build: Any, driver: Driver, what: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(monkeypatch, machine(gpu))
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0", build))
    monkeypatch.setattr(torch_build, "driver", lambda: driver)
    with pytest.raises(CannotRunError) as caught:
        local.check_here(on("hw=local"))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert re.search(remedy, str(problem.remedy))


@pytest.mark.parametrize(
    ("words", "tools", "missing"),
    [
        ((), (), "no C compiler"), ((), ("gcc",), None), ((), ("clang",), None),
        (("objective=dpo",), (), "no C compiler"),
        (("objective=orpo",), (), None),  # whose trainer has no Triton in it
    ],
)  # fmt: skip
def test_a_run_that_triton_compiles_for_needs_a_c_compiler(
    words: tuple[str, ...], tools: tuple[str, ...], missing: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen(monkeypatch, machine(H100))
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0", (13, 0)))
    monkeypatch.setattr(torch_build, "driver", lambda: Driver("580.82", (13, 0)))
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    for tool in tools:
        (tmp_path / tool).touch(0o755)
    packing = ("train.packing=false", "data=file", "data.path=x.jsonl") if words else ()
    spec = on("hw=local", *words, *packing)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if missing is None:
        local.check_installed_torch(spec)
        return
    with pytest.raises(CannotRunError, match=missing):
        local.check_installed_torch(spec)
    (tmp_path / "gcc").touch(0o755)
    (tmp_path / "Python.h").unlink()
    with pytest.raises(CannotRunError, match="no header files of Python"):
        local.check_installed_torch(spec)


@pytest.mark.parametrize(
    ("gpu", "words", "refused"),
    [
        (Gpu("Tesla P100-PCIE-16GB", "GPU-p", 16.0, 6.0), (), True),
        (Gpu("GeForce GTX 1080 Ti", "GPU-g", 11.0, 6.1), ("method=qlora4",), True),
        (Gpu("Tesla P100-PCIE-16GB", "GPU-p", 16.0, 6.0), ("objective=orpo",), False),  # no Triton in its trainer
        (V100, (), False), (T4, (), False),
    ],
)  # fmt: skip
def test_a_gpu_that_triton_does_not_compile_for_is_refused(
    gpu: Gpu, words: tuple[str, ...], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(monkeypatch, machine(gpu))
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0+cu126", (12, 6)))
    monkeypatch.setattr(torch_build, "driver", lambda: Driver("560.35", (12, 6)))
    monkeypatch.setattr(kernels, "no_compiler", lambda: None)
    rows = ("train.packing=false", "data=file", "data.path=x.jsonl") if "objective=orpo" in words else ()
    spec = on("hw=local", *words, *rows)
    if not refused:
        local.check_installed_torch(spec)
        return
    with pytest.raises(CannotRunError, match=f"Triton compiles, and it has none for {gpu.name}"):
        local.check_installed_torch(spec)


def test_doctor_names_the_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runner.doctor import software

    monkeypatch.setattr(software, "installed_torch", lambda: Torch("2.13.0", (13, 0)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = [
        f for f in software.software_findings(machine(H100), Driver("580.82", (13, 0)), None) if f.name == "compiler"
    ]
    assert found[0].state == "problem" and "no C compiler (gcc or clang)" in found[0].found
    assert not [f for f in software.software_findings(machine(), None, None) if f.state == "problem"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12040).",
            "the NVIDIA driver is too",
        ),
        ("CUDA driver version is insufficient for CUDA runtime version", "the NVIDIA driver is too old"),
        ("Error 804: forward compatibility was attempted on non supported HW", "the NVIDIA driver is too old"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8", "the NVIDIA driver is too old"),
        ("CUDA error: no kernel image is available for execution on the device", "torch was not built for this GPU"),
        (
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable",
            "Triton has to compile",
        ),
        ("ncclUnhandledCudaError: Cuda failure 2 'out of memory'", "the GPU's memory was full"),
        ("ncclUnhandledCudaError: Call to CUDA function failed", "NCCL failed"),
        ("ncclUnhandledCudaError\nLast error:\nFailed to CUDA calloc 608 bytes", "the GPU's memory was full"),
        (
            "ncclSystemError\nError while creating shared memory segment /dev/shm/nccl-a (size 33030528), error: No "
            "space left on device (28)",
            "there is too little shared memory",
        ),
        ("cuInit: 802, system not yet initialized", "the service of the machine's NVSwitches"),
        ("ImportError: libcudart.so.12: cannot open shared object file: No such file or directory", "a library is mis"),
    ],
)
def test_known_causes_on_gpus(words: str, what: str) -> None:
    cause = cause_of(words)
    assert cause is not None and cause.what.startswith(what)


# ── a finished run, at home ────────────────────────────────────────────────────────────────────


SHOWN = "data.chat_template=chatml"  # whose turns can be told apart


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunSpec, RunDir]]:
    """Finished runs of three methods, whose specs then say that they trained on a pod."""
    found = {}
    for method in ("full", "lora", "qlora4"):
        folder = tmp_path_factory.mktemp(method)
        words = [*tiny_llama.words(folder), f"method={method}", "train.max_steps=2", "eval.num_prompts=2", SHOWN]
        spec = spec_of(*words, f"run.output_dir={folder / 'runs'}", "eval.max_new_tokens=4")
        _, run = train_here(spec)
        found[method] = spec, run
    return found


def of_a_pod(spec: RunSpec, hw: str, stage: str = "none", **train: Any) -> RunSpec:
    pod = spec_of(f"hw={hw}", f"deepspeed={stage}")
    return spec.model_copy(update={
        "hw": pod.hw, "deepspeed": pod.deepspeed, "train": spec.train.model_copy(update=train),
    })  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "qlora4"])
@pytest.mark.parametrize(
    ("hw", "stage", "train"),
    [
        ("h100", "none", {"attention": "auto"}),
        ("h100x3", "zero3", {"attention": "flash_attention_2"}),
        ("t4", "none", {"precision": "fp16", "attention": "varlen"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chat_answers_on_a_cpu_whatever_the_run_was_trained_on(
    hw: str, stage: str, train: dict[str, Any], method: str, trained: dict[str, tuple[RunSpec, RunDir]]
) -> None:
    spec, run = trained[method]
    here = open_model.local_spec(of_a_pod(spec, hw, stage, **train))
    assert (here.hw.accelerator, here.deepspeed.name, here.hw.world_size) == ("cpu", "none", 1)
    model, tokenizer = open_model.load_finished(here, run)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == "varlen"
    text = chat.answer(here, model, tokenizer, [{"role": "user", "content": "w4 w15 w26"}], 4)
    own, its = open_model.load_finished(open_model.local_spec(spec), run)
    assert text == chat.answer(open_model.local_spec(spec), own, its, [{"role": "user", "content": "w4 w15 w26"}], 4)


@pytest.mark.parametrize("hw", ["h100", "t4"])
@pytest.mark.parametrize("method", ["lora", "qlora4"])
def test_merge_and_eval_open_a_pods_run(
    method: str, hw: str, trained: dict[str, tuple[RunSpec, RunDir]], tmp_path: Path
) -> None:
    from argparse import Namespace

    from runner.train.evaluation.finished_model import evaluation
    from runner.train.merge.adapter import merge

    spec, run = trained[method]
    there = of_a_pod(spec, hw, precision="fp16" if hw == "t4" else "bf16", attention="auto")
    facts = merge(there, run, tmp_path / "merged", lambda line: None)
    assert facts["dtype"] == ("float16" if hw == "t4" else "bfloat16")
    options = Namespace(base=False, data=None, tasks=None, limit=2)
    assert evaluation(there, run, options, lambda line: None)["held_out"]["loss"] > 0


@pytest.mark.parametrize(
    ("capability", "precision", "attention", "expected"),
    [
        ((9, 0), "bf16", "flash_attention_2", ("bf16", "flash_attention_2")),
        ((9, 0), "fp16", "auto", ("fp16", "auto")),
        ((7, 5), "bf16", "flash_attention_2", ("fp16", "auto")),  # a run of an H100 opened on a T4
        ((9, 0), "fp32", "flash_attention_2", ("fp32", "auto")),
    ],
)
def test_on_another_gpu_a_run_is_opened_with_what_that_can(
    capability: tuple[int, int], precision: str, attention: str, expected: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "NVIDIA GPU")
    pod = of_a_pod(on("hw=cpu", "method=qlora4"), "h100x3", "zero3", precision=precision, attention=attention)
    found = open_model.local_spec(pod)
    assert (found.train.precision, found.train.attention) == expected
    assert (found.hw.accelerator, found.hw.num_gpus, found.deepspeed.name) == ("cuda", 1, "none")
    with pytest.raises(Asked):
        model_loading.load_model(found, "somewhere")
    assert asked["device_map"] == {"": 0}
    assert asked["quantization_config"].bnb_4bit_compute_dtype == model_loading.DTYPES[expected[0]]


def test_a_gpu_that_torch_does_not_see_is_said_before_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, machine(T4))
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0", (13, 0)))
    monkeypatch.setattr(torch_build, "driver", lambda: Driver("550.54.15", (12, 4)))
    said: list[str] = []
    assert open_model.local_spec(on("hw=t4"), said.append).hw.accelerator == "cpu"
    assert len(said) == 1 and "does not see 1 × Tesla T4" in said[0] and "the driver serves CUDA 12.4" in said[0]


# ── a pod's environment ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("driver", "capabilities", "build"),
    [
        ("580.82.07", [9.0], ""), ("570.86.10", [9.0], "cu126"), ("550.54.15", [8.0, 8.0], "cu126"),
        ("525.60.13", [8.9], "cu126"), ("580.82.07", [7.0], "cu126"), ("570.86.10", [12.0], "cu129"),
        ("580.82.07", [12.0], ""), ("610.1", [10.0], ""),
    ],
)  # fmt: skip
def test_the_torch_that_a_pod_installs_fits_its_driver(driver: str, capabilities: list[float], build: str) -> None:
    assert install.build_for(driver, capabilities) == build


@pytest.mark.parametrize(
    ("driver", "capabilities"),
    [("515.43", [8.0]), ("550.54.15", [12.0]), ("570.86", [7.0, 12.0]), ("470.82", [3.7]), ("580.65", [3.7])],
)
def test_a_host_that_no_torch_fits_is_said(driver: str, capabilities: list[float]) -> None:
    with pytest.raises(ValueError, match="no torch fits the host"):
        install.build_for(driver, capabilities)


def test_the_pin_names_the_build() -> None:
    assert install.pins_for_build("torch==2.13.0\ntrl==1.16.0\n", "cu126") == "torch==2.13.0+cu126\ntrl==1.16.0\n"
    assert install.pins_for_build("torch==2.13.0\n", "") == "torch==2.13.0\n"


def test_an_environment_whose_torch_sees_too_few_gpus_is_no_good() -> None:
    assert install.torch_gpu_problem(sys.executable, 0) is None
    assert install.torch_gpu_problem(sys.executable, 1) == "torch sees 0 of 1 GPUs"


def test_hosts_that_cannot_start_the_image_are_never_asked_for() -> None:
    def gpu(image: str, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = request_body(PodRequest("n", image, "secure", "NVIDIA L4", **more))["gpu"]
        return found

    default = RunPodPlace(name="runpod").image
    assert gpu(default)["minCudaVersion"] == "12.8"
    assert gpu("x/y:cu130")["minCudaVersion"] == "13.0"
    assert gpu("unsloth/unsloth:latest") == {"id": "NVIDIA L4", "count": 1}
    named = gpu(default, cuda_versions=("13.0",))
    assert named == {"id": "NVIDIA L4", "count": 1, "allowedCudaVersions": ["13.0"]}


@pytest.mark.parametrize(
    ("image", "least"),
    [
        ("runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404", "12.8"), ("x/y:cu126", "12.6"), ("x/y:cuda129", "12.9"),
        ("pytorch/pytorch:2.7.0-cuda12.6-cudnn9-runtime", "12.6"), ("ghcr.io/a/b:cuda-12.1", "12.1"),
        ("runpod/pytorch:2.4.0-py3.11-cuda12.4.1-devel-ubuntu22.04", "12.4"),
        ("docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04", "13.0"), ("nvidia/cuda:11.8.0-cudnn8-devel", "11.8"),
        ("a/trl:cu12", None), ("nvcr.io/nvidia/pytorch:25.01-py3", None), ("a/b:2.8-cudnn9", None),
    ],
)  # fmt: skip
def test_the_tag_of_an_image_says_which_hosts_start_it(image: str, least: str | None) -> None:
    assert request_body(PodRequest("n", image, "secure", "NVIDIA L4"))["gpu"].get("minCudaVersion") == least


def test_a_bid_asks_for_hosts_that_start_the_image_too() -> None:
    """RunPod's GraphQL has no floor, only a list."""
    from runner.cloud.runpod import graphql

    def allowed(image: str, **more: Any) -> Any:
        return graphql._input(PodRequest("n", image, "secure", "NVIDIA L4", bid_usd=0.2, **more)).get(
            "allowedCudaVersions"
        )

    since = allowed(RunPodPlace(name="runpod").image)
    assert since[:3] == ["12.8", "12.9", "13.0"] and "12.7" not in since
    assert allowed("x/y:cu130")[0] == "13.0"
    assert allowed("x/y:cu118")[0] == "11.8"
    assert allowed("unsloth/unsloth:latest") is None
    assert allowed("x/y:cu130", cuda_versions=("12.8",)) == ["12.8"]
    assert allowed("x/y:cu130", template="abc") is None


# ── a pod's GPUs, before anything is uploaded ──────────────────────────────────────────────────


class FakeDriver:
    """CUDA's driver API with so many GPUs, of which one call may fail."""

    def __init__(self, gpus: int, fails: str = "", keeps: int = 7) -> None:
        self.gpus, self.fails, self.keeps = gpus, fails, keeps
        self.tried: list[int] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"system not yet initialized"
            if name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.gpus
            if name == "cuDeviceGet":
                self.tried.append(arguments[1])
            if name == "cuMemcpyDtoH_v2":
                arguments[0]._obj.value = self.keeps
            return 802 if name == self.fails else 0

        return call


GOOD_SMI = 'echo "580.82.07, 9.0"; echo "580.82.07, 9.0"'


@pytest.mark.parametrize(
    ("smi", "driver", "reason"),
    [
        (GOOD_SMI, FakeDriver(2), None),
        (GOOD_SMI, FakeDriver(1), "the host's driver shows 1 of 2 GPUs"),
        (GOOD_SMI, FakeDriver(2, fails="cuInit"), "cuInit fails with 802, system not yet initialized"),
        (GOOD_SMI, FakeDriver(2, fails="cuMemsetD32_v2"), "the host's GPUs do not compute: cuMemsetD32_v2"),
        (GOOD_SMI, FakeDriver(2, keeps=0), "does not keep what is written"),
        (GOOD_SMI, None, "libcuda.so.1"),
        ('echo "515.43.04, 8.0"; echo "515.43.04, 8.0"', FakeDriver(2), "no torch fits the host: NVIDIA driver 515"),
        (
            'echo "Failed to initialize NVML"; exit 9',
            FakeDriver(2),
            "driver does not respond: Failed to initialize NVML",
        ),
        ("exit 9", FakeDriver(2), "driver does not respond: nvidia-smi ends with 9"),
    ],
)
def test_a_pods_gpus_are_tried_without_torch(
    smi: str, driver: FakeDriver | None, reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bin").mkdir()
    put_nvidia_smi(tmp_path, smi)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def load(name: str) -> Any:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(install.ctypes, "CDLL", load)
    assert install.check_gpus(2) == (install.REFUSED if reason else 0)
    assert (reason or "") in capsys.readouterr().out
    if reason is None:
        assert driver is not None and driver.tried == [0, 1]


@pytest.mark.parametrize(
    ("words", "named", "code", "what"),
    [
        ("hw=h100", None, install.REFUSED, "the pod is no good: cuInit fails"),
        ("hw=h100", None, 124, "did not answer within 90 s"),
        ("hw=h100", None, 0, None),
        ("hw=h100", None, 127, None),  # no `timeout` in the image: the installation tries them again
        ("hw=h100", "/my/python", None, None),  # whose torch may be for another driver
        ("hw=cpu", None, None, None),
    ],
)
def test_a_pod_whose_gpus_do_not_compute_gets_nothing(
    words: str, named: str | None, code: int | None, what: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.cloud import session, transfer

    done: list[str] = []

    def attempt(command: str) -> tuple[int, str, str]:
        done.append(command)
        assert code is not None
        return code, "Welcome to the pod\ncuInit fails\n", ""

    at = transfer.PodRunFolder(types.SimpleNamespace(attempt=attempt), "/workspace", "r1")
    monkeypatch.setattr(transfer, "arm_agent", lambda *_: done.append("arm"))
    monkeypatch.setattr(transfer, "check_memory", lambda *_: done.append("memory"))
    monkeypatch.setattr(transfer, "send_run", lambda *_: done.append("send") or "code")
    monkeypatch.setattr(transfer, "send_secrets", lambda *_: [])
    monkeypatch.setattr(transfer, "start_task", lambda *_: done.append("begin"))
    monkeypatch.setenv("RUNNER_POD_PYTHON", named or "")
    one: Any = session.Session.__new__(session.Session)
    one.spec, one.run, one.say = on(words), types.SimpleNamespace(read=lambda _: {}), print
    one.rented = types.SimpleNamespace(
        mark=lambda *_: None, pod=types.SimpleNamespace(id="p"), name="runner-r1",
        ledger=types.SimpleNamespace(move=lambda *_: done.append("recorded")),
    )  # fmt: skip
    monkeypatch.setattr(session.Session, "login", lambda self: at)
    monkeypatch.setattr(session.Session, "order", lambda self, detach: {})
    monkeypatch.setattr(session.Session, "_keepalive", lambda self, at: contextlib.nullcontext())
    tried = [] if code is None else ["timeout 90 python3 /workspace/runs/r1/install.py --gpus 1"]
    if what is None:
        one._load(False)
        assert done == ["arm", "memory", *tried, "send", "recorded", "begin"]
        return
    with pytest.raises(CannotRunError, match=what):
        one._load(False)
    assert done == ["arm", "memory", *tried]


def test_a_machine_without_a_driver_is_refused_by_the_file_that_is_sent() -> None:
    done = subprocess.run([sys.executable, install.__file__, "--gpus", "1"], capture_output=True, text=True)
    assert done.returncode == install.REFUSED and "NVIDIA driver does not respond" in done.stdout
