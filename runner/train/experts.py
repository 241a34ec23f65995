"""Mixtures of experts beside PEFT and TRL: what their adapters cannot be, and a configuration that TRL changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.errors import Problem, RequestError

CANNOT = {
    "does not work with lora_dropout": "method.dropout=0",
    "does not work with use_dora": "method.use_dora=false",
    "does not work with LoRA variants": "method.use_dora=false",
    "Experts' object has no attribute 'weight'": "method.init=default",
    "Router' object has no attribute 'weight'": "method.init=default",
}
"""Of PEFT's messages about an adapter of a parameter that is no layer's weight → what to write."""


@contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Context in which the model gets its adapter and its trainer. RequestError for what PEFT cannot do to experts.

    TRL switches `output_router_logits` on for good, though it asks for them at every step: the model could neither
    answer prompts of different lengths nor be saved as it was published.
    """
    facts = model.config.get_text_config()
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
