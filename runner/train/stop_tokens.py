"""Stop tokens: the end of a turn in the chat template, which may differ from the model's eos.

A model that learned to end its turns with <|im_end|> goes on to the limit if only <|endoftext|> stops it. So the tokens
that end a turn stop generation, in this run and in what is saved: `generation_config.json`, also beside an adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from runner.data.chat_tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_ids(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that stop generation: the config's, or else the tokenizer's."""
    known = getattr(config, "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    return [] if known is None else list(known) if isinstance(known, (list, tuple)) else [known]


def align(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, save: bool = False) -> list[str]:
    """Make generation stop where the chat template ends a turn; the tokens that had to be added.

    `save`: the end of a turn becomes the tokenizer's eos as well, which llama.cpp and others go by; not where the
    template writes eos itself, and would write another token then.
    """
    config = getattr(model, "generation_config", None)
    if config is None:  # a reward model
        return []
    words, known = ChatTokenizer.of(tokenizer), stop_ids(config, tokenizer)
    added = [token for token in words.stops if token not in known]
    if added:
        config.eos_token_id = [*known, *added]
    if save and words.stops and "eos_token" not in words.turns.template.source:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(words.stops[0])
    return [str(token) for token in tokenizer.convert_ids_to_tokens(added)]


def save(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside an adapter: the tokens to add to those that stop its base."""
    stops = dict.fromkeys([*stop_ids(None, tokenizer), *ChatTokenizer.of(tokenizer).stops])
    GenerationConfig(eos_token_id=list(stops), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
