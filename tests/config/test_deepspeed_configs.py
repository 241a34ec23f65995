"""The DeepSpeed JSONs do what their names say and leave to transformers what the run decides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.config import conf_files
from runner.paths import DEEPSPEED_CONFIGS

NAMES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")

# The keys of `zero_optimization` that transformers fills in (from the hidden size) where they are
# "auto": HfTrainerDeepSpeedConfig.trainer_config_finalize. The last two only exist for stage 3.
AUTO_IN_ZERO = {"reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEEPSPEED_CONFIGS / f"{name}.json").read_text("utf-8"))
    return loaded


def test_there_is_one_file_for_every_stage_and_no_other() -> None:
    assert sorted(file.name for file in DEEPSPEED_CONFIGS.iterdir()) == sorted(f"{n}.json" for n in NAMES)


@pytest.mark.parametrize("name", conf_files.options("deepspeed"))
def test_every_choice_names_the_file_of_its_own_name(name: str) -> None:
    named = conf_files.load_choice("deepspeed", name).get("config")
    assert named == (f"{name}.json" if name in NAMES else None)


@pytest.mark.parametrize("name", NAMES)
def test_the_stage_is_the_one_in_the_name(name: str) -> None:
    assert config(name)["zero_optimization"]["stage"] == int(name[len("zero")])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_offload_files_offload(name: str) -> None:
    zero = config(name)["zero_optimization"]
    to_cpu = {"device": "cpu", "pin_memory": True}
    offloaded = {key: value for key, value in zero.items() if key.startswith("offload")}
    if not name.endswith("_offload"):
        assert offloaded == {}
    elif zero["stage"] == 2:  # parameters are whole on every GPU until stage 3
        assert offloaded == {"offload_optimizer": to_cpu}
    else:
        assert offloaded == {"offload_optimizer": to_cpu, "offload_param": to_cpu}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_run_decides_is_auto(name: str) -> None:
    values = config(name)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {key: values[key] for key in (*sizes, "gradient_clipping")} == dict.fromkeys(
        (*sizes, "gradient_clipping"), "auto"
    )
    assert values["bf16"] == values["fp16"] == {"enabled": "auto"}
    # Optimiser and schedule are the trainer's: a block here would quietly replace them.
    assert not {"optimizer", "scheduler"} & values.keys()


@pytest.mark.parametrize("name", NAMES)
def test_auto_stands_only_where_transformers_fills_it_in(name: str) -> None:
    zero = config(name)["zero_optimization"]
    assert {key for key, value in zero.items() if value == "auto"} <= AUTO_IN_ZERO
    assert zero["stage"] == 3 or not any(key.startswith("stage3") for key in zero)
