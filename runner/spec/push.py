"""`push`: where the model goes when it is trained, and what goes there before."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from runner.spec.base_model import Part


class PushSpec(Part):
    """Where the model is uploaded, from wherever it was trained."""

    to: str | None = None
    """Upload the model, a card and the spec when the run is done: a Hub id `org/name` (made private if it is not there), or `s3://bucket/prefix`."""
    every_steps: int | None = Field(default=None, ge=1)
    """Upload a checkpoint every n steps as well, a multiple of `train.save_every_steps`; it goes to `checkpoints/` there, in the background."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """How many of the uploaded checkpoints stay there."""

    @field_validator("to")
    @classmethod
    def _is_a_place(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*|s3://[^/]+(/.*)?", value):
            raise ValueError("expected a repository on the Hub, or an s3:// address; write push.to=ORG/NAME")
        return value

    @model_validator(mode="after")
    def _agree(self) -> PushSpec:
        if self.every_steps is not None and self.to is None:
            raise ValueError("push.every_steps uploads to push.to; add push.to=ORG/NAME, or leave it out")
        if self.every_steps is None and self.keep_checkpoints != 1:
            raise ValueError("push.keep_checkpoints counts uploaded checkpoints; add push.every_steps=100, say")
        return self
