"""Tables of the catalogue: `python -m runner list …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from runner.config import conf_files
from runner.config.did_you_mean import nearest
from runner.errors import Problem, RequestError
from runner.paths import CONF, RECIPES
from runner.report.invocation import as_invoked

# What people type after `list` → the group it stands for.
SPOKEN = {
    "models": "model",
    "methods": "method",
    "hardware": "hw",
    "gpus": "hw",
    "objectives": "objective",
    "datasets": "data",
    "tracking": "track",
    "trackers": "track",
    "recipe": "recipes",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Listing:
    """A group, or all of them."""

    title: str
    rows: list[Row]
    columns: tuple[str, ...]
    hint: str


def listing(what: str | None, folders: tuple[Path, ...] = ()) -> Listing:
    """The rows of one group; of all groups where none is named; RequestError for a group that is not there."""
    if what is None:
        rows = [{"group": g, "choices": list(conf_files.options(g, folders))} for g in conf_files.GROUPS]
        rows.append({"group": "recipes", "choices": list(conf_files.recipes())})
        return Listing("Choices", rows, ("group", "choices"), "python -m runner list models shows one group in full")
    group = SPOKEN.get(what, what)
    if group == "recipes":
        rows = [_recipe_row(name) for name in conf_files.recipes()]
        columns = ("name", "model", "method", "hw", "data", "what")
        return Listing("Recipes", rows, columns, "python -m runner recipe=NAME")
    if group not in conf_files.GROUPS:
        near = nearest(what, [*conf_files.GROUPS, *SPOKEN, "recipes"])
        remedy = f"did you mean {near}?" if near else f"one of {', '.join((*conf_files.GROUPS, 'recipes'))}"
        raise RequestError(Problem(f"there is nothing called {what!r} to list", "command line", remedy))
    rows = [_row(group, name, folders) for name in conf_files.options(group, folders)]
    return Listing(group, rows, _COLUMNS.get(group, ("name", "what")), f"python -m runner {group}=NAME")


def _recipe_row(name: str) -> Row:
    """One recipe: the choices it makes and the first line of its comment."""
    file = RECIPES / f"{name}.yaml"
    chosen = _choices(CONF / "config.yaml") | _choices(file)
    return {"name": name, **{group: chosen.get(group) for group in conf_files.GROUPS}, "what": _comment(file)}


def _choices(file: Path) -> dict[str, Any]:
    """The choices in a defaults list, by group."""
    entries = [entry for entry in conf_files.read_file(file).get("defaults", []) if isinstance(entry, dict)]
    pairs = [pair for entry in entries for pair in entry.items()]
    return {str(key).removeprefix("override").strip().lstrip("/"): choice for key, choice in pairs}


def _comment(file: Path) -> str:
    """First sentence of the comment a YAML file opens with, without a package directive."""
    words = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            words.append(line.lstrip("# ").rstrip())
    return " ".join(words).split(": ")[0].split(". ")[0].rstrip(".")


def _row(group: str, name: str, folders: tuple[Path, ...]) -> Row:
    if group in _FACTS:
        values = conf_files.load_choice(group, name, folders)
        return {"name": name, **{key: values.get(key) for key in _FACTS[group]}}
    files = (base / group / f"{name}.yaml" for base in (*folders, CONF))
    return {"name": name, "what": _comment(next(file for file in files if file.is_file()))}


_FACTS = {
    "model": ["title", "id", "architecture", "num_parameters", "num_layers", "hidden_size", "context_length", "gated"],
    "hw": ["gpu", "num_gpus", "memory_gib", "bf16", "flash_attention", "tflops_bf16", "usd_per_hour", "price_date"],
}
"""Keys of a choice that are in the JSON; of another group's it is the sentence that its file opens with."""
_COLUMNS: dict[str, tuple[str, ...]] = {
    "model": ("name", "id", "num_parameters", "num_layers", "hidden_size", "context_length"),
    "hw": ("name", "gpu", "num_gpus", "memory_gib", "bf16", "tflops_bf16", "usd_per_hour"),
}

_HEADERS = {
    "num_parameters": "parameters",
    "num_layers": "layers",
    "hidden_size": "hidden",
    "context_length": "context",
    "num_gpus": "GPUs",
    "memory_gib": "GiB each",
    "tflops_bf16": "TFLOP/s",
    "usd_per_hour": "$/GPU-h",
}


# Columns a narrow terminal does without: a recipe's name says most of them.
_WIDE_ONLY = {"Recipes": ("model", "method", "hw", "data"), "model": ("hidden_size",)}


def print_listing(console: Console, table: Listing) -> None:
    """The listing as a table."""
    left_out = _WIDE_ONLY.get(table.title, ()) if console.width < 120 else ()
    columns = [column for column in table.columns if column not in left_out]
    view = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: JustifyMethod = "right" if any(type(r.get(column)) in (int, float) for r in table.rows) else "left"
        # A name is copied, so it is never broken over two lines.
        view.add_column(_HEADERS.get(column, column), justify=justify, overflow="fold", no_wrap=column == "name")
    for row in table.rows:
        view.add_row(*(_cell(_shown(row, column)) for column in columns))
    console.print(view)
    console.print(f"\n[dim]{as_invoked(table.hint)}[/dim]", highlight=False)


def _shown(row: Row, column: str) -> object:
    """A value; for hardware without a price, why it has none."""
    return row.get("price_date") if column == "usd_per_hour" and row.get(column) is None else row.get(column)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(value) if isinstance(value, list) else str(value)


def markdown(table: Listing) -> str:
    """The listing as a Markdown table."""
    lines = ["| " + " | ".join(_HEADERS.get(c, c) for c in table.columns) + " |", "|---" * len(table.columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in table.columns) + " |" for row in table.rows]
    return "\n".join(lines)
