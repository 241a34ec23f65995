"""The five methods applied to a loaded model: full, freeze, LoRA, QLoRA-4, QLoRA-8."""

from __future__ import annotations

import copy
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file

from runner.errors import Problem, RequestError
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.rundir.directory import RunDir
from runner.spec import Freeze, Full, Lora, Method, Peft, QLora4, QLora8, Reward, RunSpec
from runner.spec.method import parse_layers
from runner.train.adapter_targets import check_names, linear_names, unfit
from runner.train.model_loading import DTYPES


def adapter_of(spec: RunSpec) -> Lora | QLora4 | QLora8 | Peft | None:
    """The method, if it trains an adapter."""
    return None if isinstance(spec.method, (Full, Freeze)) else spec.method


def adapter_config(spec: RunSpec, model: Any) -> PeftConfig | None:
    """PEFT's configuration of the adapter, or None for a method without one."""
    method = adapter_of(spec)
    if method is None:
        return None
    return _of_type(method, spec, model) if isinstance(method, Peft) else _of_lora(method, spec, model)


def _of_type(method: Peft, spec: RunSpec, model: Any) -> PeftConfig:
    """The configuration of another type than LoRA; RequestError for what PEFT does not take."""
    kinds: dict[str, Any] = {t.value: kind for t, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(method.peft_type)
    if kind is None or "target_modules" not in {field.name for field in fields(kind)}:
        known = sorted(name for name, k in kinds.items() if hasattr(k, "target_modules"))
        what = f"the installed PEFT has no adapter {method.peft_type} for linear layers"
        raise RequestError(Problem(what, "method.peft_type", f"it has {', '.join(known)}"))
    targets = method.target_modules
    if targets == "all-linear":
        targets = linear_names(model)
    check_names(model, targets, "method.target_modules")
    check_names(model, method.modules_to_save, "method.modules_to_save")
    chosen = None if method.layers is None else list(_selected(method.layers, decoder_layers(model)[1]))
    taken = {
        "target_modules": targets,
        "exclude_modules": unfit(model, method.target_modules) or None,
        "layers_to_transform": chosen,
        "modules_to_save": method.modules_to_save or None,
        "task_type": "SEQ_CLS" if isinstance(spec.objective, Reward) else "CAUSAL_LM",
    }
    try:
        made: PeftConfig = kind(
            **{key: value for key, value in taken.items() if value is not None}, **_arguments(method)
        )
    except (TypeError, ValueError) as error:
        what = f"PEFT's {kind.__name__} does not take this: {' '.join(str(error).split())}"
        keys = ", ".join(f"method.arguments.{key}" for key in method.adapter.defaults)
        raise RequestError(Problem(what, "method.arguments", f"change one of {keys}")) from None
    return made


@contextmanager
def refusals_of_peft(spec: RunSpec) -> Iterator[None]:
    """Errors of PEFT while it puts an adapter on the model become a RequestError: arguments that fit no layer of it."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, NotImplementedError, LookupError, ArithmeticError) as error:
        method = spec.method
        places = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        if not isinstance(method, Peft) or not any("tuners" in parts and "peft" in parts for parts in places):
            raise
        what = f"PEFT cannot put {method.peft_type} on {spec.model.name}: {' '.join(str(error).split())}"
        known = ", ".join(f"method.arguments.{key}" for key in method.adapter.defaults)
        raise RequestError(Problem(what, "method.arguments", f"change one of {known}")) from error


def _arguments(method: Peft) -> dict[str, Any]:
    """All of them for a type that is known: a default of PEFT's that changes changes no run."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in method.adapter.arguments.items()}


def _of_lora(method: Lora | QLora4 | QLora8, spec: RunSpec, model: Any) -> LoraConfig:
    targets: str | list[str] = method.target_modules
    chosen = None
    if method.layers is not None:
        chosen = list(_selected(method.layers, decoder_layers(model)[1]))
        if targets == "all-linear":  # PEFT wants names, not the shorthand, when layers are chosen
            targets = linear_names(model)
    check_names(model, targets, "method.target_modules")
    check_names(model, method.modules_to_save, "method.modules_to_save")
    init = method.init if isinstance(method, Lora) else "default"
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        exclude_modules=unfit(model, method.target_modules) or None,
        layers_to_transform=chosen,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        init_lora_weights=True if init == "default" else init,
        modules_to_save=method.modules_to_save or None,
        trainable_token_indices=_added_tokens(model),
        task_type="SEQ_CLS" if isinstance(spec.objective, Reward) else "CAUSAL_LM",  # the former trains the head whole
    )


