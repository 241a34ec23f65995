"""Each thing that CONTRIBUTING says can be added from outside the package is added from a folder of a user's, and used.

Files lie in a temporary folder, which `--config-dir` names; nothing of `runner/` is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from runner.cli.options import request_of
from runner.data import user_code
from runner.data.examples import Example, Preference
from runner.data.load import inspect_files, read_dataset
from runner.errors import RequestError
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.report.progress import Progress
from runner.resolve.steps import resolved
from runner.rundir.directory import RunDir
from runner.runs import inputs
from runner.spec import DataSpec, RunSpec
from runner.spec.input_paths import named_places
from tests.conftest import train_here
from tests.support import tiny_llama
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

OBJECTIVE = """
from runner.train.objectives.sft import SftTrainer
from runner.train.objectives.sft import Sft


class PenalisedTrainer(SftTrainer):
    METRICS = {"penalty": "penalty"}
    penalty = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        extra = self.penalty * outputs.logits.float().square().mean()
        self.last = float(extra)
        return (loss + extra, outputs) if return_outputs else loss + extra

    def log(self, logs, start_time=None):
        super().log({**logs, "penalty": self.last} if "loss" in logs else logs, start_time)


class Penalised(Sft):
    trainer_class = PenalisedTrainer

    def trainer(self, source, model, adapter, common):
        made = super().trainer(source, model, adapter, common)
        made.penalty = self.spec.objective.options["penalty"]
        return made
"""
TRACKER = """
from runner.train.trackers import Tracker


class Lines(Tracker):
    def start(self):
        self.file = open(self.run.path / "lines.txt", "w")
        return "Lines: lines.txt"

    def log(self, file, line):
        self.file.write(f"{file} {line['step']} {line['loss']}\\n")

    def finish(self, summary):
        self.file.write(f"end {summary['state']}\\n")
        self.file.close()


class Broken(Lines):
    def log(self, file, line):
        raise OSError("the disk is full")


class Unmade(Lines):
    def __init__(self, spec, run):
        raise KeyError("account")
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf"


def write(conf: Path, group: str, name: str, text: str) -> None:
    (conf / group).mkdir(parents=True, exist_ok=True)
    (conf / group / f"{name}.yaml").write_text(text, "utf-8")


def spec_of(conf: Path, *words: str) -> RunSpec:
    base = [*tiny_llama.words(conf.parent), f"run.output_dir={conf.parent / 'runs'}", "train.max_steps=3"]
    return resolved(request_of((*base, "eval.num_prompts=0", *words), (conf,)))[0]


def trained(conf: Path, *words: str) -> tuple[Any, RunDir]:
    return train_here(spec_of(conf, *words))


@pytest.mark.parametrize(
    ("peft_type", "arguments", "trainable"),
    [
        ("HRA", {"r": 4}, "r * inputs"),
        ("FOURIERFT", {"n_frequency": 50, "scaling": 10.0}, "n_frequency"),
        ("BOFT", {"boft_block_size": 4}, "inputs * boft_block_size + outputs"),
    ],
)
def test_a_peft_method_is_a_yaml_file(conf: Path, peft_type: str, arguments: dict[str, Any], trainable: str) -> None:
    content = {"name": "mine", "peft_type": peft_type, "arguments": arguments, "trainable": trainable}
    write(conf, "method", "mine", f"# @package _global_\n# One of PEFT's.\nmethod: {json.dumps(content)}\n")
    finished, run = trained(conf, "method=mine", "train.learning_rate=1e-2")
    assert run.read("status.json")["method"] == "mine" and len(list(run.metrics())) == 3
    spec = spec_of(conf, "method=mine")
    training = training_of(shape_of(spec.model), spec.method, "bf16", deepspeed=False)
    assert training.trainable == sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    assert isinstance(finished.model, PeftModel) and (run.path / "model" / "adapter_config.json").is_file()


