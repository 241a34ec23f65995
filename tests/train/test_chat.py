"""An answer that a model cannot give is said in one line."""

from __future__ import annotations

from typing import Any

import pytest

from runner.errors import RunFailedError
from runner.train import chat
from runner.train.evaluation import generation
from tests.conftest import spec_of


def test_what_goes_wrong_in_an_answer_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*args: Any, **options: Any) -> list[str]:
        raise ValueError("roles must alternate\nin the template")

    monkeypatch.setattr(generation, "generate", generate)
    with pytest.raises(RunFailedError) as caught:
        chat.answer(spec_of("hw=cpu"), None, None, [], 8)
    (problem,) = caught.value.problems
    assert problem.what == "the model cannot answer: roles must alternate"
    assert problem.remedy
