"""Every error a user can meet, with its exit code.

RunnerError                  base: says what, where from, what to do instead
├── RequestError      2      the request is wrong: bad key, value, file, data
│   └── NotYetError   2      the request is right and not supported yet
├── CannotRunError    3      it does not fit, or not here, or costs too much
├── RunFailedError    1      the run started and failed
├── Rewind           75      of the worker alone: start me again from the last checkpoint
└── InterruptedRun  130      stopped by the user, with a checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 8000
"""Characters of a problem's text: a config of another trainer with all its keys has 3,000."""


@dataclass(frozen=True)
class Problem:
    """A mistake: what is wrong, its source, and a remedy."""

    what: str
    """The mistake, in one line."""
    source: str | None = None
    """Where the value came from: `command line`, or a file and line."""
    remedy: str | None = None
    """What to write or do instead."""

    def __post_init__(self) -> None:
        """Text of a stranger's file may be in it: no terminal gets its control characters, or megabytes of it."""
        for name, text in vars(self).items():
            if text is not None and (len(text) > LONGEST or not text.isprintable()):
                object.__setattr__(self, name, _printable(text))


def _printable(text: str) -> str:
    half = LONGEST // 2
    text = text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class RunnerError(Exception):
    """Base of every error that is shown to a user without a stack trace."""

    exit_code = 1

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = [Problem(p) if isinstance(p, str) else p for p in problems]
        super().__init__("; ".join(p.what for p in self.problems))

    def __reduce__(self) -> tuple[type[RunnerError], tuple[Problem, ...]]:
        return type(self), tuple(self.problems)  # survives the process boundary of parallel sweeps


class RequestError(RunnerError):
    """The request is wrong: nothing was started."""

    exit_code = 2


class NotYetError(RequestError):
    """The request is right, and this version cannot serve it."""


class CannotRunError(RunnerError):
    """The run does not fit the machine, or may not cost what it would."""

    exit_code = 3


class RunFailedError(RunnerError):
    """The run was started and failed."""


class Rewind(RunnerError):
    """The loss jumped: the worker is to start again from the last checkpoint, without the data of `rewinds.json`."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again."""


class InterruptedRun(RunnerError):
    """The run was stopped from outside and has saved what it had."""

    exit_code = 130