@pytest.mark.usefixtures("here")
def test_a_method_is_called_what_it_is_and_an_uncounted_one_a_lower_bound(tmp_path: Path) -> None:
    words = ("plan", "model=mistral7b", "hw=h100", "--config-dir", "own")
    content = "peft_type: HRA\narguments: {r: 4}\ntrainable: r * inputs\n"
    write(tmp_path / "own", "method", "mine", f"name: mine\n{content}")
    write(tmp_path / "own", "method", "wrong", f"name: lora\n{content}")
    block = "name: block\npeft_type: BOFT\narguments: {boft_block_size: 5}\ntrainable: inputs\n"
    write(tmp_path / "own", "method", "block", block)
    assert "lora (LoRA+ 16)" in runner(*words, "method=loraplus").stdout
    assert "lora (DoRA)" in runner(*words, "method=lora", "method.use_dora=true").stdout
    assert "memory is a lower bound: what HRA keeps" in " ".join(runner(*words, "method=mine").output.split())
    assert "lower bound" not in runner(*words, "method=oft").output
    said = " ".join(runner(*words, "method=wrong").stderr.split())
    assert "name: lora is a method of another kind" in said and "write name: lora_mine in its place" in said
    result = runner(*words, "method=block")
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and "does not divide the 4096 inputs of q_proj of mistral7b" in said
    assert "write method.arguments.boft_block_size=4" in said


def test_an_objective_is_a_class_and_a_yaml_file(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "penalised.py").write_text(OBJECTIVE, "utf-8")
    write(conf, "objective", "penalised", "name: sft\ncode: penalised.py:Penalised\noptions: {penalty: 0.25}\n")
    _, run = trained(conf, "objective=penalised")
    penalties = [line["penalty"] for line in run.metrics()]
    assert len(penalties) == 3 and all(value > 0 for value in penalties)
    _, harder = trained(conf, "objective=penalised", "objective.options.penalty=1.0")
    assert next(harder.metrics())["penalty"] == pytest.approx(4 * penalties[0], rel=1e-3)

    spec = inputs.with_absolute_paths(spec_of(conf, "objective=penalised"))
    assert spec.objective.code == f"{tmp_path / 'penalised.py'}:Penalised"  # so the file travels to a pod with the run
    assert dict(named_places(spec))["objective.code"] == str(tmp_path / "penalised.py")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("penalised.py:Nobody", "has no class Nobody"),
        ("penalised.py:PenalisedTrainer", "is no subclass of runner.train.objectives.sft.Sft"),
        ("absent.py:Any", "there is no absent.py"),
    ],
)
def test_a_class_that_is_no_objective_is_said(conf: Path, tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "penalised.py").write_text(OBJECTIVE, "utf-8")
    with pytest.raises(RequestError) as caught:
        trained(conf, f"objective.code={code}")
    assert said in str(caught.value)


