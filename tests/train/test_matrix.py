"""Every method on every ZeRO stage, by two processes: trained, saved, resumed, read back, exported, merged; or refused.

docs/compatibility.md has the same table, and more rows, from `python -m benchmarks matrix`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks import matrix, matrix_page

Facts = Mapping[str, Any]
CELLS = [(row, stage) for row in matrix.METHODS for stage in matrix.STAGES]
MIXTURES = (
    (["full, Mixtral"], ["none", "zero3"]),  # experts are resumed; a tied head is in flight when it is read
    (["lora, OLMoE", "qlora4, OLMoE"], ["zero3"]),  # blocks that DeepSpeed does not know
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Facts]:
    """All cells, worked on at once: importing torch and DeepSpeed takes longer than one of these runs."""
    folder = tmp_path_factory.mktemp("matrix")
    asked = matrix.prepared(list(matrix.METHODS), matrix.STAGES, folder)
    for number, (rows, stages) in enumerate(MIXTURES):
        (folder / str(number)).mkdir()
        asked += matrix.prepared(rows, stages, folder / str(number))
    cells = matrix.worked(asked, folder)
    return {(cell["row"], cell["stage"]): cell for cell in cells}


@pytest.fixture(scope="module")
def shown() -> dict[tuple[str, str], Facts]:
    """The cells in the docs."""
    cells = json.loads(matrix.BENCHMARK.file.read_text("utf-8"))["measured"]["cells"]
    return {(cell["row"], cell["stage"]): cell for cell in cells}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "stage"), [*CELLS, *((row, stage) for rows, stages in MIXTURES for row in rows for stage in stages)]
)
def test_a_cell_answers_every_question_or_is_refused_with_a_remedy(
    found: dict[tuple[str, str], Facts], shown: dict[tuple[str, str], Facts], row: str, stage: str
) -> None:
    cell = found[row, stage]
    assert cell["refused"] == shown[row, stage]["refused"], "the docs say otherwise: run `python -m benchmarks matrix`"
    if cell["refused"]:
        assert cell["refused"]["remedy"]
        return
    assert matrix_page.failures(cell) == []
    asked = {name for name, _, _ in matrix_page.answers(cell)}
    assert asked >= {"save", "resume", "reload", "export", "alone"}
    assert ("merge" in asked) == ("lora" in row)
    assert len(cell["losses"]) == matrix.STEPS and cell["losses"][-1] < cell["losses"][0]
