"""The model card of a run: what the Hub shows beside the weights, and how to make them again."""

from __future__ import annotations

from typing import Any

import yaml

from runner import __version__
from runner.rundir import RunDir
from runner.spec import RunSpec

TITLES = {"full": "Full fine-tuning", "freeze": "Some layers trained", "lora": "LoRA", "qlora4": "QLoRA, 4 bits"}
TITLES |= {"qlora8": "QLoRA, 8 bits"}


def card(spec: RunSpec, run: RunDir, repo: str, *, adapter: bool, picture: bool) -> str:
    """README.md for `repo` (`org/name`): metadata as the Hub reads it, results, use, and the recipe in `spec.json`.

    `adapter`: what is pushed needs its base; `picture`: loss.png is pushed as well.
    """
    summary = run.read("summary.json")
    parts = [
        f"---\n{yaml.safe_dump(_metadata(spec, adapter), sort_keys=False).strip()}\n---",
        f"# {repo.partition('/')[2]}",
        f"{TITLES[spec.method.name]} of {_linked(spec)} on {_data(spec)}.",
        _results(summary),
        "![Loss](loss.png)" if picture else "",
        "## Use",
        f"```python\n{_use(repo, adapter=adapter)}\n```",
        "## How it was made",
        f"With llm-finetuning-runner {__version__}; `spec.json` beside this card is the whole run, resolved:",
        "```\npython -m runner spec.json\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(spec: RunSpec, adapter: bool) -> dict[str, Any]:
    """huggingface.co/docs/hub/model-cards#model-card-metadata; the licence is the base's, which is not known here."""
    tags = [spec.objective.name, spec.method.name, "llm-finetuning-runner"]
    found: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if _on_the_hub(spec):
        found["base_model"] = spec.model.id
        found["base_model_relation"] = "adapter" if adapter else "finetune"
    if spec.data.source == "hub" and spec.data.id:
        found["datasets"] = [spec.data.id]
    return found | {"tags": tags}


def _on_the_hub(spec: RunSpec) -> bool:
    return spec.model.package is None and not spec.model.id.startswith((".", "/", "~"))


def _linked(spec: RunSpec) -> str:
    return f"[{spec.model.id}](https://huggingface.co/{spec.model.id})" if _on_the_hub(spec) else spec.model.name


def _data(spec: RunSpec) -> str:
    if spec.data.source == "hub" and spec.data.id:
        return f"[{spec.data.id}](https://huggingface.co/datasets/{spec.data.id})"
    return f"`{spec.data.name}`" if spec.data.source != "file" else "a data set of its own"


def _results(summary: dict[str, Any]) -> str:
    """Before and after, as a table."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    rows = [("training loss, first and last step", summary["train"]["loss_first"], summary["train"]["loss_last"])]
    if "loss" in after:
        rows.append(("held-out loss", before["loss"], after["loss"]))
    lines = ["|  | before | after |", "|---|---:|---:|"]
    lines += [f"| {name} | {then:.4f} | {now:.4f} |" for name, then, now in rows]
    if "num_exact" in after:
        count = summary["eval"]["num_prompts"]
        lines.append(f"| held-out prompts answered exactly | {before['num_exact']} of {count} | {after['num_exact']} |")
    train = summary["train"]
    facts = (
        f"{train['steps']:,} steps, {train['tokens']:,} tokens, {train['trainable_parameters']:,} parameters trained"
    )
    return "\n".join([*lines, "", f"{facts}."])


def _use(repo: str, *, adapter: bool) -> str:
    if adapter:
        return (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
    )
