"""The model card of a run: `model/README.md`."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

import yaml

from runner import __version__
from runner.report.text import counted
from runner.rundir.directory import RunDir, write_atomically
from runner.rundir.json_files import Summary
from runner.spec import Peft, RunSpec

TITLES = {
    "full": "Full fine-tuning", "freeze": "Some layers trained", "lora": "LoRA", "qlora4": "QLoRA, 4 bits",
    "qlora8": "QLoRA, 8 bits",
}  # fmt: skip
SHOWN = (
    "learning_rate", "schedule", "warmup_ratio", "weight_decay", "optimizer", "max_grad_norm",
    "num_epochs", "max_steps", "batch_size", "micro_batch_size", "accumulation_steps", "max_length", "packing",
    "precision", "seed",
)  # fmt: skip
"""Keys of `train` that a reader compares."""
COUNTED = ("num_exact", "num_prompts", "exact_match")
PLACE = "path/to/this/folder"


def card_text(
    spec: RunSpec, run: RunDir, repo: str | None = None, *, adapter: bool, picture: bool = False,
    step: int | None = None,
) -> str:  # fmt: skip
    """README.md beside the weights: metadata as the Hub reads it, results, use, and how they were made.

    `repo` is `org/name` on the Hub, None in a folder; `adapter`: the weights need their base; `picture`: loss.png lies
    beside it; `step`: of the checkpoint that was exported. No path of this machine is in it.
    """
    summary: Summary = {} if step else run.summary
    checkpoint = f", the checkpoint after step {step}" if step else ""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(spec, adapter), sort_keys=False).strip()}\n---",
        f"# {repo.partition('/')[2] if repo else run.id}",
        f"{_title(spec)} of {_linked(spec)} on {_data(spec)}{checkpoint}.",
        _results(summary) if summary else "",
        "![Loss](loss.png)" if picture else "",
        "## Use",
        f"```python\n{_use(spec, repo or PLACE, adapter=adapter)}\n```",
        "## How it was made",
        _settings(spec, run),
        _with(run),
    ]
    if repo:
        parts += ["`spec.json` beside this card is the whole run, resolved:", "```\npython -m runner spec.json\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(spec: RunSpec, run: RunDir, folder: Path, step: int | None = None) -> None:
    """Put the card of the run into a folder with its weights."""
    text = card_text(spec, run, adapter=(folder / "adapter_config.json").is_file(), step=step)
    write_atomically(folder / "README.md", text)


def _title(spec: RunSpec) -> str:
    goal = "" if spec.objective.name == "sft" else f", objective {spec.objective.name}"
    title = spec.method.peft_type if isinstance(spec.method, Peft) else TITLES[spec.method.name]
    return f"{title}{goal}"


def _settings(spec: RunSpec, run: RunDir) -> str:
    """A table of what was chosen, by the keys of the spec."""
    chosen: list[tuple[str, str]] = [("objective", spec.objective.name), ("method", spec.method.name)]
    for part, keys in (("objective", None), ("method", None), ("train", SHOWN)):
        values = getattr(spec, part).model_dump(mode="json")
        for key in keys or values:
            if key not in ("name", "root", "tokenizer") and values.get(key) not in (None, [], {}):
                chosen.append((f"{part}.{key}", _portable(values[key])))
    chosen += [
        ("hardware", f"{spec.hw.name}, {counted(spec.hw.world_size, 'process')}"),
        ("deepspeed", spec.deepspeed.name),
    ]
    if (rows := run.summary.get("train", {}).get("examples")) is not None:
        chosen.append(("training rows", f"{rows:,}"))
    if fingerprint := run.read("environment.json").get("data_fingerprint"):
        chosen.append(("SHA-256 of the rows", str(fingerprint)))
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in chosen)])


def _portable(value: object) -> str:
    """A value without the folders of this machine."""
    if isinstance(value, list):
        return ", ".join(map(_portable, value))
    text = str(value)
    return text.rpartition("/")[2] if ".py:" in text else text.replace("|", "\\|")


def _with(run: RunDir) -> str:
    packages = run.read("environment.json").get("packages") or {}
    named = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return f"With llm-finetuning-runner {__version__}{f'; {named}' if named else ''}."


def _metadata(spec: RunSpec, adapter: bool) -> dict[str, object]:
    """huggingface.co/docs/hub/model-cards#model-card-metadata; the licence is the base's, which is not known here."""
    tags = [spec.objective.name, spec.method.name, "llm-finetuning-runner"]
    task = "text-classification" if spec.objective.scores else "text-generation"  # huggingface.co/tasks
    found: dict[str, object] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    if _on_the_hub(spec):
        found["base_model"] = spec.model.id
        found["base_model_relation"] = "adapter" if adapter else "finetune"
    if spec.data.source == "hub" and spec.data.id and not _is_folder(spec.data.id):
        found["datasets"] = [spec.data.id]
    return found | {"tags": tags}