def test_a_tracker_is_a_class_and_a_yaml_file(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.py").write_text(TRACKER, "utf-8")
    write(conf, "track", "lines", "name: own\ncode: lines.py:Lines\n")
    _, run = trained(conf, "track=lines")
    steps = [f"metrics.jsonl {line['step']} {line['loss']}" for line in run.metrics()]
    before, after = (f"evals.jsonl {line['step']} {line['loss']}" for line in run.evals())
    assert (run.path / "lines.txt").read_text("utf-8").splitlines() == [before, *steps, after, "end done"]


@pytest.mark.parametrize(("name", "said"), [("Broken", "OSError: the disk"), ("Unmade", "KeyError: 'account'")])
def test_a_tracker_that_fails_stops_no_training(
    name: str, said: str, conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: notes.append(text))
    (tmp_path / "lines.py").write_text(TRACKER, "utf-8")
    write(conf, "track", "broken", f"name: own\ncode: lines.py:{name}\n")
    _, run = trained(conf, "track=broken")
    assert run.state() == "done" and len(list(run.metrics())) == 3
    (note,) = [note for note in notes if said in note]
    assert f"(track.code: {tmp_path / 'lines.py'}, line " in note


def test_an_error_in_own_code_names_its_key_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def inner():\n    return {}['a']\n\ndef outer():\n    return inner()\n")
    outer = user_code.load(f"{tmp_path}/mine.py:outer", "objective.code", "function")
    with pytest.raises(KeyError) as caught:
        outer()
    assert user_code.user_line_of(caught.value) == f"objective.code: {tmp_path}/mine.py, line 2, in inner"
    assert user_code.user_line_of(ValueError()) is None


PODS = ("plan", "where=runpod", "hw=h100", "model=mistral7b", "method=lora")


@pytest.mark.usefixtures("here")
def test_what_an_objective_of_ones_own_adds_to_a_step_is_planned(tmp_path: Path) -> None:
    (tmp_path / "penalised.py").write_text(OBJECTIVE, "utf-8")
    words = (*PODS, "objective.code=penalised.py:Penalised", "--json")
    plain, more = (json.loads(runner(*words, f"objective.extra_forward_passes={n}").stdout) for n in (0, 2))
    assert 1.3 < more["step_seconds"] / plain["step_seconds"] < 2.5  # of about 4 passes, recomputation among them
    unread = runner(*PODS, "objective.extra_forward_passes=2")
    assert "objective.code names no class that makes them" in " ".join(unread.output.split())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("installed", ["editable", "in site-packages"])
def test_own_code_goes_to_a_pod_without_this_projects_modules(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(user_code.__file__).parents[2])
    elsewhere = [place for place in sys.path if Path(place or ".").resolve() != Path(root)]
    monkeypatch.setattr(sys, "path", elsewhere if installed == "in site-packages" else [root, *elsewhere])
    for name, text in (("penalised.py", OBJECTIVE), ("lines.py", TRACKER)):
        (tmp_path / name).write_text(text, "utf-8")
        assert user_code.source_files(name) == [name]
    write(tmp_path / "own", "track", "lines", "name: own\ncode: lines.py:Lines\n")
    result = runner(*PODS, "objective.code=penalised.py:Penalised", "--config-dir", "own", "track=lines")
    assert result.exit_code == 0, result.output

    score = "import runner.spec\nfrom runner.errors import Problem\nimport aside\ndef score(completions, **_): ...\n"
    (tmp_path / "score.py").write_text(score, "utf-8")
    (tmp_path / "aside.py").write_text("from runner.train.trackers import Tracker\n", "utf-8")
    assert user_code.source_files("score.py") == ["score.py", "aside.py"]  # a neighbour still counts
    (tmp_path / "penalised.py").write_text(f"import aside\n{OBJECTIVE}", "utf-8")
    result = runner(*PODS, "objective.code=penalised.py:Penalised")
    assert result.exit_code == 2 and "imports modules of this machine (aside.py)" in " ".join(result.stderr.split())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("text", ["class Mine: ...", "class Base(dict): ...\nclass Mine(Base): ...", "def Mine(): ..."])
@pytest.mark.parametrize("place", ["local", "runpod"])
def test_a_class_that_derives_from_nothing_is_refused_before_anything_starts(
    tmp_path: Path, text: str, place: str
) -> None:
    (tmp_path / "mine.py").write_text(f"{text}\n", "utf-8")
    write(tmp_path / "own", "track", "mine", "name: own\ncode: mine.py:Mine\n")
    base = (
        ("runner.train.trackers.Tracker", "track=mine"),
        ("Sft of runner.train.objectives", "objective.code=mine.py:Mine"),
    )
    for wanted, word in base:
        result = runner(*PODS, f"where={place}", "--config-dir", "own", word)
        said = " ".join(result.stderr.split())
        assert result.exit_code == 2 and f"derive it from {wanted}" in said, result.output


WRONG = {
    "the trainer": ("from runner.train.objectives.sft import SftTrainer as Base", "Base", "objective.code"),
    "another objective": ("from runner.train.objectives.preference import Dpo", "Dpo", "objective.code"),
    "through another class": (
        "from runner.train.objectives.kto import Kto\nclass Half(Kto): ...",
        "Half",
        "objective.code",
    ),
    "the base of all": ("from runner.train.objectives.objective import Objective", "Objective", "objective.code"),
    "a tracker": ("from runner.train.trackers import Tracker", "Tracker", "objective.code"),
    "an objective": ("from runner.train.objectives.sft import Sft", "Sft", "data.format"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", WRONG)
def test_a_class_that_derives_from_another_kind_is_refused_before_anything_starts(case: str, tmp_path: Path) -> None:
    text, base, key = WRONG[case]
    (tmp_path / "mine.py").write_text(f"{text}\nclass Mine({base}): ...\n", "utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', "utf-8")
    rows = ("data=file", "data.path=rows.jsonl") if key == "data.format" else ()
    result = runner(*PODS, *rows, f"{key}=mine.py:Mine")
    wanted = "Sft" if key == "objective.code" else "RowFormat"
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and f"mine.py:Mine is derived from {base}, and not from {wanted}" in said, (
        result.output
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "text",
    [
        "import runner.train.objectives.sft as sft\nclass Mine(sft.Sft): ...",
        "from runner.train.objectives import Sft as Base\nclass Mixin: ...\nclass Mine(Mixin, Base): ...",
        "from somewhere import Base\nclass Mine(Base): ...",
    ],
)
def test_a_class_of_which_reading_does_not_tell_is_left_to_the_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{text}\n", "utf-8")
    (tmp_path / "somewhere").mkdir()
    base = "Sft of runner.train.objectives"
    assert user_code.class_problems("mine.py:Mine", "objective.code", base, here=False) == []


@pytest.mark.usefixtures("here")
def test_code_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    result = runner("objective.code=absent.py:Mine", "train.max_steps=1")
    assert result.exit_code == 2 and "absent.py" in result.stderr and "FILE.py:CLASS" in result.stderr
    assert f"the path is relative to {tmp_path}" in " ".join(result.stderr.split())
    (tmp_path / "mine.py").write_text("import nothing_of_that_name\n\nclass Mine: ...\n", "utf-8")
    for word, said in (("objective.code=mine.py:Min", "mine.py:Mine"), ("objective.code=mine.py:Mine", "pip install")):
        result = runner(word, "train.max_steps=1")
        assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    own = tmp_path / "own"
    write(own, "track", "lacking", "name: own\n")
    write(own, "track", "absent", "name: own\ncode: absent.py:Lines\n")
    for name, said in (("lacking", "write code: FILE.py:CLASS"), ("absent", "absent.py")):
        result = runner("--config-dir", str(own), f"track={name}", "train.max_steps=1")
        assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr


def test_a_model_is_a_yaml_file(conf: Path, tmp_path: Path) -> None:
    folder = tiny_llama.base(tmp_path / "mine")
    write(
        conf, "model", "mine",
        f"name: mine\nid: {folder}\narchitecture: llama\nhidden_size: 64\nintermediate_size: 128\nnum_layers: 3\n"
        "num_heads: 4\nnum_kv_heads: 2\nvocab_size: 64\ncontext_length: 128\ntie_embeddings: true\n",
    )  # fmt: skip
    words = tiny_llama.words(tmp_path)[2:]
    request = request_of(
        ("model=mine", *words, "train.max_steps=1", "eval.num_prompts=0", f"run.output_dir={tmp_path}"), (conf,)
    )
    _, run = train_here(resolved(request)[0])
    assert run.read("summary.json")["model"] == "mine"


FORMAT = """
from runner.data.user_formats import RowFormat


class Tickets(RowFormat):
    def fits(self, row):
        return "ticket" in row

    def convert(self, row):
        if "worse" in row:
            return {"prompt": row["ticket"], "chosen": row["reply"], "rejected": row["worse"]}
        if row["reply"] is None:
            raise ValueError("the ticket is open")
        said = [{"role": "user", "content": row["ticket"]}, {"role": "assistant", "content": row["reply"]}]
        return {"messages": said}


class Lists(RowFormat):
    def convert(self, row):
        return [row["ticket"]]


class Roles(RowFormat):
    def convert(self, row):
        return {"messages": [{"role": "agent", "content": row["reply"]}]}


class Unwritten(RowFormat): ...


class Other(dict): ...
"""


@pytest.fixture
def tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tickets.py").write_text(FORMAT, "utf-8")
    rows = [{"ticket": f"Printer {n} is on fire", "reply": f"Call {n}, and leave"} for n in range(20)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path


def test_a_row_format_is_a_class_and_a_key(conf: Path, tickets: Path) -> None:
    write(conf, "data", "tickets", "name: tickets\npath: tickets.jsonl\nformat: tickets.py:Tickets\n")
    spec = spec_of(conf, "data=tickets", "data.path=tickets.jsonl", "train.max_length=128")
    (found,), _ = inspect_files(spec.data, "sft")
    first = found.rows[0]
    assert isinstance(first, Example) and first.dialogue and found.shape == "tickets.py:Tickets"
    assert first.completion == [{"role": "assistant", "content": "Call 0, and leave"}]
    _, run = train_here(spec)
    assert len(list(run.metrics())) == 3

    spec = inputs.with_absolute_paths(spec)
    assert spec.data.format == f"{tickets / 'tickets.py'}:Tickets"  # so the file travels to a pod with the run
    assert dict(named_places(spec))["data.format"] == str(tickets / "tickets.py")


@pytest.mark.usefixtures("here")
def test_the_verbs_read_rows_with_a_format_of_ones_own(tickets: Path) -> None:
    rows = ("data=file", "data.path=tickets.jsonl", "data.format=tickets.py:Tickets")
    shown = json.loads(runner("data", "preview", *rows, "--json").stdout)
    assert shown["rows"][0]["content"]["completion"] == [{"role": "assistant", "content": "Call 0, and leave"}]
    assert runner("data", "stats", *rows).exit_code == 0
    planned = runner("plan", *rows, "model=smollm2_135m", "hw=cpu")
    assert planned.exit_code == 0 and "20" in planned.output, planned.output
    place = ("plan", "where=runpod", "hw=h100", "model=mistral7b", "method=lora", *rows)
    assert runner(*place).exit_code == 0
    (tickets / "tickets.py").write_text(f"import aside\n{FORMAT}", "utf-8")
    (tickets / "aside.py").write_text("", "utf-8")
    result = runner(*place)
    assert result.exit_code == 2 and "imports modules of this machine (aside.py)" in " ".join(result.stderr.split())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tickets", "or FILE.py:NAME, a Python file and a name in it"),
        ("alpacca", "did you mean alpaca?"),
        ("tickets.py", "write data.format=tickets.py:NAME"),
        ("tickets.py:Ticket", "did you mean tickets.py:Tickets?"),
        ("absent.py:Tickets", "name a Python file and its class, FILE.py:CLASS"),
        ("tickets.py:Other", "derive it from runner.data.user_formats.RowFormat"),
        ("tickets.py:Unwritten", "tickets.py:Unwritten has no method convert"),
        ("tickets.py:Unwritten", "define convert(self, row)"),
        ("tickets.py:Lists", "Lists.convert returned a list, not a row"),
        ("tickets.py:Roles", "as Roles converts it: messages[0] has the unknown role 'agent'"),
    ],
)
def test_a_format_that_is_none_is_said_before_anything_starts(tickets: Path, name: str, said: str) -> None:
    result = runner("data=file", "data.path=tickets.jsonl", f"data.format={name}", "model=smollm2_135m", "hw=cpu")
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr


def test_rows_that_a_format_does_not_take_are_mistakes_of_these_rows(tickets: Path) -> None:
    rows = [
        {"ticket": "a", "reply": "b"}, {"ticket": "a", "reply": None}, {"reply": "b"}, {"ticket": "a"},
        {"ticket": "a", "reply": "good", "worse": "bad"},
    ]  # fmt: skip
    (tickets / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = DataSpec(path="odd.jsonl", format="tickets.py:Tickets")
    (found,), _ = inspect_files(data, "sft")
    said = [problem.what for problem in found.problems]
    place = f"(data.format: {tickets}/tickets.py, line 13, in convert)"
    assert said[0] == f"Tickets cannot read it: the ticket is open {place}"
    assert said[1] == "does not fit Tickets, the format that data.format names: its columns are reply"
    assert said[2].startswith("Tickets cannot read it: KeyError: 'reply' (data.format: ")
    assert [len(found.rows), len(said)] == [2, 3]
    (tickets / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows[2], rows[4])), "utf-8")
    skip = {"path": "pairs.jsonl", "on_error": "skip", "eval_fraction": 0.0}
    (pair,) = read_dataset(data.model_copy(update=skip), 0, "preference").train
    assert isinstance(pair, Preference) and pair.chosen == [{"role": "assistant", "content": "good"}]
