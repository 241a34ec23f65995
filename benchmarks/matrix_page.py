"""docs/compatibility.md: what `benchmarks.matrix` found, as tables; and which finding counts as a tick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.bench import ROOT

PAGE = ROOT / "docs" / "compatibility.md"
Facts = Mapping[str, Any]

CHECKS = {
    "train": "The loss of every step, beside the same run without ZeRO; the held-out loss fell",
    "save": "Checkpoints and `model/` whole; what should train changed, and nothing else",
    "resume": "Losses and final weights of the run, finished again from its first checkpoint, beside those of the run",
    "reload": "Held-out loss of `model/`, read by plain transformers (or peft) in one process, document by document, "
    "beside what the run measured",
    "export": "`export` of the last checkpoint, beside `model/`",
    "merge": "Logits of the merged model beside base + adapter: the typical difference, as a share of what `merge` "
    "allows for rounding to 16 bits",
    "alone": "Losses of the steps and the held-out loss, beside those of one process with the same global batch",
}
BOUNDS = {"train": 1e-5, "save": 0.0, "resume": 0.0, "reload": 1e-5, "export": 0.0, "merge": 1.0, "alone": 1e-5}
"""Most that two things may be apart: losses relatively, weights absolutely."""
BF16_BOUNDS = BOUNDS | {"train": 2e-3, "reload": 1e-4, "alone": 1e-4}
"""Arithmetic in bf16 (8 bits, 4e-3): without ZeRO autocast leaves parts of it in fp32, with ZeRO all of it is bf16."""

MIXTURES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "olmoe": "OLMoE"}
"""`model_type` → how its rows end. DeepSpeed 0.19 makes the blocks of the first two leaves of ZeRO-3 by itself."""

INTRO = """\
<!-- Written by `python -m benchmarks matrix` from benchmarks/results/matrix.json: run it again instead of editing. -->

# Methods by ZeRO stage

Every cell was run: two processes train a model for {steps} steps, and all checks below are applied. A ✓ means that
every check is within its bound. Combinations that cannot work are refused by `plan` and by every run, with the
message in the footnote. `python -m benchmarks matrix` repeats the measurement ({seconds:.0f} s here; every number is
in benchmarks/results/matrix.json), and the test suite repeats the first table (tests/train/test_matrix.py).

The processes are two CPU ranks over gloo, which shows that sharding, checkpoints and numbers are correct. It shows
nothing about speed, and no CUDA kernel was involved. Offloading copies from CPU to CPU here. The model is a Llama
with grouped-query attention and tied embeddings, 3 layers of width 64. For ZeRO to have an effect on it, the limits
in `deepspeed_configs/` that count elements are 20,000 instead of 2e8 to 1e9; all other settings are unchanged.
"""

OPTIONS = """
## Options

Only stages that differ in kind are listed: ZeRO-1 differs from ZeRO-2 in when gradients are reduced, and offloading
moves the same tensors. PiSSA and OLoRA initialise the adapter from the base, DoRA reads the base's weights, and
*saved modules* are `embed_tokens` and `lm_head`, one matrix in this model. With `method.dropout=0.1` each process has
its own random numbers, so one process cannot be compared with two.
"""

BF16 = """
## bf16

The tables above use fp32, which shows the smallest error. The same with `train.precision=bf16`:
"""

EXPERTS = """
## Mixtures of experts

The same model with 4 experts per layer, 2 of them per token, in fp32. Under ZeRO-3 the parameters of a block with
experts are gathered together, by DeepSpeed for Mixtral and Qwen3-MoE, by the runner for others such as OLMoE.
"""

MEANING = """
## Checks

