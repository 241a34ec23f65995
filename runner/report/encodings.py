"""Output for terminals whose encoding is not Unicode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

# One character for one, so that columns stay where they are.
_ASCII = str.maketrans("│┐┌×–—…•→’·█━", "|++x--.*>'.#=")


@contextmanager
def spelt(console: Console) -> Iterator[None]:
    """What is printed meanwhile is spelt in ASCII where the console's encoding is not Unicode."""
    if not console.options.ascii_only:
        yield
        return
    with console.capture() as captured:
        yield
    console.file.write(captured.get().translate(_ASCII).encode("ascii", "replace").decode("ascii"))
