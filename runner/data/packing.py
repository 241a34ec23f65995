"""Best-fit decreasing: which rows share a sequence, so that few positions stay empty.

Each row, the longest first, goes into the fullest sequence that has room for it (arXiv 2404.10830); where none has, it
begins a new one. Equal to TRL's packing of one batch, bin by bin; but TRL packs a thousand rows at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence


def bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of the rows of every sequence; rows of no tokens are left out, and each must fit into `limit`.

    A set bit `s` of one large number means "there is a sequence with room for s": the lowest one that is not below a
    length is found in about 0.2 µs, whatever the number of sequences. A million rows take some seconds.
    """
    spaces = 0
    with_space: dict[int, deque[list[int]]] = defaultdict(deque)
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[row]
        if not length:
            continue
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = with_space[space].popleft()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, sequence = limit, []
            found.append(sequence)
        sequence.append(row)
        left = space - length
        if left:
            with_space[left].append(sequence)
            spaces |= 1 << left
    return found
