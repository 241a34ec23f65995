"""How much data there is, found in a moment: rows, tokens of a row, and the steps that follow from them.

Small data are read whole and tokenised with the model's own tokenizer, if it is on this machine: then the answer
is exact. Else a sample is. Answers are kept, because the front should not read the same file twice.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.data import commands
from runner.data.formats import Example, split
from runner.data.sample import Sample, sample
from runner.paths import CONF, cache_dir
from runner.spec import DataSpec, ModelSpec, RunSpec

LAYOUT = 1  # raise it when what is stored changes meaning
SAMPLE_ROWS = 200  # rows tokenised of more data than that
WHOLE_ROWS = 2000  # rows up to which all are tokenised

# "1 token ~= 4 chars in English" (help.openai.com, article 4936856). Text with names and figures has fewer: 2.4
# in the commands data with SmolLM2's tokenizer, so that this can be a quarter too low.
CHARS_PER_TOKEN = 4.0
# ChatML puts <|im_start|>, role, line break, <|im_end|> and line break around each turn; other templates about as much.
TEMPLATE_TOKENS_PER_TURN = 5
# Best-fit packing of rows much shorter than a sequence leaves little empty: 97% is an assumption for lengths that
# are not known one by one. Rows of about 66 tokens in 256 fill 92% (README).
PACKING_EFFICIENCY = 0.97


@dataclass(frozen=True)
class DataLengths:
    """What is known of the training data before it is loaded."""

    num_examples: int | None
    """Training rows, after holding out and `data.max_examples`; None where nobody knows."""
    tokens_per_example: float | None
    """Mean tokens of a row, prompt, answer and template together, before cutting to `train.max_length`."""
    exact: bool
    """Every row was counted with the model's tokenizer and template."""
    how: str
    """How the figures were found, in a few words."""
    row_tokens: tuple[int, ...] = ()
    """Tokens of every training row, in order, where all are known."""


def lengths(data: DataSpec, model: ModelSpec, *, seed: int = 42) -> DataLengths:
    """What can be known of the data here; `seed` chooses the held-out rows, as in `train.seed`.

    Reads files and, after the first time, its own cache; never the network. RequestError for a data file that
    is missing or of an unknown kind.
    """
    if data.source == "hub":
        note = f"{data.id} is on the Hub: rows are counted when it is loaded"
        return DataLengths(
            data.max_examples, None, False, note + (", at most data.max_examples" * bool(data.max_examples))
        )
    tokenizer = tokenizer_file(model)
    file = cache_dir() / "lengths" / f"{_key(data, tokenizer, seed)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(file.read_text("utf-8"))
        return DataLengths(**{**stored, "row_tokens": tuple(stored["row_tokens"])})
    counted = _count(data, sample(data), tokenizer, seed)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(counted)), "utf-8")
        temporary.replace(file)
    return counted


def _key(data: DataSpec, tokenizer: Path | None, seed: int) -> str:
    """Changes with anything that changes the answer: settings, files by size and time, the code of the rows."""
    files = [tokenizer, Path(data.chat_template) if data.chat_template else None]
    if data.source == "commands":
        files += [
            Path(commands.__file__),
            *sorted(f for g in ("model", "hw", "method") for f in (CONF / g).glob("*.yaml")),
        ]
    else:
        files += [Path(name).expanduser().absolute() for name in (data.path, data.eval_path) if name]
    stats = [(str(f), s.st_size, s.st_mtime_ns) for f in files if f and (s := _stat(f))]
    parts = [LAYOUT, data.model_dump(), stats, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stat(file: Path) -> os.stat_result | None:
    with suppress(OSError):
        return file.stat()
    return None


# --- tokens ----------------------------------------------------------------------------------------------------


def tokenizer_file(model: ModelSpec) -> Path | None:
    """The model's `tokenizer.json`, if it is on this machine: in its folder, our cache or the Hub's cache."""
    if model.package or model.gguf_file:
        return _unpacked(model)
    folder = Path(model.id).expanduser()
    if not folder.is_dir():
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{model.id.replace('/', '--')}"
        commit = model.revision or "main"
        with suppress(OSError):
            commit = (hub / "refs" / commit).read_text("utf-8").strip()
        folder = hub / "snapshots" / commit
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def _unpacked(model: ModelSpec) -> Path | None:
    """Of a model that was unpacked from GGUF; the folder's name is `runner.train.models.source_of`'s."""
    with suppress(ImportError, OSError, ValueError):
        found = importlib.util.find_spec(model.package) if model.package else None
        folder = Path(found.origin).parent if found and found.origin else Path(model.id).expanduser()
        gguf = folder / str(model.gguf_file)
        stat = gguf.stat()
        file = cache_dir() / "models" / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}" / "tokenizer.json"
        return file if file.is_file() else None
    return None


def _count(data: DataSpec, found: Sample, file: Path | None, seed: int) -> DataLengths:
    """Rows that train, and their tokens."""
    every = found.whole and len(found.examples) <= WHOLE_ROWS
    examples = found.examples if every else _spread(found.examples)
    tokens, exact, by = _tokens(examples, data, file)
    training = tokens
    total = found.total
    if not found.held_apart:
        if every:
            training = split(tokens, data.eval_fraction, seed)[0]
        held = max(1, round(total * data.eval_fraction)) if data.eval_fraction else 0
        total -= min(held, max(0, total - 1))
    if every:
        training = training[: data.max_examples]
    total = min(total, data.max_examples or total)
    mean = sum(training) / len(training) if training else None
    rows = found.how if every else f"{found.how}, tokens of {len(examples)} rows"
    return DataLengths(total, mean, every and exact, f"{rows}, {by}", tuple(training) if every and exact else ())


