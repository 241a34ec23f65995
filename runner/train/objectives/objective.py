"""Base class of the objectives: rows, columns, settings, trainer and reward of each in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from runner.data import load
from runner.data.examples import Example
from runner.spec import RunSpec
from runner.train import trainer
from runner.train.guarded_trainer import LossGuardMixin
from runner.train.token_cache import Tell, Tokenised


@dataclass(frozen=True)
class Examples:
    """Rows as they were read."""

    train: Any
    """A sequence, or a stream that knows its length."""
    held: Any | None
    fingerprint: str
    """SHA-256 over all of them."""
    asked: list[Example]
    """Held-out rows with a prompt and one right answer, which the model is asked."""
    note: str | None = None
    """What was left out, for people."""
    num_skipped: int = 0
    """Rows that were."""


class Objective(ABC):
    """How the worker trains for one objective.

    A class of your own, named by `objective.code`, is a subclass of the shipped one whose rows it takes (`Sft`, `Dpo`,
    …) and overrides what differs; `self.spec.objective.options` are its settings. What an objective adds to a step in
    the plan is in its class in `runner/spec/objective.py`.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec

    def read(self) -> Examples:
        """The rows of a run, checked; RequestError with all that is wrong with them."""
        found = load.read_dataset(self.spec.data, self.spec.train.seed, self.spec.objective.learns_from)
        skipped = len({problem.source for problem in found.skipped})
        digest = load.fingerprint(chain(found.train, found.held))
        return Examples(found.train, found.held, digest, self.asked(found.held), found.note, skipped)

    def asked(self, held: Sequence[Any]) -> list[Example]:
        """Held-out rows that the model is asked before and after training."""
        return []

    def judge(self, examples: Examples) -> Callable[[list[str]], dict[str, float]] | None:
        """What reward functions say of answers to the held-out prompts; None without any."""
        return None

    @abstractmethod
    def tokenise(
        self, rows: Sequence[Any], tokenizer: Any, tell: Tell | None = None, *, held: bool = False
    ) -> Tokenised:
        """Rows as the trainer takes them, from the cache where they are there; `tell` hears of those that are done."""

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps of the whole run over so many rows."""
        return trainer.num_steps(self.spec, num_rows)

    @abstractmethod
    def settings(self, shared: dict[str, Any]) -> Any:
        """TRL's settings; `shared` are those that all objectives have."""

    @abstractmethod
    def trainer(self, source: str, model: Any, adapter: Any, common: dict[str, Any]) -> LossGuardMixin:
        """The trainer of `model` with PEFT's configuration `adapter` put on it; `common` are its other arguments."""
