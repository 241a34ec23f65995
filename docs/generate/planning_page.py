"""`docs/planning.md`: text from `planning_page.md`, in which everything that the code knows is filled in.

A part is written `{{name}}` in the text; `PARTS` has all of them. Torch-free: figures come from `runner.plan`, the
accuracy from `benchmarks/results/memory_accuracy.json`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from docs.generate import planning_examples as examples
from docs.generate import planning_facts as reported
from docs.generate import planning_published as passed_on
from docs.generate import planning_speed as speed
from docs.generate import published_speeds as other_speeds
from runner.data.inspect import token_counts
from runner.paths import ASSETS
from runner.plan import choose_stage, cost, host_memory, memory, zero
from runner.plan import plan as contract
from runner.plan.autograd import head
from runner.plan.memory import GIB
from runner.plan.search import SearchRow
from runner.report.plan_terms import TERMS
from runner.resolve import fit

PAGE = ASSETS / "docs" / "planning.md"
TEXT = Path(__file__).with_name("planning_page.md")
ACCURACY = ASSETS / "benchmarks" / "results" / "memory_accuracy.json"
MIB = 2**20

_TYPES = {
    "str": "text", "bool": "true or false", "float": "number", "int": "whole number", "None": "null",
    "list[str]": "list of texts", "dict[str, float]": "name → number", "dict[str, str]": "name → text",
    "dict[str, Any]": "mapping", "dict[str, dict[str, float]]": "phase → term → GiB",
}  # fmt: skip

HOST_TERMS = {
    "processes": "Python, torch and the libraries, once per process",
    "data": "what the allocator keeps after tokenising",
    "tokenising": "more than that while it tokenises",
    "loading": "matrices converted or copied back on their way to the GPU",
    "saving": "the weights on their way to a file",
    "offloaded": "what ZeRO offloads, or a paged optimiser's states",
    "training": "on a CPU: everything that the phases above hold",
}
DISK_TERMS = {
    "weights": "the download (16 bits); nothing for a folder that is there",
    "checkpoints": "`train.keep_checkpoints` + 1 of them, or as many as the run writes: at least the last one",
    "final_model": "`model/`: 16 bits, or the adapter in fp32",
    "tokenised": "the data set as tokenised",
    "shards": "the text of a corpus, as pretraining keeps it",
    "data": "a data set of the Hub as downloaded, or files as sent to a pod",
    "offloaded": "what ZeRO-3 offloads to NVMe",
}
"""Terms of `host_ram` and `disk` in words; a test asks `runner.plan.host_memory` for every one of them."""


def page() -> str:
    """The whole page, as Markdown; KeyError for a part that the text names and nobody makes."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: PARTS[found[1]](), TEXT.read_text("utf-8"))


def pages() -> dict[str, tuple[str, str]]:
    """File → what it says and what it should say."""
    return {"docs/planning.md": (PAGE.read_text("utf-8") if PAGE.is_file() else "", page())}


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: int = 0) -> str:
    """A Markdown table whose last `numbers` columns stand to the right."""
    head = list(head)
    marks = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (head, marks, *rows)
    )


# --- the contract ----------------------------------------------------------------------------------------------


def fields_of(owner: type) -> dict[str, tuple[str, str]]:
    """Field → its type and the sentence under it, as the source has them."""
    (declared,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for statement, below in pairwise(declared.body):
        match statement, below:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                found[name] = (ast.unparse(statement.annotation), " ".join(text.split()))
            case (ast.AnnAssign(target=ast.Name(id=name)), _):
                found[name] = (ast.unparse(statement.annotation), "")
    return found


def _keys() -> str:
    rows = [
        (f"`{name}`", " or ".join(_TYPES[part] for part in annotation.split(" | ")), meaning)
        for name, (annotation, meaning) in fields_of(contract.Plan).items()
    ]
    return table(("key", "type", "meaning"), rows)


def _fit_keys() -> str:
    return ", ".join(f"`{name}`" for name in fields_of(SearchRow))


def _terms() -> str:
    where = examples.phases_of_terms()
    rows = [(f"`{name}`", words, ", ".join(where[name])) for name, (words, _) in TERMS.items()]
    return table(("term", "what", "in"), rows)


def _named(terms: Mapping[str, str]) -> str:
    return table(("term", "what"), [(f"`{name}`", words) for name, words in terms.items()])


def _memory_table() -> str:
    """What `python -m runner table` prints."""
    found = fit.memory_table(fit.with_default_length(examples.spec_of("hw=h200"), {}))
    rows = [(row["method"], *(f"{size:,.1f}" for size in row["cells"])) for row in found["rows"]]
    assumed = "\n".join(f"- {line}" for line in found["assumptions"])
    return f"{table(('method', *found['columns']), rows, len(found['columns']))}\n\n{assumed}"


# --- accuracy --------------------------------------------------------------------------------------------------


def _result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ACCURACY.read_text("utf-8"))
    return found


def _worst(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: abs(row["error"]))


def _accuracy() -> str:
    """One sentence."""
    rows = _result()["measured"]["rows"]
    worst = _worst(rows)
    return (
        f"**Mean absolute error {mean(abs(row['error']) for row in rows):.2f}%, worst {worst['error']:+.2f}%** "
        f"({worst['model']} {worst['method']}, s {worst['s']}, b {worst['b']}, "
        f"{'with' if worst['ckpt'] else 'without'} checkpointing), over {len(rows)} runs. "
        f"A simulation took {mean(row['simulated_s'] for row in rows):.1f} s, a prediction "
        f"{mean(row['predicted_ms'] for row in rows):.1f} ms."
    )


