"""`python -m docs.generate [--check]`: write, or check, every page that is generated."""

from __future__ import annotations

import click

from docs.generate import architecture, choices, planning_page, reference
from runner.paths import ASSETS


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is not up to date.")
def main(check: bool) -> None:
    """Write the generated pages: docs/reference.md, docs/choices.md, docs/planning.md,
    ARCHITECTURE.md and the README's table."""
    pages = {**reference.pages(), **choices.pages(), **planning_page.pages(), **architecture.pages()}
    stale = {name: new for name, (old, new) in pages.items() if old != new}
    if check and stale:
        raise click.ClickException(f"not up to date: {', '.join(stale)}; run `make docs`")
    for name, text in stale.items():
        (ASSETS / name).parent.mkdir(exist_ok=True)
        (ASSETS / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
