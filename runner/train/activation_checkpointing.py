"""Activation checkpointing of every n-th decoder layer, whoever switches it on."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.utils.checkpoint import checkpoint


def checkpoint_every(model: Any, n: int) -> None:
    """Let checkpointing, once it is switched on, be that of every n-th layer, from the first.

    As an argument of the trainer (`every_n_layers`) the number would be lost: TRL 1.16 switches checkpointing off for
    the passes without gradients of DPO, KTO and GRPO, and on again with arguments that torch alone is given.
    """
    if n < 2:
        return

    def set_some(self: Any, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **_: int) -> None:
        type(self)._set_gradient_checkpointing(self, enable, gradient_checkpointing_func, n)

    model._set_gradient_checkpointing = MethodType(set_some, model)
