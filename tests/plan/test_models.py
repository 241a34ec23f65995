"""The model catalogue says what is true: transformers builds every model from it, and counts the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from runner.config import conf_files
from runner.hub.model_config import config_of
from runner.spec import ModelSpec

NAMES = conf_files.options("model")
KNOWN = [name for name in NAMES if conf_files.load_choice("model", name).get("architecture")]

# Facts that size a model: memory and time cannot be planned without one of them.
SIZING = (
    "num_parameters",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "context_length",
    "tie_embeddings",
)


def spec_of(name: str) -> ModelSpec:
    """The catalogue's entry; `hub` gets the id that its user must give."""
    values = conf_files.load_choice("model", name)
    return ModelSpec.model_validate({"id": "org/name", **values} if name == "hub" else values)


def transformers_config(spec: ModelSpec) -> Any:
    """The architecture's own config, from the YAML facts only; biases and the like are its defaults."""
    from transformers import AutoConfig

    assert spec.architecture
    return AutoConfig.for_model(spec.architecture, **config_of(spec))


@pytest.mark.parametrize("name", NAMES)
def test_every_file_validates_and_is_named_after_itself(name: str) -> None:
    assert spec_of(name).name == name


@pytest.mark.parametrize("name", KNOWN)
def test_the_number_of_parameters_is_exact(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    spec = spec_of(name)
    with torch.device("meta"):  # shapes only: 70 B parameters in 0.1 s and no memory
        model = AutoModelForCausalLM.from_config(transformers_config(spec))
    assert sum(p.numel() for p in model.parameters()) == spec.num_parameters  # tied ones come once


@pytest.mark.parametrize("name", KNOWN)
def test_no_fact_that_sizes_a_model_is_missing(name: str) -> None:
    spec = spec_of(name)
    assert [fact for fact in SIZING if getattr(spec, fact) is None] == []
    assert (spec.num_experts is None) == (spec.experts_per_token is None)
    assert len(spec.aliases) <= 3


@pytest.mark.parametrize("name", KNOWN)
def test_head_dim_stands_only_where_it_says_something(name: str) -> None:
    spec = spec_of(name)
    assert spec.hidden_size and spec.num_heads
    assert spec.head_dim != spec.hidden_size // spec.num_heads


def test_nobody_can_mean_two_models() -> None:
    said = {n: {s.casefold() for s in (n, spec_of(n).title, *spec_of(n).aliases) if s} for n in NAMES}
    clashes = [(a, b, said[a] & said[b]) for a, b in itertools.combinations(NAMES, 2) if said[a] & said[b]]
    assert clashes == []


@pytest.mark.parametrize("name", KNOWN)
def test_metas_and_googles_models_are_gated(name: str) -> None:
    spec = spec_of(name)
    assert spec.gated == spec.id.startswith(("meta-llama/", "google/gemma"))


def test_hub_without_an_id_says_that_the_id_is_missing() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        ModelSpec.model_validate(conf_files.load_choice("model", "hub"))
    (problem,) = caught.value.errors()
    assert (problem["loc"], problem["type"]) == (("id",), "missing")


def test_larger_models_start_from_smaller_rates() -> None:
    # Mixtral goes by its 12.9 B active parameters, and random weights by other rates, so they are left out.
    rated = [n for n in KNOWN if "learning_rate_full" in conf_files.load_choice("model", n)]  # others have the schema's
    known = [s for s in map(spec_of, rated) if not s.num_experts and not s.from_scratch]
    specs = sorted(known, key=lambda s: s.num_parameters or 0)
    for rates in ([s.learning_rate_full for s in specs], [s.learning_rate_adapter for s in specs]):
        assert rates == sorted(rates, reverse=True)
