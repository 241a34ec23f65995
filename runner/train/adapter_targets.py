"""Target modules of adapters: the model's names, and those that `all-linear` leaves out."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

from runner.errors import Problem, RequestError


def linear_names(model: Any) -> list[str]:
    """Last names of all linear layers but the output head, as PEFT's `all-linear` takes them."""
    head = getattr(model, "score", None) or model.get_output_embeddings()
    kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sorted(kinds)


def check_names(model: Any, names: str | list[str], key: str) -> None:
    """RequestError for the name of a module that the model does not have; it names those that it has."""
    if isinstance(names, str):
        return
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in names:
        if name.rpartition(".")[2] not in known:
            raise RequestError(
                Problem(
                    f"{key}: the model has no module {name}",
                    None,
                    f"linear layers: {', '.join(linear_names(model))}",
                )
            )


def unfit(model: Any, asked: str | list[str]) -> list[str]:
    """Linear layers that cannot have an adapter, for PEFT to leave out of `all-linear`; RequestError for one asked for.

    Routers of a mixture that give more than one tensor (Phimoe, Llama 4), and what a Mamba kernel reads itself.
    """
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = [
        name for name, module in kinds.items() if "Router" in type(module).__name__ or _read_by_kernel(model, name)
    ]
    named = [] if isinstance(asked, str) else [n for n in asked if any(f".{f}".endswith(f".{n}") for f in found)]
    if named:
        what = (
            f"{named[0]} of {model.config.model_type} cannot have an adapter: the model computes with its weight itself"
        )
        raise RequestError(Problem(what, "method.target_modules", f"leave {named[0]} out"))
    return found


def _read_by_kernel(model: Any, name: str) -> bool:
    """Whether PEFT refuses it as a part of a Mamba layer."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False