def _added_tokens(model: Any) -> dict[str, list[int]] | None:
    """Rows of the embedding (and of a head of its own) that `data.add_tokens` made: they train, whatever else does."""
    ids = getattr(model, "added_token_ids", None)
    if not ids:
        return None
    trained = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        trained.append(model.get_output_embeddings())
    return {name.rpartition(".")[2]: ids for name, module in model.named_modules() if any(module is t for t in trained)}


def mark_trainable(spec: RunSpec, model: Any) -> None:
    """Set `requires_grad` for methods without an adapter; trained weights become fp32 if so asked."""
    if isinstance(spec.method, Full):
        model.requires_grad_(True)
    elif isinstance(spec.method, Freeze):
        model.requires_grad_(False)
        if getattr(model, "added_token_ids", None) and not spec.method.extra_modules:
            what = "data.add_tokens makes new embeddings, and method=freeze trains none"
            raise RequestError(Problem(what, "data.add_tokens", "write method.extra_modules=[embed_tokens]"))
        head = [model.score] if isinstance(spec.objective, Reward) else []  # new, so it has everything to learn
        for module in [*_freeze_modules(spec.method, model), *head]:
            module.requires_grad_(True)
            if spec.method.master_weights and spec.deepspeed.name == "none":
                for parameter in module.parameters():
                    parameter.data = parameter.data.float()
        # transformers 5 gives the embeddings' output a gradient wherever it checkpoints, for adapters' sake. Here that
        # would keep the input of every frozen layer and run the backward pass through them all, for nothing.
        model.enable_input_require_grads = lambda: None


def _freeze_modules(method: Freeze, model: Any) -> list[Any]:
    """The modules that `freeze` trains, found by exact index and exact name.

    Matching by substring would take `layers.12` for `layers.1`, a mixture's `experts.1` for a
    layer, and every layer's `norm` for the last one.
    """
    path, layers = decoder_layers(model)
    found = [layers[i] for i in _selected(method.layers, layers)]
    outside = {name: module for name, module in model.named_modules() if name and not f"{name}.".startswith(f"{path}.")}
    for wanted in method.extra_modules:
        matches = [m for name, m in outside.items() if name == wanted or name.rpartition(".")[2] == wanted]
        if not matches:
            leaves = sorted({n.rpartition(".")[2] for n, m in outside.items() if any(True for _ in m.parameters())})
            raise RequestError(
                Problem(
                    f"method.extra_modules: the model has no {wanted} outside its layers",
                    None,
                    f"it has {', '.join(leaves)}",
                )
            )
        found += matches
    return found


def decoder_layers(model: Any) -> tuple[str, Any]:
    """Path and ModuleList of the decoder layers: the outermost list with one entry per layer."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    ]
    if not lists:
        raise RequestError(
            Problem(
                f"{type(model).__name__} has no list of {wanted} decoder layers",
                None,
                "use method=lora, which finds linear layers by type",
            )
        )
    return min(lists, key=lambda item: item[0].count("."))


def _selected(choice: str | list[int | str], layers: Any) -> tuple[int, ...]:
    try:
        return parse_layers(choice).select(len(layers))
    except ValueError as error:
        raise RequestError(Problem(f"method.layers={choice}: {error}")) from None


def describe_trainable(model: Any) -> tuple[int, int, list[str]]:
    """Trainable and total parameters, and one line per kind of trained module, for people.

    Packed 4-bit weights count as the parameters they stand for, and those that ZeRO-3 sharded as a whole.
    """
    trainable = total = 0
    where: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        if parameter.requires_grad:
            trainable += count
            where[_kind(name)] += count
    return trainable, total, [f"{name}: {count:,}" for name, count in where.items()]


def wrong_formula(spec: RunSpec, model: Any) -> str | None:
    """A line about an adapter that is not as large as `method.trainable` made the plan believe; None where it is."""
    method = spec.method
    if not isinstance(method, Peft) or method.trainable is None or spec.model.architecture is None:
        return None
    planned = training_of(shape_of(spec.model), method, "bf16", deepspeed=False).adapter
    own = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    real = sum(getattr(p, "ds_numel", p.numel()) for p in own)
    if real == planned:
        return None
    return (
        f"method.trainable={method.trainable} is wrong: the plan counted {planned:,} parameters of the adapter, and it "
        f"has {real:,}; correct it, or plan, fit and the price stay wrong"
    )


_PREFIXES = tuple(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))


def _kind(name: str) -> str:
    """`model.layers.28.mlp.up_proj.weight` → `layers.28`; an adapter → its module's name."""
    parts = [p for p in name.split(".") if p not in ("base_model", "model", "default", "weight", "bias")]
    own = next((i for i, p in enumerate(parts) if p.startswith(_PREFIXES)), None)
    if own:
        return f"{parts[own].partition('_')[0]} {parts[own - 1]}"
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:2])
    return ".".join(p for p in parts if p not in ("modules_to_save", "original_module"))


