"""Recognises a config file of another trainer, and says what its keys are called here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from runner.config import conf_files, yaml_files
from runner.config.did_you_mean import nearest_key
from runner.config.other_trainers_keys import NONE, PEERS, TORCHTUNE
from runner.config.provenance import display_path
from runner.config.schema_keys import known_keys
from runner.errors import Problem
from runner.spec import RunSpec

MARKS = {
    "an Axolotl config": (
        "base_model", "adapter", "datasets", "sequence_len", "sample_packing", "val_set_size", "lora_target_linear",
        "lora_target_modules", "micro_batch_size", "num_epochs", "lr_scheduler", "flash_attention",
        "pad_to_sequence_len", "dataset_prepared_path", "special_tokens", "rl", "model_type", "tokenizer_type",
        "plugins", "evals_per_epoch", "saves_per_epoch", "wandb_entity", "strict", "train_on_inputs", "tf32",
        "test_datasets",
    ),
    "a LLaMA-Factory config": (
        "finetuning_type", "stage", "dataset", "template", "cutoff_len", "lora_rank", "lora_target", "do_train",
        "overwrite_cache", "overwrite_output_dir", "plot_loss", "preprocessing_num_workers", "val_size", "max_samples",
        "pref_beta", "pref_loss", "quantization_bit", "dataset_dir", "eval_dataset", "flash_attn", "infer_backend",
        "enable_liger_kernel", "trust_remote_code", "adapter_name_or_path", "export_dir", "dataloader_num_workers",
    ),
    "a TRL config": (
        "dataset_name", "dataset_config", "use_peft", "dataset_train_split", "dataset_test_split", "lora_r",
        "loss_type", "load_in_4bit", "load_in_8bit", "dataset_mixer", "dataset_mixture", "dataset_num_proc",
        "attn_implementation", "assistant_only_loss", "completion_only_loss", "max_completion_length",
        "num_generations", "reward_funcs", "model_revision", "packing", "max_seq_length", "torch_dtype", "dtype",
        "beta", "max_prompt_length",
    ),
    "a file of transformers' TrainingArguments": (
        "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "output_dir", "logging_steps",
        "save_strategy", "eval_strategy", "evaluation_strategy", "lr_scheduler_type", "warmup_steps", "optim",
        "report_to", "logging_strategy", "load_best_model_at_end", "remove_unused_columns", "push_to_hub",
    ),
    "an Accelerate config": (
        "compute_environment", "distributed_type", "machine_rank", "num_machines", "num_processes",
        "main_training_function", "downcast_bf16", "rdzv_backend", "same_network", "use_cpu", "deepspeed_config",
        "fsdp_config",
    ),
}  # fmt: skip
"""Top-level keys by which each is known: a key of TrainingArguments may be in LLaMA-Factory's or TRL's file, too."""
_SHARED = ("model_name_or_path", "lora_alpha", "learning_rate", "gradient_accumulation_steps", "lora_dropout")


def problems_in(file: Path) -> list[Problem]:
    """The one problem of a file that another trainer reads; none for a file that may be a recipe."""
    with file.open(encoding="utf-8") as stream:
        node = yaml_files.compose(stream)
    if not isinstance(node, yaml.MappingNode):
        return []
    words = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    if "defaults" in words:
        return []
    leaves = list(_leaves(node))
    if any(word.endswith("._component_") for word in leaves):
        keys = {word: TORCHTUNE[word] for word in leaves if word in TORCHTUNE}
        lines = [f"{word} → {_written(key)}" for word, key in keys.items()]
        rest = [word for word in leaves if word not in keys and not word.endswith("._component_")]
        return [_problem(file, "a torchtune config", lines, rest)]
    if not (trainer := _trainer(words)):
        return []
    here = {word: told for word in words if (told := _here(word, trainer))}
    lines = [f"{word} → {told}" for word, told in here.items()]
    return [_problem(file, trainer, lines, [word for word in words if word not in here])]


def _leaves(node: yaml.MappingNode, prefix: str = "") -> Iterator[str]:
    """Every dotted key that holds no mapping."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from _leaves(value, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}"


def _problem(file: Path, trainer: str, lines: list[str], rest: list[str]) -> Problem:
    """Whose file it is, what its keys are called here, and the `rest`, which have none."""
    if rest:
        lines = [*lines, f"without a key here: {', '.join(rest)}"]
    remedy = "write a recipe, as docs/recipes.md shows; its keys are called here\n      " + "\n      ".join(lines)
    return Problem(f"{display_path(file)} is {trainer}, and this runner has keys of its own", None, remedy)


def _trainer(words: dict[str, int]) -> str | None:
    """Whose keys these are, if more of them are another trainer's than ours."""
    scores = {trainer: sum(word in words for word in marks) for trainer, marks in MARKS.items()}
    theirs = {w for w in words if w in PEERS or w in NONE or w in _SHARED or any(w in m for m in MARKS.values())}
    if len(theirs - {"dataset"}) <= len(words.keys() & RunSpec.model_fields.keys()):
        return None
    best = max(scores, key=lambda trainer: scores[trainer])
    return best if scores[best] else "a config of another trainer"


def _here(word: str, trainer: str) -> str | None:
    """Our name of another trainer's key, or why it is not needed."""
    if word in NONE:
        return f"leave it out: {NONE[word]}"
    if word == "stage" and "LLaMA-Factory" in trainer:  # sft, dpo, …; elsewhere it is ZeRO's
        return _choice("objective")
    key = nearest_key(word) if word in PEERS or word in {k.rpartition(".")[2] for k in known_keys()} else None
    if key in conf_files.GROUPS:
        return _choice(key)
    return key and _written(key)


def _written(key: str) -> str:
    return "{}: {{{}: …}}".format(*key.split(".", 1))


def _choice(group: str) -> str:
    return f"- override /{group}: …, in the defaults list"
