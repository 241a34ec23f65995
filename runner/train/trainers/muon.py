"""Muon for the matrices of a model's layers, AdamW for all else, as one optimiser.

Muon orthogonalises the momentum of a matrix (Keller Jordan 2024; arXiv 2502.16982). Its authors leave embeddings, head,
norms and biases to AdamW, and `match_rms_adamw` gives its updates the size of AdamW's, so that one learning rate serves
both.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers.pytorch_utils import Conv1D

from runner.train.adapter_config import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


class MuonAndAdamW(Optimizer):
    """Both over one state and one list of parameter groups, so that it is saved, loaded and scheduled as one."""

    def __init__(
        self, matrices: list[nn.Parameter], rest: list[dict[str, Any]], *, lr: float, weight_decay: float, **adam: Any
    ) -> None:
        """`matrices` are [out, in] each; `rest` are parameter groups, and `adam` arguments of AdamW for them."""
        self._muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(rest, lr=lr, fused=True, **adam)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both read and write this optimiser's state and groups: loading replaces them."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is passed
        """Update the matrices, then all else."""
        assert closure is None
        self._muon.step()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._adamw.step()


def muon_of(model: PreTrainedModel, args: TrainingArguments, decayed: Collection[str]) -> MuonAndAdamW:
    """Muon over what trains of the layers' linear weights, AdamW over all else; `decayed` are names of parameters."""
    linear = (module for layer in decoder_layers(model)[1] for module in layer.modules())
    matrices = {module.weight for module in linear if isinstance(module, (nn.Linear, Conv1D))}
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    rest = [(name, value) for name, value in trained if value not in matrices]
    groups = [
        {"params": [value for name, value in rest if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, args.weight_decay), (False, 0.0))
    ]
    return MuonAndAdamW(
        [value for _, value in trained if value in matrices],
        groups,
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
