"""Layer ranges: `last:2`, `first:4`, `0-3`, `[0,2,5-7]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HELP = "write last:2, first:4, a range such as 0-3, or a list such as [0,2,5-7]"


@dataclass(frozen=True)
class LayerChoice:
    """A choice of layers that does not know yet how many there are."""

    first: int = 0
    last: int = 0
    indices: frozenset[int] = frozenset()

    def select(self, num_layers: int) -> tuple[int, ...]:
        """Sorted indices among `num_layers` layers; ValueError if one does not exist."""
        needed = max(self.first, self.last, max(self.indices, default=-1) + 1)
        if needed > num_layers:
            raise ValueError(f"the model has {num_layers} layers (0 to {num_layers - 1}), not {needed}; {_HELP}")
        chosen = set(self.indices) | set(range(self.first))
        chosen |= set(range(num_layers - self.last, num_layers))
        return tuple(sorted(chosen))


def parse_layers(value: str | list[int | str]) -> LayerChoice:
    """Parse one choice of layers; ValueError says what to write instead."""
    if isinstance(value, str) and (match := re.fullmatch(r"(first|last):([1-9]\d*)", value.strip())):
        count = int(match[2])
        return LayerChoice(first=count) if match[1] == "first" else LayerChoice(last=count)
    indices: set[int] = set()
    for item in value.split(",") if isinstance(value, str) else value:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item).strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{item!r} names no layers; {_HELP}")
        indices.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not indices:
        raise ValueError(f"no layers named; {_HELP}")
    return LayerChoice(indices=frozenset(indices))
