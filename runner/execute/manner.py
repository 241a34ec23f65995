"""How a user wants a run started; nothing of this belongs to the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Manner:
    """Options of the command line that concern rented machines."""

    yes: bool = False
    """Do not ask."""
    detach: bool = False
    """Leave as soon as it trains."""


PLAINLY = Manner()
"""None of them."""
