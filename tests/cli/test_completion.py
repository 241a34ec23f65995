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

from runner.cli.main import cli
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
    assert offered(f"{program} model=mis") == [
        "model=mistral7b", "model=mistral7b_instruct", "model=mistral_nemo", "model=mistral_small_24b",
    ]  # fmt: skip
    assert offered(f"{program} hw=h100 model=phi") == ["model=phi2", "model=phi3_mini", "model=phi4"]


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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two runs, data and a recipe."""
    monkeypatch.chdir(tmp_path)
    for run in ("runs/phi2-lora-1", "runs/phi2-lora-2", "elsewhere/old"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "spec.json").write_text("{}")
    (tmp_path / "runs" / "no_run").mkdir()
    (tmp_path / "rows").mkdir()
    for name in ("mine.yaml", "rows/a.jsonl", "rows/mit blank.jsonl", "rows/.hidden", "reward.py"):
        (tmp_path / name).write_text("")
    return tmp_path


OF_A_RUN = ["resume", "join", "chat", "eval", "merge", "export", "push", "deploy", "attach", "fetch", "status", "logs",
            "pods start", "pods stop", "pods top", "pods terminate", "pods ssh", "pods tunnel",
            "pods logs", "watch", "compare", "runs delete", "report"]  # fmt: skip


@pytest.mark.parametrize("verb", OF_A_RUN)
def test_every_verb_that_takes_a_run_offers_runs(verb: str, folder: Path) -> None:
    both = ["runs/phi2-lora-1", "runs/phi2-lora-2"]
    assert offered(f"runner {verb} ") == both
    assert offered(f"runner {verb} ru") == both
    assert offered(f"runner {verb} runs/") == [*sorted(["runs/no_run/"]), *both]
    assert offered(f"runner {verb} phi2") == ["phi2-lora-1", "phi2-lora-2"]
    assert offered(f"runner {verb} elsewhere/o") == ["elsewhere/old"]
    assert offered(f"runner {verb} {folder}/runs/phi2-lora-2") == [f"{folder}/runs/phi2-lora-2"]
    assert offered(f"runner {verb} none") == []


def test_no_verb_with_a_run_was_forgotten() -> None:
    from runner.cli.completion import all_verbs
    from runner.cli.main import cli as group

    with group.make_context("runner", ["list"]) as ctx:
        verbs = dict(all_verbs(ctx))
    named = {"run", "run_dir", "run_id", "runs"}
    takes_a_run = {name for name, verb in verbs.items() if named & set(verb.arguments[:1])}
    assert takes_a_run == set(OF_A_RUN)


def test_after_the_run_come_keys_where_the_verb_takes_them(folder: Path) -> None:
    assert offered("runner resume runs/phi2-lora-1 train.max_st") == ["train.max_steps="]
    assert offered("runner chat runs/phi2-lora-1 --pr") == ["--prompt"]
    assert offered("runner push runs/phi2-lora-1 ") == []


def test_recipes_specs_and_data_of_ones_own_are_offered(folder: Path) -> None:
    assert "mine.yaml" in offered("runner mi")
    assert offered("runner plan runs/phi2-lora-1/s") == ["runs/phi2-lora-1/spec.json"]
    assert offered("runner data preview data.path=ro") == ["data.path=rows/"]
    assert offered("runner data stats data.path=rows/a") == ["data.path=rows/a.jsonl"]
    assert "reward.py" not in offered("runner re")


def test_a_blank_in_a_name_is_typed_as_the_shell_needs_it(folder: Path) -> None:
    result = CliRunner(env={"COMP_LINE": "runner plan data.path=rows/mit"}).invoke(cli, ["-sc", "query=bash"])
    assert result.stdout == "data.path=rows/mit\\ blank.jsonl\n"
    result = CliRunner(env={"COMP_LINE": "runner plan data.path=rows/mit\\ b"}).invoke(cli, ["-sc", "query=bash"])
    assert result.stdout == "data.path=rows/mit\\ blank.jsonl\n"


def test_verbs_of_a_group_are_offered() -> None:
    assert offered("runner data pre") == ["prepare", "preview"]
    assert offered("runner pods te") == ["templates", "terminate"]
    assert offered("runner volumes ") == ["create", "delete", "get", "list", "ls", "put"]


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
def test_tab_completes_in_an_interactive_bash(tmp_path: Path) -> None:
    with Terminal() as bash:
        bash.type('eval "$(python -m runner -sc install=bash)"; echo rea""dy\n', until="ready")
        bash.type("python -m runner model=phi3\t", until="model=phi3_mini")
        bash.type("\x15python -m runner show train.learn\t", until="train.learning_rate=")
        bash.type(f"\x15python {ROOT}/pyproj\t", until="pyproject.toml")  # files, as before
        bash.type(
            "\x15cd $(mktemp -d) && mkdir -p runs/phi2-7 && touch runs/phi2-7/spec.json; echo made\n", until="made"
        )
        bash.type("python -m runner resume ru\t", until="runs/phi2-7")
        bash.type(f"\x15python -m runner volumes put v {ROOT}/pyproj\t", until="pyproject.toml")


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
