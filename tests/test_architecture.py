"""Imports between the rooms of `runner/` point one way, and ARCHITECTURE.md names files that are there."""

from __future__ import annotations

import re

from docs.generate import architecture
from tests.conftest import ROOT


def test_every_room_has_a_floor() -> None:
    rooms = {architecture.room_of(module) for module in architecture.modules()} - {"", "__main__"}
    assert rooms == {room for floor in architecture.FLOORS for room in floor} | set(architecture.ALONE)


def test_imports_point_one_way() -> None:
    assert architecture.wrong_imports() == []


def test_an_import_that_points_the_wrong_way_is_told() -> None:
    assert not architecture.allowed("plan", "runs") and not architecture.allowed("cloud", "launcher")
    assert not architecture.allowed("train", "cloud") and not architecture.allowed("runs", "train")
    assert architecture.allowed("cli", "emulator") and not architecture.allowed("cloud", "emulator")


def test_hydra_is_imported_by_the_room_of_configs_alone() -> None:
    own = re.compile(r"^\s*(?:from|import) (?:hydra|omegaconf)\b", re.MULTILINE)
    modules = {module for module, file in architecture.modules().items() if own.search(file.read_text("utf-8"))}
    assert {architecture.room_of(module) for module in modules} == {"config"}, sorted(modules)


def test_a_pod_reaches_no_package_that_is_only_for_the_command_line() -> None:
    """Imports inside functions included: one failed where a run out of memory was to be explained."""
    known = architecture.modules()
    reached = {"launcher.on_pod", "hub.upload", *(name for name in known if architecture.room_of(name) == "train")}
    todo = list(reached)
    while todo:
        new = {name for name, _ in architecture.imports(known[todo.pop()])} - reached
        reached |= new
        todo += new
    absent = re.compile(r"^\s*(?:from|import) (?:hydra|omegaconf|click)\b", re.MULTILINE)
    found = {name for name in reached if absent.search(known[name].read_text("utf-8"))}
    assert found == {"config.conf_files"}  # dump_yaml, of `training.yaml`: a spec is not written there


def test_the_page_names_files_that_are_there() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    named = re.findall(r"`(runner/[a-z_/]+\.py|tests/[a-z_/]+\.py)`", page)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []
