"""Base class of the parts of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Layers = str | list[int | str]
CODE = r"^.+\.py:[A-Za-z_][A-Za-z0-9_]*$"
"""A name in a Python file of the user: `FILE.py:NAME`."""
OwnCode = Annotated[str, Field(pattern=CODE)]


def is_own(name: str | None) -> bool:
    """The value names a class or function of the user's: `FILE.py:NAME`."""
    return name is not None and ".py:" in name


class Part(BaseModel):
    """Base of every part of a run: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class Named(Part):
    """A part chosen by name from a `conf/` group, with what people call it."""

    title: str | None = None
    """Display name, such as `Mistral 7B`."""
    aliases: list[str] = []
    """Other names in common use, with their usual case, for "did you mean" and the `commands` data set, which omits models and hardware without any."""
