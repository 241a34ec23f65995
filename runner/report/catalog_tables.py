"""Tables of the catalogue: `python -m runner list …`."""

from __future__ import annotations

from collections.abc import Callable
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
        rows = [recipe_row(name) for name in conf_files.recipes()]
        return Listing(
            "Recipes", rows, ("name", "model", "method", "hw", "data", "what"), "python -m runner recipe=NAME"
        )
    if group not in conf_files.GROUPS:
        near = nearest(what, [*conf_files.GROUPS, *SPOKEN, "recipes"])
        raise RequestError(
            Problem(
                f"there is nothing called {what!r} to list",
                "command line",
                f"did you mean {near}?" if near else f"one of {', '.join((*conf_files.GROUPS, 'recipes'))}",
            )
        )
    row_of, columns = _ROWS.get(group, (_plain_row, ("name", "what")))
    return Listing(
        group,
        [row_of(group, name, folders) for name in conf_files.options(group, folders)],
        columns,
        f"python -m runner {group}=NAME",
    )


def recipe_row(name: str) -> Row:
    """One recipe: the choices it makes and the first line of its comment."""
    file = RECIPES / f"{name}.yaml"
    chosen = {}
    for entry in conf_files.read_file(file).get("defaults", []):
        if isinstance(entry, dict):
            for key, value in entry.items():
                chosen[str(key).removeprefix("override").strip().lstrip("/")] = value
    defaults = {
        k: v
        for e in conf_files.read_file(RECIPES.parent / "conf" / "config.yaml")["defaults"]
        if isinstance(e, dict)
        for k, v in e.items()
    }
    row = {group: chosen.get(group, defaults.get(group)) for group in conf_files.GROUPS}
    return {"name": name, **row, "what": _comment(file)}


def _comment(file: Any) -> str:
    """First sentence of the comment a YAML file opens with, without a package directive."""
    words = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            words.append(line.lstrip("# ").rstrip())
    return " ".join(words).split(": ")[0].split(". ")[0].rstrip(".")


def _model_row(group: str, name: str, folders: tuple[Path, ...]) -> Row:
    keys = "title id architecture num_parameters num_layers hidden_size context_length gated"
    return _fields(group, name, keys.split(), folders)


def _hw_row(group: str, name: str, folders: tuple[Path, ...]) -> Row:
    keys = "gpu num_gpus memory_gib bf16 flash_attention tflops_bf16 usd_per_hour price_date"
    return _fields(group, name, keys.split(), folders)


def _fields(group: str, name: str, keys: list[str], folders: tuple[Path, ...]) -> Row:
    values = conf_files.load_choice(group, name, folders)
    return {"name": name, **{key: values.get(key) for key in keys}}


def _plain_row(group: str, name: str, folders: tuple[Path, ...]) -> Row:
    files = (base / group / f"{name}.yaml" for base in (*folders, CONF))
    file = next(f for f in files if f.is_file())
    return {"name": name, "what": _comment(file)}


_ROWS: dict[str, tuple[Callable[[str, str, tuple[Path, ...]], Row], tuple[str, ...]]] = {
    "model": (_model_row, ("name", "id", "num_parameters", "num_layers", "hidden_size", "context_length")),
    "hw": (_hw_row, ("name", "gpu", "num_gpus", "memory_gib", "bf16", "tflops_bf16", "usd_per_hour")),
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
        number = any(
            isinstance(r.get(column), (int, float)) and not isinstance(r.get(column), bool) for r in table.rows
        )
        justify: JustifyMethod = "right" if number else "left"
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