Losses are compared relatively, weights absolutely; 0 means bitwise equality.
"""


def answers(facts: Facts) -> Iterator[tuple[str, Any, float]]:
    """Every check that was made of a cell: its name, what it found, and the most it may find."""
    bounds = BF16_BOUNDS if facts["row"].endswith("bf16") else BOUNDS
    for check in CHECKS:
        found = facts["apart"].get(check)
        if found is not None:
            yield check, found, bounds[check]


def failures(facts: Facts) -> list[str]:
    """Checks of a cell that failed, each with what it found; none for one that is refused."""
    if facts["refused"]:
        return []
    wrong = [f"{name}: {found}" for name, found, bound in answers(facts) if isinstance(found, str)]
    return wrong + [f"{name}: {found:.2g} > {bound:g}" for name, found, bound in _numbers(facts) if not found <= bound]


def page(result: Facts, shown: str) -> str:
    """The whole page; `shown` is the benchmark's own section, with what it was measured on."""
    losses = next(facts["losses"] for facts in result["measured"]["cells"] if not facts["refused"])
    return INTRO.format(steps=len(losses), seconds=result["measured"]["seconds"]) + "\n" + shown


def section(measured: Facts) -> str:
    """All tables."""
    cells: Sequence[Facts] = measured["cells"]
    notes: list[str] = []
    plain = [facts for facts in cells if "," not in facts["row"]]
    mixtures = [facts for facts in cells if facts["row"].endswith(tuple(MIXTURES.values()))]
    bf16 = [facts for facts in cells if facts["row"].endswith("bf16")]
    rest = [facts for facts in cells if facts not in [*plain, *bf16, *mixtures]]
    parts = [_matrix(plain, notes)]
    parts += [OPTIONS, _matrix(rest, notes)] if rest else []
    parts += [BF16, _matrix(bf16, notes)] if bf16 else []
    parts += [EXPERTS, _matrix(mixtures, notes)] if mixtures else []
    parts += [MEANING, _bounds(cells)]
    return "\n".join([*parts, *(f"[^{number}]: {note}" for number, note in enumerate(notes, 1))])


def _matrix(cells: Sequence[Facts], notes: list[str]) -> str:
    """Rows × stages; footnotes are added to `notes`."""
    stages = list(dict.fromkeys(facts["stage"] for facts in cells))
    found = {(facts["row"], facts["stage"]): _cell(facts, notes) for facts in cells}
    rows = dict.fromkeys(facts["row"] for facts in cells)
    lines = [[row, *(found.get((row, stage), "") for stage in stages)] for row in rows]
    return _centred(["method", *(f"`{stage}`" for stage in stages)], lines)


def _cell(facts: Facts, notes: list[str]) -> str:
    """A tick, a refusal, or what failed; each with its footnote."""
    if facts["refused"]:
        return "refused" + _note("{what}; {remedy}.".format(**facts["refused"]), notes)
    wrong = failures(facts)
    if wrong:
        return f"✗{_note('; '.join(wrong), notes)}"
    partly = [f"`{name}`: {found['refused']}." for name, found, _ in answers(facts) if isinstance(found, dict)]
    return "✓" + "".join(_note(words, notes) for words in partly)


def _note(words: str, notes: list[str]) -> str:
    if words not in notes:
        notes.append(words)
    return f"[^{notes.index(words) + 1}]"


def _numbers(facts: Facts) -> Iterator[tuple[str, float, float]]:
    for name, found, bound in answers(facts):
        if isinstance(found, (int, float)):
            yield name, float(found), bound


def _bounds(cells: Sequence[Facts]) -> str:
    """Per check: what is compared, the bounds, and the worst that was found, in fp32 and in bf16."""
    lines = []
    for check, words in CHECKS.items():
        worst = []
        for bf16, bounds in ((False, BOUNDS), (True, BF16_BOUNDS)):
            some = [facts for facts in cells if not facts["refused"] and facts["row"].endswith("bf16") == bf16]
            found = [(value, facts) for facts in some for name, value, _ in _numbers(facts) if name == check]
            text = "–"
            if found:
                value, facts = max(found, key=lambda pair: pair[0])
                text = f"{value:.2g}" + (f" ({facts['row']}, `{facts['stage']}`)" if value else "")
            worst += [f"{bounds[check]:g}", text]
        lines.append([f"**{check}**: {words}", *worst])
    return _centred(["check", "bound", "worst", "bound, bf16", "worst, bf16"], lines)


def _centred(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others in the middle."""
    lines = [head, ["---", *[":---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