def _on_the_hub(spec: RunSpec) -> bool:
    named = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", spec.model.id)
    return spec.model.package is None and not spec.model.from_scratch and named is not None


def _is_folder(data_id: str) -> bool:
    """A place on a disk; ids of the Hub have at most one slash, between names."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", data_id) is None


def _linked(spec: RunSpec) -> str:
    if spec.model.from_scratch:
        return f"{spec.model.name}, from random weights,"
    if _on_the_hub(spec):
        revision = f" at {spec.model.revision}" if spec.model.revision else ""
        return f"[{spec.model.id}](https://huggingface.co/{spec.model.id}){revision}"
    return f"`{base_name(spec)}`"


def base_name(spec: RunSpec) -> str:
    """Return the name of a base model without a page on the Hub."""
    return spec.model.id if spec.model.package else PurePath(spec.model.id).name


def _data(spec: RunSpec) -> str:
    data = spec.data
    if data.source == "hub" and data.id and _is_folder(data.id):
        return f"`{PurePath(data.id).name}`"
    if data.source == "hub" and data.id:
        return f"[{data.id}](https://huggingface.co/datasets/{data.id})" if "/" in data.id else f"`{data.id}`"
    if data.source != "file":
        return f"`{data.name}`"
    paths = [path for path in (data.path, *(one.path for one in data.sources)) if path]
    return ", ".join(f"`{PurePath(path.partition('?')[0] if '://' in path else path).name}`" for path in paths)


def _results(summary: Summary) -> str:
    """Before and after, as a table."""
    train, measured = summary["train"], summary["eval"]
    before, after = measured["before"], measured["after"]
    rows = [("training loss, first and last step", train["loss_first"], train["loss_last"])]
    rows += [
        (f"held-out {name.replace('_', ' ')}", before[name], now)
        for name, now in after.items()
        if isinstance(now, (int, float)) and isinstance(before.get(name), (int, float)) and name not in COUNTED
    ]
    lines = ["|  | before | after |", "|---|---:|---:|"]
    lines += [f"| {name} | {then:.4f} | {now:.4f} |" for name, then, now in rows]
    if "num_exact" in after:
        count = measured["num_prompts"]
        lines.append(f"| held-out prompts answered exactly | {before['num_exact']} of {count} | {after['num_exact']} |")
    parameters = f"{train['trainable_parameters']:,} parameters trained"
    facts = f"{counted(train['steps'], 'step')}, {train['tokens']:,} tokens, {parameters}"
    return "\n".join([*lines, "", f"{facts}."])


def _use(spec: RunSpec, place: str, *, adapter: bool) -> str:
    kind = "SequenceClassification" if spec.objective.scores else "CausalLM"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
    if not adapter:
        load = f'model = AutoModelFor{kind}.from_pretrained("{place}")'
        return f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n{load}\n{tokenizer}"
    if _on_the_hub(spec):
        load = f'model = AutoPeftModelFor{kind}.from_pretrained("{place}")'
        imports = f"from peft import AutoPeftModelFor{kind}\nfrom transformers import AutoTokenizer"
        return f"{imports}\n\n{load}\n{tokenizer}"
    grown = "\nbase.resize_token_embeddings(len(tokenizer))" if spec.data.add_tokens else ""
    labels = ", num_labels=1" if kind == "SequenceClassification" else ""
    return (
        f"from peft import PeftModel\nfrom transformers import AutoModelFor{kind}, AutoTokenizer\n\n{tokenizer}\n"
        f'base = AutoModelFor{kind}.from_pretrained("{base_name(spec)}"{labels})  # the model that was trained{grown}\n'
        f'model = PeftModel.from_pretrained(base, "{place}")'
    )
