"""Mixture-of-experts models: adapters that PEFT cannot make, and a setting that TRL changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module

from runner.errors import Problem, RequestError

COUNTS = ("num_local_experts", "n_routed_experts")
"""What a configuration may call its experts, where TRL's trainer of SFT knows `num_experts` alone."""
CANNOT = {
    "does not work with lora_dropout": "method.dropout=0",
    "does not work with use_dora": "method.use_dora=false",
    "does not work with LoRA variants": "method.use_dora=false",
    "Experts' object has no attribute 'weight'": "method.init=default",
    "Router' object has no attribute 'weight'": "method.init=default",
}
"""Of PEFT's messages about an adapter of a parameter that is no layer's weight → what to write."""


def has_experts(model: Any) -> bool:
    """Whether there are experts to balance: Granite 4 and Doge have dense models under a mixture's configuration."""
    facts = model.config.get_text_config()
    return bool(getattr(facts, "num_experts", 0)) and bool(getattr(facts, "is_moe", True))


def blocks(model: Any) -> list[Module]:
    """The modules of a mixture that send tokens to experts; none of a dense model."""
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), Module)]


@contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Context in which the model gets its adapter and its trainer. RequestError for what PEFT cannot do to experts.

    TRL looks for `num_experts`, which the configurations of Granite's, Phi's and Llama's mixtures have under another
    name, and for the layers below the head by a name that Llama 4 gives to something else. It switches
    `output_router_logits` on for good, though it asks for them at every step: the model could neither answer prompts of
    different lengths nor be saved as it was published.
    """
    facts = model.config.get_text_config()
    if not hasattr(facts, "num_experts") and (name := next((one for one in COUNTS if hasattr(facts, one)), None)):
        type(facts).attribute_map = {**type(facts).attribute_map, "num_experts": name}
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    before = getattr(facts, "output_router_logits", None)
    try:
        yield
    except (ValueError, AttributeError) as error:
        write = next((write for words, write in CANNOT.items() if words in str(error)), None)
        if write is None:
            raise
        key = write.partition("=")[0]
        what = f"{key} is not possible for a mixture's experts, which transformers keeps in one parameter"
        remedy = f"write {write}, or leave them out: method.target_modules=[q_proj,k_proj,v_proj,o_proj]"
        raise RequestError(Problem(what, key, remedy)) from error
    if before is not None:
        facts.output_router_logits = before
