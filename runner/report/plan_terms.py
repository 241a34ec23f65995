"""Labels of the plan's memory terms, and the families that bars show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType

from runner.config import conf_files
from runner.plan.plan import Plan


@dataclass(frozen=True)
class Family:
    """Terms that share one colour, on the terminal and in the picture."""

    name: str
    colour: str
    """Dark and light of one hue for what belongs together; hues that differ for the colour-blind, too."""
    fill: str
    """Where there is no colour."""
    letter: str
    """Where there is no Unicode either."""


WEIGHTS = Family("weights", "#2f6fb0", "█", "W")
MASTER = Family("master weights", "#9cc7ec", "▓", "M")
OPTIMIZER = Family("optimiser", "#d9822b", "▒", "O")
GRADIENTS = Family("gradients", "#f4c66b", "░", "G")
ACTIVATIONS = Family("activations", "#1d8a7a", "▪", "A")
HEAD = Family("head and loss", "#8fd6c4", "+", "H")
OTHER = Family("other", "#8a8f98", "·", ".")

FAMILIES = (WEIGHTS, MASTER, OPTIMIZER, GRADIENTS, ACTIVATIONS, HEAD, OTHER)
"""In the order in which they stand in a bar: what stays first, then what comes and goes."""

TERMS: dict[str, tuple[str, Family]] = {
    "weights": ("weights", WEIGHTS),
    "frozen_weights": ("frozen weights", WEIGHTS),
    "trained_weights": ("trained weights", WEIGHTS),
    "reference": ("weights of the reference model", WEIGHTS),
    "weight_casts": ("16-bit and dequantised copies of weights", WEIGHTS),
    "largest_matrix": ("the largest matrix while it is loaded", WEIGHTS),
    "master_weights": ("fp32 master weights", MASTER),
    "optimizer": ("optimiser states", OPTIMIZER),
    "gradients": ("gradients", GRADIENTS),
    "activations": ("activations", ACTIVATIONS),
    "kv_cache": ("keys and values of the answers", ACTIVATIONS),
    "head_and_loss": ("head and loss", HEAD),
    "ddp_buckets": ("DDP's buckets", OTHER),
    "zero_buckets": ("ZeRO's buckets", OTHER),
    "zero_gathered": ("parameters that ZeRO-3 has gathered", OTHER),
    "orthogonalisation": ("Muon's copies of a matrix", OPTIMIZER),
    "zero_step": ("ZeRO's copies in the step", OTHER),
    "collectives": ("NCCL's buffers", OTHER),
    "process": ("process (context, libraries)", OTHER),
    "allocator_slack": ("allocator slack", OTHER),
}
"""Every term of `runner.plan.memory`: its words and its family."""

PHASES = {
    "load": "while loading",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "step": "in the optimiser step",
    "eval": "in evaluation",
    "save": "while saving",
}
"""The phases in their order, and when they are."""

STAGES = {
    "none": "no ZeRO",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero2_offload": "ZeRO-2 with offload",
    "zero3_offload": "ZeRO-3 with offload",
}


def term_of(name: str) -> tuple[str, Family]:
    """A term's words and family; one that is not listed is shown as `other`."""
    return TERMS.get(name, (name.replace("_", " "), OTHER))


def segments(terms: Mapping[str, float]) -> dict[Family, float]:
    """The terms of a phase added up by family, in the order of a bar; families with nothing are left out."""
    sums = dict.fromkeys(FAMILIES, 0.0)
    for name, size in terms.items():
        sums[term_of(name)[1]] += size
    return {family: size for family, size in sums.items() if size > 0}


def cells(sizes: list[float], scale: float, width: int) -> list[int]:
    """Return the number of cells for each size, if `scale` takes all `width`; their sum is that of the sum."""
    edges = [0, *(round(width * edge / scale) for edge in accumulate(sizes))]
    return [end - start for start, end in pairwise(edges)]


def present(plan: Plan) -> list[Family]:
    """The families that a plan has, for its legend."""
    shown = {family for terms in plan.phases.values() for family in segments(terms)}
    return [family for family in FAMILIES if family in shown]


def heading(plan: Plan, titles: Mapping[str, str | None] = MappingProxyType({})) -> str:
    """`Mistral 7B, full, 3 × H100, ZeRO-3`; `titles` are those of a run, for choices of a user's own."""
    model, hw = (titles.get(group) or _title(group, getattr(plan, group)) for group in ("model", "hw"))
    parts = [model, plan.method, hw]
    if plan.num_gpus > 1 or plan.zero_stage != "none":
        parts.append(STAGES.get(plan.zero_stage, plan.zero_stage))
    return ", ".join(parts)


def gib(size: float) -> str:
    """`43.0`, `141`."""
    return f"{size:.0f}" if size >= 99.95 else f"{size:.1f}"


def recomputed(every: int) -> str:
    """Which layers are computed again: `none`, `all`, `every 2nd`."""
    if every < 2:
        return ("none", "all")[every]
    ending = "th" if every % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
    return f"every {every}{ending}"


def _title(group: str, name: str) -> str:
    """As people call it; the name itself where the catalogue has no title for it."""
    if name not in conf_files.options(group):
        return name
    return str(conf_files.load_choice(group, name).get("title") or name)