def _spread(examples: list[Example]) -> list[Example]:
    """`SAMPLE_ROWS` rows at equal distances: files are often sorted."""
    count = min(SAMPLE_ROWS, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _tokens(examples: Sequence[Example], data: DataSpec, file: Path | None) -> tuple[list[int], bool, str]:
    """Tokens of each example, whether that is exact, and how they were counted."""
    try:  # 7 ms, and SmolLM2's file takes 75 ms to load
        encoder: Any = importlib.import_module("tokenizers").Tokenizer.from_file(str(file)) if file else None
    except Exception:  # tokenizers raises a bare Exception for a file that it cannot read
        encoder = None
    render = _renderer(file, data) if encoder else None
    texts = [_text(example, render) for example in examples]
    if encoder is None:
        counts = [max(1, round(len(text) / CHARS_PER_TOKEN)) + extra for text, extra in texts]
        return counts, False, "4 characters a token assumed: the tokenizer is not on this machine"
    ids = encoder.encode_batch([text for text, _ in texts], add_special_tokens=False)
    counts = [len(one.ids) + extra for one, (_, extra) in zip(ids, texts, strict=True)]
    exact = all(extra == 0 for _, extra in texts)
    return counts, exact, "counted with the model's tokenizer" + ("" if exact else ", its template estimated")


def _text(example: Example, render: Callable[..., str] | None) -> tuple[str, int]:
    """The text of an example, and the tokens to add for what stands around it."""
    if example.text is not None:
        return example.text, 1  # the end of the text
    turns = [*example.prompt, *example.completion]
    if render is not None:
        with suppress(Exception):  # a template may refuse a conversation in any way
            return render(messages=[dict(turn) for turn in turns], add_generation_prompt=False), 0
    return "".join(turn["content"] for turn in turns), TEMPLATE_TOKENS_PER_TURN * len(turns)


def _renderer(file: Path | None, data: DataSpec) -> Callable[..., str] | None:
    """The chat template, as transformers compiles it; None without one, or without jinja2."""
    assert file is not None
    source: str | None = None
    with suppress(OSError, ValueError):
        if data.chat_template:
            source = Path(data.chat_template).read_text("utf-8")
        elif (beside := file.with_name("chat_template.jinja")).is_file():
            source = beside.read_text("utf-8")
        else:
            source = json.loads(file.with_name("tokenizer_config.json").read_text("utf-8")).get("chat_template")
    if not isinstance(source, str):
        return None
    try:
        sandbox: Any = importlib.import_module("jinja2.sandbox")  # 40 ms; never code of a stranger's template
        names = json.loads(file.with_name("tokenizer_config.json").read_text("utf-8"))
        special = {k: v for k, v in names.items() if k.endswith("_token") and isinstance(v, str)}
        extensions = ["jinja2.ext.loopcontrols"]
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        template = environment.from_string(source, globals=special)
    except Exception:
        return None
    render: Callable[..., str] = template.render
    return render


# --- steps -----------------------------------------------------------------------------------------------------


def steps(spec: RunSpec, data: DataLengths) -> tuple[int | None, int | None, list[str]]:
    """Optimiser steps of a resolved run, the tokens they learn from (padding left out), and what was assumed.

    The arithmetic of `runner.train.trainer.num_steps`, which counts rows that are already tokenised. None where
    the data's size is not known and `train.max_steps` does not stand for it.
    """
    train = spec.train
    notes: list[str] = []
    rows, tokens = _rows(spec, data, notes)
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    at_once = train.micro_batch_size * spec.hw.world_size
    batch = at_once * train.accumulation_steps
    count = train.max_steps
    if count is None and rows is not None:
        micro_batches = -(-rows // at_once)
        per_epoch = max(1, -(-micro_batches // train.accumulation_steps))
        count = -(-int(train.num_epochs * per_epoch * 1000) // 1000)
    if count is None:
        return None, None, [*notes, f"how long it trains is not known: {data.how}"]
    if tokens is None or rows is None:
        return count, count * batch * train.max_length, [*notes, "every sequence counted as full"]
    passes = train.num_epochs if train.max_steps is None else count * batch / rows
    return count, round(passes * tokens), notes


def _rows(spec: RunSpec, data: DataLengths, notes: list[str]) -> tuple[int | None, int | None]:
    """Sequences of one epoch, and the tokens in them."""
    limit, packing = spec.train.max_length, spec.train.packing
    if data.row_tokens:
        cut = [min(tokens, limit) for tokens in data.row_tokens]
        return packed(cut, limit) if packing else len(cut), sum(cut)
    if data.num_examples is None or data.tokens_per_example is None:
        if data.num_examples is None or packing:
            return None, None
        return data.num_examples, None
    notes.append(f"about {data.num_examples:,} rows of {data.tokens_per_example:.0f} tokens: {data.how}")
    tokens = round(data.num_examples * min(data.tokens_per_example, limit))
    if not packing:
        return data.num_examples, tokens
    notes.append(f"packing assumed to fill {PACKING_EFFICIENCY:.0%} of a sequence")
    return max(1, math.ceil(tokens / (limit * PACKING_EFFICIENCY))), tokens


def packed(row_tokens: Sequence[int], limit: int) -> int:
    """Sequences of `limit` tokens that best-fit decreasing makes of the rows, as TRL's packing does.

    Each row, the longest first, goes where it leaves the least room; where none has room it begins a sequence.
    """
    room: list[int] = []  # of every sequence, ascending
    for tokens in sorted((t for t in row_tokens if t), reverse=True):
        at = bisect_left(room, tokens)
        left = room.pop(at) - tokens if at < len(room) else limit - tokens
        insort(room, left)
    return len(room)
