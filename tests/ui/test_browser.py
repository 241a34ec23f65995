"""A run is composed, mended, started, stopped, resumed and reported by clicking, and every room is accessible."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.ui.browsing import browser, needs_chromium, serious, served
from tests.ui.shots import ROOMS, made_up, visit

pytestmark = [needs_chromium, pytest.mark.slow]
LONG_MS = 240_000
SHORT = {
    "train.max_length": "64", "train.batch_size": "1", "data.max_examples": "40", "data.max_eval_examples": "4",
    "eval.num_prompts": "1", "eval.max_new_tokens": "4",
}  # fmt: skip


def fill(page: Any, key: str, text: str) -> None:
    """Type a value into the field of a key."""
    page.get_by_label("Find a key").fill(key)
    page.locator(f'[id="key-{key}"]').fill(text)
    page.get_by_label("Find a key").fill("")


def test_a_run_from_the_form_to_its_report(tmp_path: Path) -> None:
    with served(tmp_path) as url, browser() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(LONG_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#verdict.good")
        for key, text in SHORT.items():
            fill(page, key, text)
        fill(page, "train.max_steps", "0")
        page.wait_for_selector('[id="key-train.max_steps-wrong"]')
        assert page.locator("#start").is_disabled()
        page.locator('[id="key-train.max_steps-wrong"] .fix').click()
        page.wait_for_selector("#verdict.good")
        fill(page, "train.max_steps", "30")
        page.locator("#command", has_text="max_steps=30").wait_for()
        page.locator("#start:not([disabled])").click()
        page.wait_for_url("**/#/run/**")
        page.locator(".meter strong", has_text=re.compile(r"^[1-9]\d* / 30$")).wait_for()
        page.locator("#stop").click()
        page.wait_for_selector("#resume")
        page.locator("#resume").click()
        page.wait_for_selector(".pill.done")
        (folder,) = (tmp_path / "runs").glob("smollm2*")
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 31))
        page.locator("#report").wait_for()
        with page.context.expect_page() as opened:
            page.locator("#report").click()
        assert folder.name in opened.value.content()
        assert wrong == []


def test_every_room_is_accessible_and_shows_markup_as_text(tmp_path: Path) -> None:
    made_up(tmp_path)
    log = tmp_path / "runs" / "example" / "logs" / "run.log"
    log.write_text("<img src=x onerror=\"document.title='owned'\">\n")
    with served(tmp_path) as url, browser() as chromium:
        for scheme in ("light", "dark"):
            page = chromium.new_context(color_scheme=scheme).new_page()
            page.set_default_timeout(60_000)
            page.goto(url)
            for room in ROOMS:
                visit(page, url.partition("?")[0], room)
                assert serious(page) == [], (room, scheme)
                assert page.title() != "owned"


def test_a_run_goes_on_when_the_server_is_killed(tmp_path: Path) -> None:
    with served(tmp_path) as url, browser() as chromium:
        page = chromium.new_page()
        page.set_default_timeout(LONG_MS)
        page.goto(url)
        for key, text in {**SHORT, "train.max_steps": "3"}.items():
            fill(page, key, text)
        page.locator("#command", has_text="max_steps=3").wait_for()
        page.locator("#start:not([disabled])").click()
        page.wait_for_url("**/#/run/**")
        (pid,) = [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/cmdline") if _is_server(file, tmp_path)]
        os.kill(pid, signal.SIGKILL)
        (status,) = (tmp_path / "runs").glob("smollm2*/status.json")
        for _ in range(600):
            if json.loads(status.read_text())["state"] in ("done", "failed"):
                break
            page.wait_for_timeout(400)
        assert json.loads(status.read_text())["state"] == "done"


def _is_server(file: Path, folder: Path) -> bool:
    try:
        here = os.readlink(file.with_name("cwd")) == str(folder)
        return here and b"\0ui\0" in file.read_bytes()
    except OSError:
        return False
