"""The command line: what it prints, what it refuses and with which exit code; nothing here trains."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.options import VERBS
from runner.config import conf_files
from runner.launcher import local
from runner.paths import ASSETS
from runner.rundir.directory import Outcome, RunDir
from runner.runs import launch, resume
from runner.spec import RunSpec
from tests.conftest import run_cli
from tests.support.front import here, laptop, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_own_choices_are_known_to_fit_and_resume(here: Path, worker: Any) -> None:
    write(here / "own/hw/box.yaml", "name: box\naccelerator: cpu\n")
    write(here / "own/model/mine.yaml", "defaults: [mistral7b]\nname: mine\n")
    rows = json.loads(runner("fit", "--config-dir", "own", "model=mine", "method=lora", "hw=h100", "--json").stdout)
    assert {row["model"] for row in rows} == {"mine"}
    run = RunDir.create(spec_of("train.max_steps=4", "hw=cpu"))
    run.set_status("interrupted")
    worker()
    told = runner("resume", str(run.path), "--config-dir", "own", "hw=box")
    assert told.exit_code == 0, told.output
    assert run.spec.hw.name == "box"


# ── refusals ───────────────────────────────────────────────────────────────────────────────────


def test_a_typo_is_told_on_standard_error_and_nothing_is_started(here: Path) -> None:
    done = run_cli("model=mistrl7b", "train.lerning_rate=1e-4", cwd=here, **NO_GPU)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "The request is wrong; nothing was started",
        "  • there is no model 'mistrl7b'  (command line)",
        "    → did you mean model=mistral7b?",
        "  • unknown key train.lerning_rate  (command line)",
        "    → did you mean train.learning_rate?",
    ]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("shwo", 2, "did you mean show?"),
        ("serve runs/x", 2, "there is no verb 'serve'  (command line)\n    → did you mean deploy?\n"),
        ("evaluate runs/x", 2, "did you mean eval?"),
        ("train model=phi2", 2, "there is no verb 'train'  (command line)\n    → leave it out: no verb means run"),
        ("help", 2, "did you mean --help?"),
        ("mistral7b", 2, "did you mean model=mistral7b?"),
        ("no/such", 2, "there is no file or folder no/such"),
        ("plan train.learning_rate=nan", 2, "train.learning_rate=nan: expected a finite number"),
        ("plan where=runpod where.max_usd=inf", 2, "where.max_usd=inf: expected a finite number"),
        ("plan where=runpod where.deadline_hours=inf", 2, "expected a finite number or auto"),
        ("plan where=runpod where.deadline_hours=1e300", 2, "expected at most 8784 (a year), or auto"),
        ("plan where=runpod where.heartbeat_minutes=1e300", 2, "where.heartbeat_minutes=1e+300"),
        ("pods start x --hours 8785", 2, "write --hours 8784, or less"),
        ("pods up --hours 1e400", 2, "1e400 is not a finite number"),
        ("pods up --hours nan", 2, "nan is not a finite number"),
        ("pods up --hours inf", 2, "inf is not a finite number"),
        ("emulate --speed inf", 2, "inf is not a finite number"),
        ("run model=phi3", 2, "did you mean model=phi3_mini?"),
        ("show lr=1", 2, "did you mean train.learning_rate?"),
        ("explain train.lr", 2, "did you mean train.learning_rate?"),
        ("explain method.rank method=full", 2, "method=full has no rank"),
        ("explain model.size model=phi2", 2, "unknown key model.size"),
        ("list modles", 2, "did you mean models?"),
        ("list everything", 2, "one of model, method, hw"),
        ("chat nowhere", 2, "there is no run nowhere"),
        ("nowhere/spec.json", 2, "cannot read nowhere/spec.json"),
        ("nowhere.yaml", 2, "there is no recipe 'nowhere.yaml'"),
        ("--jsn", 2, "No such option"),
        ("explain", 2, "Missing argument"),
        ("-m method=lorra,fulll", 2, "did you mean method=lora?"),
        ("-m train.seed=x,-3", 2, "train.seed=-3: expected at least 0"),
        ("-m recipe=a,b", 2, "a sweep cannot go over recipes"),
        ("train.precision=fp16", 2, "train.precision=fp16 needs a GPU"),
        ("train.batch_size=8 train.micro_batch_size=3 train.accumulation_steps=3", 2, "write train.batch_size=9"),
        ("run.output_dir=/proc/nowhere", 2, "run.output_dir=/proc/nowhere cannot be written to"),
        ("objective=dpo", 2, "objective=dpo needs preferences"),
        ("where=runpod hw=h100x3", 2, "RUNPOD_API_KEY is not set"),
        ("resume nowhere", 2, "nowhere does not exist"),
        ("-m objective=kto,dpo", 2, "objective=dpo needs preferences"),
        ("hw=h100x3", 3, "h100x3 needs 3 × H100"),
        ("hw=h100x3 objective=dpo data=hub data.id=org/rows deepspeed=zero2", 3, "h100x3 needs 3 × H100"),
        ("hw.num_gpus=2", 3, "this machine has no NVIDIA GPU"),
        ("-m hw=h100x3,h100", 3, "h100 needs 1 × H100"),
    ],
)
def test_a_refusal_has_its_exit_code_and_leaves_nothing_behind(here: Path, words: str, code: int, says: str) -> None:
    result = runner(*words.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ("show model=phi3 lr=1", 2, ["there is no model 'phi3'", "unknown key lr"]),
        ("run hw=h100x3", 3, ["h100x3 needs 3 × H100 80GB HBM3 (79.7 GiB); this machine has no NVIDIA GPU "]),
        ("-m method=lorra,fulll", 2, ["there is no method 'lorra'"]),
        ("list modles", 2, ["there is nothing called 'modles' to list"]),
        ("explain nope", 2, ["unknown key nope"]),
        ("chat nowhere", 2, ["there is no run nowhere"]),
    ],
)
def test_a_refusal_can_be_had_as_json(words: str, code: int, what: list[str]) -> None:
    result = runner(*words.split(), "--json")
    answer = json.loads(result.stdout)
    assert answer["exit_code"] == result.exit_code == code
    assert len(answer["problems"]) == len(what)
    for problem, beginning in zip(answer["problems"], what, strict=True):
        assert problem["what"].startswith(beginning)
        assert set(problem) == {"what", "source", "remedy"}
        assert problem["remedy"]


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupt)
    assert runner().exit_code == 130


# ── answers ────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_verb() -> None:
    result = runner("--help")
    assert result.exit_code == 0
    for verb in ("run", "show", "explain", "list", "runs", "chat"):
        assert f"\n  {verb} " in result.stdout
        assert runner(verb, "--help").exit_code == 0


def test_every_verb_has_examples_and_json() -> None:
    for verb in VERBS:
        said = runner(verb, "--help").stdout
        assert "Examples:\n" in said and f"python -m runner {'' if verb == 'run' else verb}" in said, verb
        # `data` has verbs of its own; `emulate` and `ui` are servers.
        assert "--json" in said or verb in ("data", "emulate", "ui"), verb


@pytest.mark.parametrize("tokens", ["0", "-3", "some"])
def test_an_answer_of_no_tokens_is_refused(tokens: str) -> None:
    result = runner("chat", "nowhere", "--prompt", "hi", "--max-new-tokens", tokens)
    assert result.exit_code == 2
    assert "--max-new-tokens" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("method.rank=0", "write method.rank=1, or more"),
        ("train.packing=maybe", "write train.packing=true or train.packing=false"),
        ("train.learning_rate=abc", "write train.learning_rate=0.0002, for example"),
        ("train.max_steps=0", "write train.max_steps=1, or more"),
        ("train.warmup_ratio=2", "write train.warmup_ratio=0.03, for example"),
        ("train.micro_batch_size=0", None),
        ("train.gradient_checkpointing=2.5", "write train.gradient_checkpointing=2"),
        ("train.micro_batch_size=0.2", "write train.micro_batch_size=1"),
        ("train.max_steps=7.6", "write train.max_steps=8"),
        ("train.seed=1e400", "write train.seed=42, for example"),
    ],
)
def test_a_value_that_cannot_be_is_told_what_can(word: str, remedy: str | None) -> None:
    result = runner("show", word)
    assert result.exit_code == 2
    assert remedy is None or f"→ {remedy}" in result.stderr


def test_show_prints_the_resolved_run_and_its_notes() -> None:
    result = runner("show", "model=phi2", "hw=h100x3", "train.batch_size=16")
    assert result.exit_code == 0
    assert "model:\n  title: Phi-2\n" in result.stdout
    assert "# note: global batch 16 rounded to 15 = 5 × 1 × 3 processes\n" in result.stdout
    assert "# note: deepspeed=auto took none: it is the fastest that fits\n" in result.stdout
    assert result.stdout.endswith("# note: train.gradient_checkpointing=auto took false: all fits with headroom\n")


def test_show_as_json_is_the_spec() -> None:
    words = ("model=phi2", "method=full", "hw=a100")
    assert RunSpec.model_validate_json(runner("show", "--json", *words).stdout) == spec_of(*words)


@pytest.mark.parametrize("group", [*conf_files.GROUPS, "models", "gpus", "recipes"])
def test_every_group_is_listed_with_all_its_choices(group: str) -> None:
    rows = json.loads(runner("list", group, "--json").stdout)
    known = {"models": conf_files.options("model"), "gpus": conf_files.options("hw"), "recipes": conf_files.recipes()}
    assert [row["name"] for row in rows] == list(known.get(group) or conf_files.options(group))
    table = runner("list", group)
    assert table.exit_code == 0
    assert all(row["name"] in table.stdout for row in rows)


def test_models_are_listed_with_their_sizes() -> None:
    assert "2,779,683,840" in runner("list", "models").stdout
    (row,) = [row for row in json.loads(runner("list", "models", "--json").stdout) if row["name"] == "phi2"]
    assert (row["num_parameters"], row["num_layers"], row["context_length"]) == (2_779_683_840, 32, 2048)


def test_list_alone_shows_every_group() -> None:
    rows = json.loads(runner("list", "--json").stdout)
    assert [row["group"] for row in rows] == [*conf_files.GROUPS, "recipes"]
    assert runner("list").exit_code == 0


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ((), "train.learning_rate", 1e-3),
        (("recipe=mistral7b_full_h100x3",), "train.batch_size", 48),
        (("hw=h100x3",), "hw.num_gpus", 3),
        (("hw=rtx4090x2",), "hw.env.NCCL_P2P_DISABLE", "1"),
        (("model=phi2", "method=full"), "train.learning_rate", 2e-5),
    ],
)
def test_explain_names_a_line_that_really_holds_the_key(words: tuple[str, ...], key: str, value: Any) -> None:
    answer = json.loads(runner("explain", key, *words, "--json").stdout)
    assert answer["value"] == value
    printed = runner("explain", key, *words).stdout
    for origin in answer["origins"]:
        file, line = origin["place"].split(":")
        text = (ASSETS / file).read_text("utf-8").splitlines()[int(line) - 1]
        assert f"{origin['key'].rpartition('.')[2]}:" in text and str(origin["value"]) in text
        assert origin["place"] in printed


def test_explain_tells_command_line_default_and_hardware_apart() -> None:
    assert (
        "  command line  [q_proj,v_proj]\n"
        in runner("explain", "method.target_modules", "method.target_modules=[q_proj,v_proj]").stdout
    )
    assert "default in the schema" in runner("explain", "train.seed").stdout
    assert "derived from the hardware: auto → bf16" in runner("explain", "train.precision").stdout
    assert "derived from the objective: auto → min" in runner("explain", "run.metric_mode").stdout


def test_explain_of_a_group_has_a_line_for_every_key() -> None:
    lines = runner("explain", "train", "train.seed=3").stdout.splitlines()
    assert len(lines) == len(RunSpec.model_fields["train"].annotation.model_fields)
    (seed,) = [line.split() for line in lines if line.startswith("train.seed")]
    assert seed == ["train.seed", "3", "command", "line"]


def test_runs_are_listed_with_their_state_and_last_loss(here: Path) -> None:
    assert "No runs in runs yet" in runner("runs").stdout
    assert runner("runs", "--json").stdout == "[]\n"
    run = RunDir.create(spec_of("model=phi2", "method=lora"))
    run.set_status("failed", error="out of memory", num_steps=9, exit_code=1)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.25}\n{"st')
    (row,) = json.loads(runner("runs", "--json").stdout)
    assert {key: row[key] for key in ("run_id", "state", "model", "method", "step", "loss", "error")} == {
        "run_id": run.id, "state": "failed", "model": "phi2", "method": "lora", "step": 2, "loss": 1.25,
        "error": "out of memory",
    }  # fmt: skip
    table = runner("runs").stdout
    assert run.id in table and "failed" in table and "1.2500" in table


def test_runs_show_what_tells_them_apart(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here / "pairs.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    sft = RunDir.create(spec_of("model=phi2", "train.learning_rate=3e-4"))
    dpo = RunDir.create(spec_of("model=phi2", "objective=dpo", "data=file", "data.path=pairs.jsonl"))
    assert sft.id.startswith("phi2-lora-2") and dpo.id.startswith("phi2-lora-dpo-pairs-2")
    first, second = json.loads(runner("runs", "--json").stdout)
    assert (first["objective"], first["data"], first["learning_rate"]) == ("sft", "commands", 3e-4)
    assert (second["objective"], second["data"]) == ("dpo", "pairs.jsonl")
    monkeypatch.setenv("COLUMNS", "140")
    header, *rows = runner("runs").stdout.splitlines()
    assert header.split() == ["run", "state", "method", "objective", "data", "rate", "steps", "loss", "exact", "time"]
    assert rows[0].split()[2:6] == ["lora", "sft", "commands", "0.0003"]
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(line.rstrip()) <= 80 for line in runner("runs").stdout.splitlines())


@pytest.mark.parametrize("verb", ["chat", "eval", "merge"])
def test_a_run_that_has_no_model_yet_is_resumed(here: Path, verb: str) -> None:
    run = RunDir.create(spec_of())
    run.set_status("failed")
    result = runner(verb, str(run.path))
    assert result.exit_code == 2
    assert f"{run.path} has no model yet: its state is failed" in result.stderr
    assert f"python -m runner resume {run.path} begins it anew: it has no checkpoint" in result.stderr
    checkpoint = run.path / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    run.set_status("interrupted")
    said = runner(verb, str(run.path)).stderr
    assert f"python -m runner resume {run.path} continues after step 7" in said
    run.set_status("training")
    assert "wait for its end" in runner(verb, str(run.path)).stderr


def test_status_of_a_run_of_this_machine_needs_no_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    run = RunDir.create(spec_of("model=phi2"))
    run.set_status("training", num_steps=9)
    (run.path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.25, "tokens_per_second": 300.5}\n')
    for word in (str(run.path), run.id, str(run.spec_file)):
        facts = json.loads(runner("status", word, "--json").stdout)
        assert {key: facts[key] for key in ("run_id", "state", "step", "num_steps", "loss")} == {
            "run_id": run.id, "state": "training", "step": 2, "num_steps": 9, "loss": 1.25,
        }  # fmt: skip
    for verb in ("logs", "attach", "fetch"):
        refused = runner(verb, run.id)
        assert refused.exit_code == 2 and "runs on this machine, not in a pod" in refused.stderr


@pytest.mark.parametrize("verb", ["status", "logs", "attach", "fetch"])
def test_a_run_that_is_not_here_is_not_answered_with_a_missing_key(
    verb: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    run = RunDir.create(spec_of("model=phi2"))
    for word, remedy in (
        (run.id[:-1] + "z", f"did you mean runs/{run.id}?"),
        ("x", "python -m runner runs shows them"),
    ):
        refused = runner(verb, word)
        assert refused.exit_code == 2
        assert f"there is no run {word} on this machine, and no RUNPOD_API_KEY to look for it in pods" in refused.stderr
        assert remedy in refused.stderr


def test_the_times_of_a_run_that_was_resumed_add_up(here: Path) -> None:
    """30 s of work, a day of nobody at it, 20 s of work: 50 s, not one start alone and not the day."""
    run = RunDir.create(spec_of())
    run.set_status("training", started=1000.0)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "time": 1030.0}\n')
    status = {**run.read("status.json"), "updated": 1010.0}
    run.write("status.json", status)
    assert run.spent() == 30.0
    resume.record_spec(run, spec_of(), ())
    assert run.spent() == 30.0
    run.write("status.json", {**run.read("status.json"), "started": 90_000.0, "updated": 90_020.0})
    assert run.spent() == 50.0


def test_chat_finds_the_run_that_was_meant(here: Path) -> None:
    run = RunDir.create(spec_of())
    near = runner("chat", f"{str(run.path)[:-1]}x")
    assert f"did you mean {run.path}?" in near.stderr


# ── a run and a sweep, with a worker that does not train ───────────────────────────────────────


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[RunSpec]]:
    """Replaces the worker by one that reports the seed as its loss; fails where the seed is `failing`."""

    def replace(failing: int = -1, code: int = 1) -> list[RunSpec]:
        seen: list[RunSpec] = []

        def execute(
            run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: object = None
        ) -> Outcome:
            seen.append(spec)
            bad = spec.train.seed == failing
            run.set_status("failed" if bad else "done", error="it broke" if bad else None)
            if not bad:
                run.write("summary.json", {"run_id": run.id, "eval": {"after": {"loss": float(spec.train.seed)}}})
            return Outcome(run, code if bad else 0)

        monkeypatch.setattr(local, "execute", execute)
        return seen

    return replace


def test_no_words_at_all_run_the_main_job(here: Path, worker: Any) -> None:
    seen = worker()
    assert runner().exit_code == 0
    (spec,) = seen
    assert (spec.model.name, spec.method.name, spec.data.name) == ("smollm2_135m", "lora", "commands")
    (run,) = (here / "runs").iterdir()
    assert spec_of(str(run)) == spec


def test_a_run_answers_with_its_summary_as_json(worker: Any) -> None:
    worker()
    result = runner("train.seed=3", "--json")
    assert json.loads(result.stdout)["eval"]["after"]["loss"] == 3.0
    assert "smollm2_135m" in result.stderr  # the words go elsewhere


def test_a_run_that_fails_exits_with_its_code(worker: Any) -> None:
    worker(failing=3)
    assert runner("train.seed=3").exit_code == 1


def test_a_resume_that_fails_before_it_kept_a_step_leaves_the_spec_as_it_was(here: Path, worker: Any) -> None:
    run = RunDir.create(spec_of("train.seed=1", "train.max_steps=4", "hw=cpu"))
    run.set_status("interrupted")
    before = run.spec_file.read_text()
    seen = worker(failing=1)
    assert runner("resume", str(run.path), "deepspeed=zero1", "train.max_steps=9").exit_code == 1
    assert (seen[0].deepspeed.name, seen[0].train.max_steps) == ("zero1", 9)
    assert run.spec_file.read_text() == before
    worker()
    assert runner("resume", str(run.path), "train.max_steps=8").exit_code == 0
    assert json.loads(run.spec_file.read_text())["train"]["max_steps"] == 8


def test_a_sweep_runs_every_point_and_sorts_them_by_the_metric(here: Path, worker: Any) -> None:
    seen = worker()
    result = runner("-m", "train.seed=3,1,2", "model=phi2")
    assert result.exit_code == 0
    assert [spec.train.seed for spec in seen] == [3, 1, 2]
    assert {spec.model.name for spec in seen} == {"phi2"}
    (folder,) = (here / "runs/sweeps").iterdir()
    report = json.loads((folder / "sweep.json").read_text())
    assert [(row["metric"], row["overrides"][0]) for row in report["runs"]] == [
        (1.0, "train.seed=1"), (2.0, "train.seed=2"), (3.0, "train.seed=3"),
    ]  # fmt: skip
    assert {RunDir(here / "runs" / row["run_id"]).read("status.json")["sweep"] for row in report["runs"]} == {
        folder.name
    }


def test_a_point_that_fails_does_not_stop_the_others(worker: Any) -> None:
    seen = worker(failing=1)
    result = runner("-m", "train.seed=1,2", "--json")
    assert result.exit_code == 1
    assert len(seen) == 2
    assert [(row["metric"], row["exit_code"], row["error"]) for row in json.loads(result.stdout)] == [
        (2.0, 0, None),
        (None, 1, "it broke"),
    ]


def test_an_interrupt_ends_a_sweep_and_keeps_what_was_done(here: Path, worker: Any) -> None:
    seen = worker(failing=2, code=130)
    assert runner("-m", "train.seed=1,2,3").exit_code == 130
    assert len(seen) == 2
    (folder,) = (here / "runs/sweeps").iterdir()
    assert len(json.loads((folder / "sweep.json").read_text())["runs"]) == 2


def test_a_sweep_may_start_from_a_recipe_that_leaves_something_open(here: Path, worker: Any) -> None:
    seen = worker()
    write(here / "mine.yaml", "defaults: [config, override /model: hub, _self_]\nrun: {output_dir: out}\n")
    assert runner("-m", "mine.yaml", "model.id=org/a,org/b").exit_code == 0
    assert [spec.model.id for spec in seen] == ["org/a", "org/b"]
    assert (here / "out/sweeps").is_dir()


# ── speed ──────────────────────────────────────────────────────────────────────────────────────

HEAVY = ("torch", "transformers", "datasets", "trl", "peft", "runpod", "deepspeed", "numpy", "matplotlib")
BEFORE_TRAINING = [
    *(["list", group] for group in (*conf_files.GROUPS, "recipes")),
    ["--help"],
    ["show"],
    ["show", "recipe=mistral7b_full_h100x3", "--json"],
    ["explain", "train.learning_rate", "model=phi2"],
    ["list"],
    ["runs"],
    ["chat", "nowhere"],
    ["plan", "model=mistral7b", "method=full", "hw=h100x3"],
    ["plan", "--json"],
    ["fit", "model=llama3_8b", "hw=rtx4090"],
    ["table"],
    ["calibrate"],
    ["doctor"],
    ["resume", "nowhere"],
    ["join", "nowhere"],
    ["merge", "nowhere"],
    ["eval", "nowhere"],
    ["export", "nowhere"],
    ["run", "model=llama2_70b", "method=full", "hw=rtx4090"],
    ["run", "model=mistrl7b"],
    ["run", "hw=h100x3"],
    ["objective=dpo"],
    ["-m", "method=fulll,lorra"],
    ["-m", "hw=h100x3,h100"],
    ["-sc", "install=bash"],
    ["-sc", "query=bash"],
]


def test_nothing_before_training_imports_torch(here: Path) -> None:
    code = (
        "import json, sys\n"
        "from runner.cli.main import cli\n"
        "found = []\n"
        f"for words in {BEFORE_TRAINING!r}:\n"
        "    try:\n"
        "        cli(words, prog_name='runner')\n"
        "    except SystemExit as end:\n"
        f"        found.append([words, end.code, [name for name in {HEAVY!r} if name in sys.modules]])\n"
        "open('found.json', 'w').write(json.dumps(found))\n"
    )
    env = {"PYTHONPATH": str(ASSETS), "COMP_LINE": "runner model=", **NO_GPU}
    subprocess.run([sys.executable, "-c", code], cwd=here, env=env, check=True, capture_output=True)
    found = json.loads((here / "found.json").read_text())
    assert [words for words, _, _ in found] == BEFORE_TRAINING
    assert {code for _, code, _ in found} == {0, 2, 3}
    assert [(words, heavy) for words, _, heavy in found if heavy] == []


UNNEEDED = (
    "asyncio", "ssl", "http.client", "urllib.request", "unittest", "rich.markdown", "rich.syntax", "rich.progress",
    "rich.live", "rich.traceback", "pydantic.networks", "hydra_plugins", "hydra._internal.core_plugins.basic_sweeper",
    "hydra._internal.core_plugins.importlib_resources_config_source", "runner.cloud.runpod.json_types",
    "runner.cloud.executor",
)  # fmt: skip
"""Hydra's plugins, what talks to a server, what draws: no answer below needs one of them."""


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (
            ("train.lr=1",),
            ("runner.resolve.plan_inputs", "runner.machine.detect", "runner.data.load", "subprocess", "rich.table"),
        ),
        (("plan", "model=mistral7b", "method=full", "hw=h100x3"), ("multiprocessing", "concurrent.futures")),
        (("plan", "recipe=mistral7b_full_h100x3"), ("multiprocessing", "concurrent.futures")),
        (("fit", "model=llama2_70b", "method=lora"), ()),
        (("show", "model=phi2"), ("rich.table", "runner.report.plan_text")),
        (("list", "models"), ("hydra._internal", "runner.resolve.plan_inputs", "subprocess")),
    ],
    ids=" ".join,
)
def test_a_verb_imports_nothing_costly_that_it_does_not_need(
    here: Path, words: tuple[str, ...], more: tuple[str, ...]
) -> None:
    code = (
        "import atexit, gc, json, sys\n"
        "atexit.register(lambda: open('kept.json', 'w').write(json.dumps(gc.get_freeze_count())))\n"  # the last one
        "from runner.__main__ import main\n"
        "before = [generation['collections'] for generation in gc.get_stats()]\n"
        f"sys.argv = ['runner', *{list(words)!r}]\n"
        "now = lambda: [generation['collections'] for generation in gc.get_stats()]\n"
        "atexit.register(lambda: open('found.json', 'w').write(json.dumps([list(sys.modules), before, now()])))\n"
        "main()\n"
    )
    env = {"PYTHONPATH": str(ASSETS), **NO_GPU}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    modules, before, after = json.loads((here / "found.json").read_text())
    assert "runner.cli.main" in modules
    assert [name for name in (*UNNEEDED, *more) if name in modules] == []
    assert after == before, "garbage is looked for among what stays"
    assert json.loads((here / "kept.json").read_text()), "garbage is looked for as Python ends"


def _cpu_seconds(start: Callable[[], object]) -> float:
    """Time on the CPU of the processes that `start` waits for; it does not grow while others work beside us."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [("model=mistrl7b",), ("show",)])
def test_an_answer_takes_a_fraction_of_importing_torch(here: Path, words: tuple[str, ...]) -> None:
    # 0.35 of it, on a fast machine (0.46 s against 1.3 s) as on a slow one (1.0 s against 2.7 s): docs/benchmarks.md.
    answer = _cpu_seconds(lambda: run_cli(*words, cwd=here, **NO_GPU))
    torch = _cpu_seconds(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    assert answer < 0.7 * torch
