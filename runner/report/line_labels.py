"""Lines of several processes on one screen, each with the name of whose it is."""

from __future__ import annotations

import io
from typing import TextIO


class Labelled(io.TextIOBase):
    """Whole lines go on to another stream, with a label before each; to whoever asks it is no terminal."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream, self.label, self.rest = stream, label, ""

    def write(self, text: str) -> int:
        """Kept until its line has ended."""
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.label}{line}\n" if line else "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Of what is whole."""
        self.stream.flush()
