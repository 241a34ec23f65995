"""The shell completes verbs, choices, keys and values, however the runner is called."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from runner.cli import cli
from tests.conftest import ROOT


def offered(line: str) -> list[str]:
    """What `-sc query=bash` answers to a line."""
    result = CliRunner(env={"COMP_LINE": line}).invoke(cli, ["-sc", "query=bash"])
    assert result.exit_code == 0
    return result.stdout.split()


@pytest.mark.parametrize(
    "program", ["runner", "python -m runner", ".venv/bin/python -m runner", "/opt/bin/runner show"]
)
def test_choices_are_offered_however_the_runner_is_called(program: str) -> None:
    assert offered(f"{program} model=mis") == ["model=mistral7b", "model=mistral7b_instruct"]
    assert offered(f"{program} hw=h100 model=phi") == ["model=phi2", "model=phi3_mini"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("runner train.learn", ["train.learning_rate="]),
        ("runner explain train.learn", ["train.learning_rate"]),
        ("runner method.use_", ["method.use_dora=", "method.use_rslora="]),
        ("runner train.schedule=c", ["train.schedule=constant", "train.schedule=cosine"]),
        ("runner train.packing=", ["train.packing=false", "train.packing=true"]),
        ("runner train.seed=", []),
        ("runner recipe=phi", ["recipe=phi2_lora_rtx6000adax5"]),
        ("runner sh", ["show"]),
        ("runner model=phi2 sh", []),  # a verb comes first
        ("runner me", ["merge", "method.", "method="]),
        ("runner list obj", ["objective"]),
        ("runner show --", ["--config-dir", "--json"]),
        ("runner chat runs/", []),
        ("runner no.such", []),
    ],
)
def test_what_is_offered(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_an_empty_word_may_become_any_verb_or_choice() -> None:
    assert {"run", "show", "explain", "list", "runs", "chat", "model=", "recipe=", "train."} <= set(offered("runner "))


def test_choices_of_ones_own_folder_are_offered(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("")
    assert "model=mine" in offered(f"runner --config-dir {tmp_path} model=mi")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed(shell: str) -> None:
    result = CliRunner().invoke(cli, ["-sc", f"install={shell}"])
    assert result.exit_code == 0
    assert f"-sc query={shell}" in result.stdout


@pytest.mark.parametrize("request_", ["install=tcsh", "remove=bash", "bash"])
def test_another_shell_is_refused_in_words(request_: str) -> None:
    result = CliRunner().invoke(cli, ["-sc", request_])
    assert result.exit_code == 2
    assert "one of install=bash, install=zsh, install=fish" in result.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_script_is_valid_bash() -> None:
    script = CliRunner().invoke(cli, ["-sc", "install=bash"]).stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_tab_completes_in_an_interactive_bash() -> None:
    with Terminal() as bash:
        bash.type('eval "$(python -m runner -sc install=bash)"; echo rea""dy\n', until="ready")
        bash.type("python -m runner model=phi3\t", until="model=phi3_mini")
        bash.type("\x15python -m runner show train.learn\t", until="train.learning_rate=")
        bash.type(f"\x15python {ROOT}/pyproj\t", until="pyproject.toml")  # files, as before


class Terminal:
    """An interactive bash that thinks it is on a terminal."""

    def __enter__(self) -> Terminal:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = {"PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "HOME": os.environ.get("HOME", "/")}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)  # bash ends with its terminal
        os.waitpid(self.pid, 0)

    def type(self, keys: str, until: str) -> None:
        """Type `keys` and wait for `until` to appear."""
        os.write(self.fd, keys.encode())
        seen, end = "", time.monotonic() + 60
        while until not in seen:
            assert time.monotonic() < end, f"typed {keys!r}, saw {seen!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                seen += os.read(self.fd, 4096).decode(errors="replace")
