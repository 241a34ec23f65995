"""Main memory and disk: file sizes against real checkpoints, terms against what each stage does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from runner.plan import host_memory
from runner.plan.host_memory import WeightBytes, checkpoint, disk, final_model, host_ram, pinned

GIB = 2**30
SEVEN_B = 7_000_000_000


def tiny_model(kind: str, tied: bool = False) -> Any:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if kind == "full16":
        model.to(torch.bfloat16)
    elif kind == "freeze":
        model.to(torch.bfloat16).requires_grad_(False)
        for parameter in model.model.layers[1:].parameters():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    elif kind == "lora":
        model.to(torch.bfloat16)
        return get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    return model


def trained_of(kind: str, model: Any) -> WeightBytes:
    """The counts of a real model: an adapter's values are not the base's."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    method: Any = {"full16": "full"}.get(kind, kind)
    base = everything - trainable if kind == "lora" else everything
    small = kind == "full16"
    return WeightBytes(method, base, trainable, bytes_trained=2 if small else 4, bytes_optimizer=4.0 if small else 8.0)


def size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


@pytest.mark.parametrize("kind", ["full", "full16", "freeze", "lora"])
def test_a_checkpoint_of_transformers_is_as_large_as_planned(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    trained = trained_of(kind, model)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2, "labels": [[1, 2, 3, 4]] * 2})
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to=[], per_device_train_batch_size=2,
        disable_tqdm=True, dataloader_pin_memory=False, bf16=kind != "full16",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    folder = tmp_path / "checkpoint-1"
    expected = checkpoint(trained, 0)
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert size(folder, weights) == pytest.approx(expected["weights"], rel=0.05)
    assert size(folder, "optimizer.pt") == pytest.approx(expected["optimizer"], rel=0.05)
    rest = size(folder, "*") - size(folder, weights) - size(folder, "optimizer.pt")
    assert rest < 100_000  # settings, schedule, random state: nothing that grows with the model


def test_the_tokenised_cache_takes_twelve_bytes_a_token(tmp_path: Path) -> None:
    from trl import pack_dataset

    tokens = list(range(300, 500))
    rows = pack_dataset(Dataset.from_dict({"input_ids": [tokens] * 500, "labels": [tokens] * 500}), 1024, "bfd")
    rows.save_to_disk(str(tmp_path / "rows"))
    assert size(tmp_path / "rows", "*") == pytest.approx(host_memory.TOKENISED_FILE * 500 * 200, rel=0.05)


def test_deepspeed_checkpoints_hold_16_bit_weights_and_fp32_states() -> None:
    """12 bytes for states; stages 1 and 2 write the module's 16-bit weights as well."""
    full = WeightBytes("full", SEVEN_B, SEVEN_B, bytes_trained=2)
    assert {stage: sum(checkpoint(full, stage).values()) / SEVEN_B for stage in (1, 2, 3)} == {1: 14, 2: 14, 3: 12}


DEEPSPEED = """
import importlib, json, os, pathlib, sys
import deepspeed, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # compiles for a minute, under a lock
deepspeed.init_distributed("gloo")
config = LlamaConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=True)
sizes = {}
for kind, stage in (("lora", 2), ("freeze", 3), ("full", 1)):
    model = LlamaForCausalLM(config)
    base = sum(p.numel() for p in model.parameters())
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
    elif kind == "freeze":
        model.requires_grad_(False)
        model.model.layers[2:].requires_grad_(True)
    trains = [p for p in model.parameters() if p.requires_grad]
    settings = {"train_batch_size": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage}}
    trainable = sum(p.numel() for p in trains)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trains), config=settings)
    ids = torch.randint(0, 1000, (1, 16))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    folder = pathlib.Path(sys.argv[1]) / kind
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=kind == "lora")
    found = {what: sum(f.stat().st_size for f in folder.rglob(f"*{what}_states.pt")) for what in ("model", "optim")}
    sizes[kind] = [stage, base, trainable, found["model"], found["optim"]]
print("SIZES", json.dumps(sizes))
"""


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed_is_as_large_as_planned(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment = os.environ | alone | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DEEPSPEED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("SIZES ")), None)
    assert line, done.stderr[-2000:]
    for kind, (stage, base, trainable, weights, states) in json.loads(line.removeprefix("SIZES ")).items():
        trained = WeightBytes(kind, base, trainable, bytes_trained=2)
        expected = checkpoint(trained, stage, tied_values=128 * 1000)
        assert weights == pytest.approx(expected["deepspeed_weights"], rel=0.05), kind
        assert states == pytest.approx(expected["optimizer"], rel=0.05), kind


