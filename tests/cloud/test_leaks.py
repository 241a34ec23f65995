"""tests/support/leaks.py: whose variables are looked at."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support.leaks import CHILDREN, MUST_HAVE, may_have


def test_every_module_that_may_have_secrets_is_there() -> None:
    assert [module for module in MUST_HAVE if find_spec(module) is None] == []


@pytest.mark.parametrize(("line", "may"), [
    ("/x/bin/python -m runner model=phi2 where=runpod", True),
    ("python3.12 -u -m runner.launcher.on_pod /workspace/runs/a/spec.json", True),
    ("python -m runner.hub.upload /workspace/runs/a", True),
    ("python -m runner.train spec.json", True),
    ("fc-list --format=%{file}", True),
    ("python3 -m runner.cli.main", False),
    ("python /workspace/.runner/agent.py run /workspace/runs/a -m runner", False),
    ("python3 -c print() -m runner", False),
    ("ssh -F none pod python -m runner", False),
    ("ssh", False),
    ("/bin/sh -c python -m runner.train spec.json", False),
    ("pip install -m runner", False),
])  # fmt: skip
def test_only_python_that_runs_one_of_them_may(line: str, may: bool) -> None:
    assert may_have([*line.split(" "), ""]) is may


def test_children_of_multiprocessing_may() -> None:
    for code in ("from multiprocessing.spawn import spawn_main; spawn_main(1)",
                 "from multiprocessing.resource_tracker import main;main(3)"):  # fmt: skip
        assert CHILDREN.match(code) and may_have(["/x/python", "-c", code, "--multiprocessing-fork", ""])
    assert not may_have(["/x/python", "-c", "import os", ""])
