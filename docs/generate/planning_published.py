"""The table of memory that is passed on among users, beside this project's, with a reason wherever the two differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from docs.generate import planning_examples as examples
from runner.config import conf_files
from runner.plan.memory import GIB
from runner.resolve import fit
from runner.spec import ModelSpec, RunSpec

Table = examples.Table
MODELS = {"7B": "llama2_7b", "13B": "llama2_13b", "30B": "llama30b", "65B": "llama65b", "8x7B": "mixtral_8x7b"}
PUBLISHED = {
    "full, fp32 weights": (160, 320, 600, 1200, 900),
    "freeze, last 2 layers": (20, 40, 120, 240, 200),
    "LoRA, rank 16": (16, 32, 80, 160, 120),
    "QLoRA, 8 bits": (10, 16, 40, 80, 80),
    "QLoRA, 4 bits": (6, 12, 24, 48, 32),
}
"""GB, from an early README of LLaMA-Factory ("Hardware Requirement"), which names no length, batch or formula."""
LATER = {
    "full, fp32 weights": (120, 240, 600, 1200, 900),
    "freeze, last 2 layers": (20, 40, 80, 200, 160),
    "LoRA, rank 16": (16, 32, 64, 160, 120),
    "QLoRA, 8 bits": (10, 20, 40, 80, 60),
    "QLoRA, 4 bits": (6, 12, 24, 48, 30),
}
"""The same of a later README (recommending transformers 4.39), whose full is mixed precision, its 65B a 70B."""
DIFFERS = 0.2
"""Share of the published figure from which a reason is given."""
METHODS: dict[str, dict[str, Any]] = dict(fit.TABLE_ROWS)


def published() -> Table:
    """GB here and there; cells that differ by more than `DIFFERS` are bold."""
    rows: list[tuple[str, ...]] = []
    for method, theirs in PUBLISHED.items():
        cells = []
        for name, there in zip(MODELS, theirs, strict=True):
            text = f"{gigabytes(method, name):,.1f} / {there:,}"
            cells.append(f"**{text}**" if differs(method, name) else text)
        rows.append((method, *cells))
    return ("here / there, GB", *MODELS), rows


def reasons() -> str:
    """One line for every method and reason, with the cells it holds for."""
    lines = [
        f"- **{method}, {_and(names)}**: {say(method, names)}. {_later(method, names)}"
        for method, names, say in REASONS
    ]
    return "\n".join(lines)


def _later(method: str, names: tuple[str, ...]) -> str:
    found = [LATER[method][list(MODELS).index(name)] for name in names]
    same = found == [_there(method, name) for name in names]
    return "A later edition says the same." if same else f"A later edition says {_and(found)} GB."


def gigabytes(method: str, name: str, micro_batch: int = 1, **changes: Any) -> float:
    """What this project plans, in the units of the published table."""
    gib = fit.table_cell(_run(), _model(name), METHODS[method] | changes, micro_batch)
    return gib * GIB / 1e9


def differs(method: str, name: str) -> bool:
    """By more than `DIFFERS`."""
    there = _there(method, name)
    return abs(gigabytes(method, name) - there) > DIFFERS * there


def _there(method: str, name: str) -> int:
    return PUBLISHED[method][list(MODELS).index(name)]


def _run() -> RunSpec:
    spec = fit.with_default_length(examples.spec_of("hw=h200"), {})
    return fit.table_run(spec, spec.train.max_length)


def _model(name: str) -> ModelSpec:
    return ModelSpec.model_validate(conf_files.load_choice("model", MODELS[name]))


def _per_parameter(method: str, name: str) -> float:
    """Published bytes for each parameter of the model."""
    return _there(method, name) * 1e9 / (_model(name).num_parameters or 1)


def _listed(method: str, names: tuple[str, ...]) -> str:
    return _and(f"{_per_parameter(method, name):.1f}" for name in names)


def _full(method: str, names: tuple[str, ...]) -> str:
    others = tuple(name for name in MODELS if name not in names)
    least, most = (pick(_per_parameter(method, name) for name in others) for pick in (min, max))
    return (
        f"theirs are {_listed(method, names)} bytes for each parameter, in the other columns {least:.1f} to "
        f"{most:.1f}. Weights, gradients and AdamW's two moments in fp32 are 16, and a copy for the arithmetic makes "
        "18; what the rest is, is not said"
    )


def _freeze(method: str, names: tuple[str, ...]) -> str:
    counts = [_most(_model(name).num_layers or 0, _there(method, name), method, name) for name in names]
    return (
        "how many layers train is not said. Here it is two: 16 bytes for each of their parameters, 2 for each of the "
        f"others. Theirs are what {_and(counts)} layers take"
    )


def _most(limit: int, there: float, method: str, name: str) -> int:
    """Layers that may train within what is published."""
    return max(n for n in range(1, limit + 1) if gigabytes(method, name, layers=f"last:{n}") <= there)


def _and(words: Iterable[object]) -> str:
    *before, last = map(str, words)
    return f"{', '.join(before)} and {last}" if before else last


def _eight_bits(method: str, names: tuple[str, ...]) -> str:
    others = [_per_parameter(method, name) for name in MODELS if name not in names]
    return (
        f"theirs are {_listed(method, names)} bytes for each parameter, in the other columns {min(others):.1f} to "
        f"{max(others):.1f}. Here every matrix of attention and experts takes one"
    )


def _four_bits(method: str, names: tuple[str, ...]) -> str:
    (name,) = names
    batch = max(b for b in range(1, 65) if gigabytes(method, name, b) <= _there(method, name))
    length = _run().train.max_length
    return (
        f"theirs are {_per_parameter(method, name):.2f} bytes for each parameter, in 65B "
        f"{_per_parameter(method, '65B'):.2f}; the length of a sequence and their number are not said. Here {batch} of "
        f"{length:,} tokens at once take {gigabytes(method, name, batch):.1f} GB"
    )


Reason = tuple[str, tuple[str, ...], Callable[[str, tuple[str, ...]], str]]
REASONS: tuple[Reason, ...] = (
    ("full, fp32 weights", ("7B", "13B"), _full),
    ("freeze, last 2 layers", ("30B", "65B", "8x7B"), _freeze),
    ("QLoRA, 8 bits", ("8x7B",), _eight_bits),
    ("QLoRA, 4 bits", ("13B",), _four_bits),
)