def test_frozen_weights_are_written_again_from_stage_2_on() -> None:
    freeze = WeightBytes("freeze", 10, 4, bytes_trained=2)
    assert [checkpoint(freeze, stage)["deepspeed_weights"] for stage in (1, 2, 3)] == [20, 20 + 12, 12]


def test_an_adapter_checkpoint_leaves_the_base_out_but_for_a_tied_head() -> None:
    lora = WeightBytes("lora", SEVEN_B, 1_000_000)
    assert sum(checkpoint(lora, 0).values()) == 12e6
    assert sum(checkpoint(lora, 2).values()) == 14e6
    assert checkpoint(lora, 2, tied_values=500)["deepspeed_weights"] == 2e6 + 1000
    assert checkpoint(lora, 3, tied_values=500)["deepspeed_weights"] == 0


def test_disk_holds_as_many_checkpoints_as_are_there_at_once() -> None:
    full = WeightBytes("full", SEVEN_B, SEVEN_B)
    terms = disk(full, 0, source="hub", checkpoints=3, data_tokens=1000)
    assert terms == {
        "weights": 14e9, "checkpoints": 3 * 12 * 7e9, "final_model": 14e9, "tokenised": 12_000,
    }  # fmt: skip
    seldom = disk(full, 0, source="folder", checkpoints=1)
    assert seldom == {"checkpoints": 12 * 7e9, "final_model": 14e9}
    assert final_model(WeightBytes("qlora4", SEVEN_B, 1000, bytes_trained=2)) == 4000


@pytest.mark.parametrize(("asked", "taken"), [(1, 1), (2**20, 2**20), (2**20 + 1, 2**21), (2.25 * GIB, 4 * GIB)])
def test_pinned_memory_comes_in_powers_of_two(asked: float, taken: int) -> None:
    assert pinned(asked) == taken


def ram(
    trained: WeightBytes, stage: int, accelerator: Literal["cuda", "cpu"] = "cuda", **more: Any
) -> dict[str, float]:
    return host_ram(trained, stage, accelerator=accelerator, **({"processes": 1} | more))


def test_a_model_on_one_gpu_passes_through_main_memory_when_saved_one_file_at_a_time() -> None:
    assert ram(WeightBytes("full", SEVEN_B, SEVEN_B), 0, held=28e9)["saving"] == 28e9
    assert ram(WeightBytes("full", 10 * SEVEN_B, 10 * SEVEN_B), 0, held=280e9)["saving"] == host_memory.SHARD
    terms = ram(WeightBytes("lora", SEVEN_B, 1_000_000), 0, held=14e9)
    assert terms == {"processes": host_memory.CUDA_PROCESS, "saving": 4e6}


def test_zero_3_gathers_in_one_process_what_it_saves() -> None:
    lora = WeightBytes("lora", 10 * SEVEN_B, 1_000_000)
    assert ram(lora, 2, processes=8, held=140e9)["saving"] == 4e6
    assert ram(lora, 3, processes=8, held=17.5e9)["saving"] == 4e6
    assert ram(WeightBytes("full", SEVEN_B, SEVEN_B), 3, processes=8, held=2e9)["saving"] == 14e9


def test_loading_converts_a_few_matrices_at_a_time() -> None:
    wide = 4096 * 14336
    assert "loading" not in ram(WeightBytes("lora", SEVEN_B, 10), 0, largest_matrix=wide)
    assert ram(WeightBytes("qlora8", SEVEN_B, 10), 0, processes=2, largest_matrix=wide)["loading"] == 2 * 2 * wide
    fp32 = WeightBytes("full", 10, 10, bytes_trained=4)
    assert ram(fp32, 0, largest_matrix=wide)["loading"] == 4 * 4 * wide
    assert "loading" not in ram(fp32, 3, largest_matrix=wide)


def test_of_the_phases_that_follow_each_other_only_the_largest_counts() -> None:
    terms = ram(WeightBytes("qlora8", SEVEN_B, 10), 0, largest_matrix=1000, data_tokens=1_000_000)
    assert terms == {"processes": host_memory.CUDA_PROCESS, "data": 83e6, "tokenising": 54e6}


def test_offloaded_states_count_per_process_with_their_rounding() -> None:
    terms = ram(WeightBytes("full", SEVEN_B, SEVEN_B), 3, processes=4, pinned_blocks=(3 * GIB, GIB), pageable=5.0)
    assert terms["offloaded"] == 4 * (4 * GIB + GIB + 5)


def test_on_a_cpu_the_training_itself_is_in_main_memory() -> None:
    terms = ram(WeightBytes("lora", SEVEN_B, 10), 0, "cpu", training=20e9, held=14e9)
    assert terms == {"processes": host_memory.CPU_PROCESS, "training": 20e9}
