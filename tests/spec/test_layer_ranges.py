"""`last:2`, `first:4`, `0-3` and `[0,2,5-7]` mean exactly those layers, and nothing else is accepted."""

from __future__ import annotations

import pytest

from runner.spec.method import parse_layers


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("last:2", (6, 7)),
        ("first:3", (0, 1, 2)),
        ("0-3", (0, 1, 2, 3)),
        ("5", (5,)),
        ("0,2,5-7", (0, 2, 5, 6, 7)),
        ([0, 2, "5-7"], (0, 2, 5, 6, 7)),
        ([7, 1, 1], (1, 7)),
        (" last:8 ", tuple(range(8))),
        # A layer's number is not the beginning of another's: 1 is not 10.
        ([1], (1,)),
    ],
)
def test_a_choice_names_exactly_its_layers(written: str | list[int | str], layers: tuple[int, ...]) -> None:
    assert parse_layers(written).select(8) == layers


@pytest.mark.parametrize("written", ["", "last", "last:0", "last:-1", "3-1", "x", "1.5", "middle:2", "1,,2", [], [-1]])
def test_what_names_no_layer_is_refused_with_the_right_form(written: str | list[int | str]) -> None:
    with pytest.raises(ValueError, match="; write last:2, first:4, a range such as 0-3, or a list such as"):
        parse_layers(written)


@pytest.mark.parametrize("written", ["last:9", "first:9", "8", "0-8", [0, 8]])
def test_a_layer_the_model_does_not_have_is_refused(written: str | list[int | str]) -> None:
    with pytest.raises(ValueError, match=r"the model has 8 layers \(0 to 7\), not 9"):
        parse_layers(written).select(8)