def _accuracy_table() -> str:
    """Mean and worst error per model and method."""
    rows = _result()["measured"]["rows"]
    models, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "method"))
    lines = []
    for model in models:
        cells = []
        for method in methods:
            found = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            errors = mean(abs(row["error"]) for row in found) if found else 0.0
            cells.append(f"{errors:.2f}%, {_worst(found)['error']:+.2f}%" if found else "–")
        lines.append((model, *cells))
    return table(("mean absolute, worst", *methods), lines, len(methods))


def _accuracy_source() -> str:
    result = _result()
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured on {result['date']} with `{result['command']}`. {packages}."


# --- figures in the text ---------------------------------------------------------------------------------------


def _range(figures: Mapping[str, float], unit: float, name: str) -> str:
    low, expected, high = (f"{figures[case] / unit:g}" for case in ("low", "expected", "high"))
    return f"{low}, {expected} and {high}{name}"


def _states_per_value() -> str:
    return ", ".join(f"`{name}` {size:.3g}" for name, size in memory.STATES.items())


PARTS: dict[str, Callable[[], str]] = {
    "keys": _keys,
    "fit_keys": _fit_keys,
    "terms": _terms,
    "host_terms": lambda: _named(HOST_TERMS),
    "disk_terms": lambda: _named(DISK_TERMS),
    "accuracy": _accuracy,
    "accuracy_table": _accuracy_table,
    "accuracy_source": _accuracy_source,
    "shape": examples.shape,
    "adapter_states": examples.adapter_states,
    "states": lambda: table(*examples.states(), numbers=5),
    "kept": lambda: table(*examples.kept(), numbers=len(examples.METHODS)),
    "pencil": lambda: table(*examples.pencil_table(), numbers=1),
    "pencil_peak": examples.pencil_peak,
    "pencil_range": examples.pencil_range,
    "zero_table": lambda: table(*examples.zero_stages(), numbers=7),
    "facts": lambda: table(*reported.facts()),
    "memory_table": _memory_table,
    "published_table": lambda: table(*passed_on.published(), numbers=len(passed_on.MODELS)),
    "published_reasons": passed_on.reasons,
    "differs": lambda: f"{passed_on.DIFFERS:.0%}",
    "efficiency": lambda: table(*speed.efficiencies()),
    "published_speeds": lambda: table(*other_speeds.speeds(), numbers=3),
    "published_speeds_summary": other_speeds.summary,
    "published_speeds_sources": other_speeds.sources,
    "links": lambda: table(*speed.links()),
    "time_example": speed.time_example,
    "money_example": speed.money_example,
    "context": lambda: _range(memory.CONTEXT, GIB, " GiB"),
    "collectives": lambda: _range(memory.COLLECTIVES, GIB, " GiB"),
    "slack": lambda: _range({k: 100 * v for k, v in memory.SLACK.items()}, 1, "%"),
    "cpu_slack": lambda: _range(memory.CPU_SLACK, 1, ""),
    "cpu_slack_most": lambda: _range(memory.CPU_SLACK_MOST, GIB, " GiB"),
    "chars": lambda: f"{token_counts.CHARS_PER_TOKEN:g}",
    "commands_chars": lambda: f"{token_counts.COMMANDS_CHARS_PER_TOKEN:g}",
    "states_per_value": _states_per_value,
    "prompt_tokens": lambda: str(memory.PROMPT_TOKENS),
    "cpu_process": lambda: f"{host_memory.CPU_PROCESS / MIB:.0f} MiB",
    "cuda_process": lambda: f"{host_memory.CUDA_PROCESS / MIB:,.0f} MiB",
    "deepspeed_import": lambda: f"{host_memory.DEEPSPEED_IMPORT / MIB:.0f} MiB",
    "tokenising_peak": lambda: str(host_memory.TOKENISING_PEAK),
    "tokenising_kept": lambda: str(host_memory.TOKENISING_KEPT),
    "tokenised_file": lambda: str(host_memory.TOKENISED_FILE),
    "loader_threads": lambda: str(host_memory.LOADER_THREADS),
    "max_micro_batch": lambda: str(choose_stage.MAX_MICRO_BATCH),
    "live_parameters": lambda: f"{zero.LIVE_PARAMETERS:,}",
    "download_rate": lambda: f"{cost.DOWNLOAD_GB_S:g}",
    "load_rate": lambda: f"{cost.LOAD_GB_S:g}",
    "save_rate": lambda: f"{cost.SAVE_GB_S:g}",
    "image_pull": lambda: f"{cost.IMAGE_PULL_S / 60:g}",
    "start": lambda: f"{cost.START_S / 60:g}",
    "local_start": lambda: f"{cost.LOCAL_START_S:g}",
    "storage": lambda: f"{cost.STORAGE_USD_PER_GB_MONTH:.2f}",
    "tile_rows": lambda: f"{head.FUSED_ROWS:,}",
    "tile_columns": lambda: f"{head.FUSED_COLUMNS:,}",
    "statistics": lambda: f"{4 * head.STATISTICS}",
    "sub_group": lambda: f"{zero.SUB_GROUP_SIZE:,}",
    **speed.FIGURES,
}
"""Part → what makes it."""
