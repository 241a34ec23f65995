"""`make shots`: a picture of each room at two widths, light and dark, into build/shots/; a made-up run is in it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from runner.rundir.directory import RunDir
from tests.conftest import ROOT
from tests.ui.browsing import browser, served

ROOMS = ("compose", "data", "runs", "run/example", "compare/example/other", "chat", "pods")
ROWS = '{"prompt": "Fine-tune Mistral on three H100s.", "completion": "python -m runner model=mistral7b hw=h100x3"}\n'


def made_up(folder: Path) -> None:
    """Two runs and a file of rows."""
    (folder / "my.jsonl").write_text(ROWS * 12 + '{"prompt": "no answer"}\n')
    for name, rank in (("example", 16), ("other", 64)):
        run = RunDir(folder / "runs" / name)
        (run.path / "logs").mkdir(parents=True)
        facts = {"model": "smollm2_135m", "method": "lora", "objective": "sft", "data": "commands"}
        run.write("status.json", {"run_id": name, "state": "done", "created": 1.79e9, "step": 294, **facts})
        run.write("spec.json", {"method": {"name": "lora", "rank": rank}, "run": {"metric": "eval.after.loss"}})
        run.write("summary.json", {"seconds": 177.0, "eval": {"before": {"loss": 4.6}, "after": {"loss": 0.2 / rank}}})
        (run.path / "logs" / "run.log").write_text("Run     an example for pictures\n")
        with (run.path / "metrics.jsonl").open("w") as stream:
            for step in range(1, 295):
                loss = 4.6 * math.exp(-step * rank / 900) + 0.05 + 0.03 * math.sin(step * 1.7)
                line = {"step": step, "loss": loss, "learning_rate": 1e-3 * (1 - step / 294), "grad_norm": 1 + loss / 4}
                stream.write(json.dumps({**line, "tokens_per_second": 575 + step % 7, "memory_gib": 2.2}) + "\n")


def visit(page: Any, base: str, room: str) -> None:
    """Open a room and wait until it has what it shows."""
    page.goto(f"{base}#/{room}")
    waits = {"compose": "#verdict", "run": ".meters", "compare": "table", "runs": "table", "pods": "table"}
    page.wait_for_selector(waits.get(room.partition("/")[0], "h1"))
    if room == "data":
        page.locator("#path").fill("my.jsonl")
        page.get_by_role("button", name="Look at it").click()
        page.wait_for_selector("text=Compose a run with it")
    page.wait_for_timeout(600)


def main() -> None:
    """Take the pictures."""
    out = ROOT / "build" / "shots"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, browser() as chromium:
        made_up(Path(name))
        with served(Path(name)) as url:
            for width, height in ((1280, 900), (390, 844)):
                for scheme in ("light", "dark"):
                    view = {"width": width, "height": height}
                    page = chromium.new_context(viewport=view, color_scheme=scheme).new_page()
                    page.set_default_timeout(60_000)
                    page.goto(url)
                    for room in ROOMS:
                        visit(page, url.partition("?")[0], room)
                        file = out / f"{room.partition('/')[0]}-{width}-{scheme}.png"
                        page.screenshot(path=file, full_page=width < 1000)
                        print(file)
                    page.context.close()


if __name__ == "__main__":
    main()
