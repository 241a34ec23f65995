"""The tables of choices in README.md and docs/choices.md, read off the catalogue."""

from __future__ import annotations

from runner.config import conf_files
from runner.paths import ASSETS
from runner.report.catalog_tables import listing, markdown

README = ASSETS / "README.md"
PAGE = ASSETS / "docs" / "choices.md"
BEGIN, END = "<!-- choices: written by `make docs` -->", "<!-- /choices -->"

_WHAT = {
    "model": "the pretrained model",
    "method": "what trains",
    "hw": "the machine",
    "deepspeed": "the ZeRO stage",
    "data": "the examples",
    "track": "where metrics go besides the run directory",
}


def readme(text: str) -> str:
    """`text` of the README with its table of choices written anew."""
    lines = ["| choice | what | names |", "|---|---|---|"]
    for group, what in _WHAT.items():
        lines.append(f"| `{group}=` | {what} | {' '.join(f'`{n}`' for n in conf_files.options(group))} |")
    lines.append(f"| `recipe=` | a whole experiment | {' '.join(f'`{n}`' for n in conf_files.recipes())} |")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def page() -> str:
    """docs/choices.md: models, hardware, methods, data and recipes with their figures."""
    parts = ["# Choices", "Written by `make docs` from `conf/` and `recipes/`; the sources of the figures stand there."]
    for group in ("models", "hw", "methods", "data", "recipes"):
        table = listing(group)
        parts += [f"## {table.title[0].upper()}{table.title[1:]}", markdown(table)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, tuple[str, str]]:
    """File → what it says and what it should say."""
    written = README.read_text("utf-8")
    current = PAGE.read_text("utf-8") if PAGE.is_file() else ""
    return {"README.md": (written, readme(written)), "docs/choices.md": (current, page())}