def decomposes(spec: RunSpec) -> bool:
    """The adapter starts from the base weight's own decomposition, and changes that weight."""
    return isinstance(spec.method, Lora) and spec.method.init in ("pissa", "olora")


def keep_initial_adapter(spec: RunSpec, model: Any, run: RunDir) -> None:
    """PiSSA and OLoRA move part of the base into the adapter: keep the start, to save the difference later."""
    if decomposes(spec):
        model.save_pretrained(run.path / "initial_adapter")


def widen(spec: RunSpec, model: Any) -> None:
    """Give trained weights the width that the arithmetic needs, whatever TRL and PEFT made of them.

    TRL makes an adapter over a packed base bf16, PEFT leaves copies of whole modules (`modules_to_save`, a new head) as
    the base is. Under fp16 torch's GradScaler unscales fp32 gradients alone: it has no kernel for bf16 ones, and
    refuses fp16 ones. DeepSpeed scales by itself, and takes the width of the first weight that trains for that of all.
    """
    if spec.train.precision == "bf16":
        return
    sharded = spec.train.precision == "fp16" and spec.deepspeed.name != "none"
    dtype = torch.float16 if sharded else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and (adapter_of(spec) or sharded) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def width(spec: RunSpec, name: str) -> torch.dtype:
    """How wide a trained weight is in what a user loads.

    peft makes fp32 of what an adapter adds, and leaves whole modules (`modules_to_save`, a new head) as it finds the
    base: the norm behind an embedding may know 16 bits alone.
    """
    added = adapter_of(spec) and any(kind in name for kind in (_prefix(spec.method), "trainable_tokens"))
    return torch.float32 if added else DTYPES[spec.train.precision]


def _prefix(method: Method) -> str:
    """How the names of an adapter's own weights begin: `lora_`, `oft_`, `vera_`."""
    own = method.peft_type if isinstance(method, Peft) else "LORA"
    return (
        next(prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind.value == own).partition("_")[0]
        + "_"
    )


def settle(spec: RunSpec, model: Any) -> None:
    """Give trained weights their `width`, so that what is measured is what a user will load.

    Whole weights trained in fp32 become 16 bits; an adapter (TRL trains it in bf16 over a quantised base) becomes fp32.
    Parameters only: a buffer such as the rotary frequencies must stay fp32, as it is after loading.
    """
    for name, parameter in model.named_parameters():
        if adapter_of(spec) is None or parameter.requires_grad:
            parameter.data = parameter.data.to(width(spec, name))


def save_model(spec: RunSpec, model: Any, folder: Path, run: RunDir, state: dict[str, Any] | None = None) -> None:
    """Write the weights that `from_pretrained` needs: all of them, or the adapter over the untouched base.

    `state` are the weights where the model itself holds only a part of them (ZeRO-3).
    """
    if not decomposes(spec):
        model.save_pretrained(folder, state_dict=state)
        return
    start, config = run.path / "initial_adapter", copy.deepcopy(model.peft_config["default"])
    own = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True)
    save_file(relative(config, own, start), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    shutil.rmtree(start)


def relative(config: PeftConfig, state: dict[str, Any], start: Path) -> dict[str, Any]:
    """An adapter over the untouched base, from one that started as a part of it (PiSSA, OLoRA); `config` becomes its.

    The base lost B₀·A₀ when training began, so what was learned is B·A − B₀·A₀ = [B −B₀]·[A; A₀]: twice the rank, at
    the same scale alpha / rank. `start` holds A₀ and B₀.
    """
    first = load_file(start / "adapter_model.safetensors")
    found = {}
    for name, value in state.items():
        value = value.detach().to("cpu", torch.float32)
        if "lora_A" in name:
            value = torch.cat([value, first[name].float()], dim=0)
        elif "lora_B" in name:
            value = torch.cat([value, -first[name].float()], dim=1)
        found[name] = value.contiguous()
    config.r *= 2
    config.lora_alpha *= 2
    config.init_lora_weights = True
    return found


def whole_weights(spec: RunSpec, model: Any, main: bool) -> dict[str, Any]:
    """What has to be saved of a model that ZeRO-3 sharded, gathered one by one; on the main process only.

    Every process must call it. An adapter's own weights, or all of them, in the precision they are trained in.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    adapter = adapter_of(spec)
    dtype = torch.float32 if adapter else DTYPES[spec.train.precision]
    found = {}
    for name, parameter in model.named_parameters():
        if adapter and not parameter.requires_grad:
            continue
        with GatheredParameters([parameter]):
            if main:
                found[name] = parameter.data.to("cpu", dtype, copy=True)
    if main and not adapter:
        buffers = {name for name, _ in model.named_buffers()}  # those that are saved are in `state_dict`, too
        found |= {name: value for name, value in model.state_dict().items() if name in buffers}
    return found
