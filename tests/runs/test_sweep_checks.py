"""What is wrong with a sweep is said before its first run."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from runner.launcher import local
from runner.rundir.directory import Outcome, RunDir
from runner.runs.sweep_metric import HELD_OUT, unknown_metric, unwritten_metric
from runner.spec import RunSpec
from tests.support.front import runner, spec_of, write


def test_a_bare_m_starts_nothing(here: Path) -> None:
    told = runner("-m")
    assert told.exit_code == 2 and "-m sweeps over values, and none is named" in told.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("eval.after.los", "did you mean run.metric=eval.after.loss?"),
        ("train.loss", "did you mean run.metric=train.loss_last?"),
        ("eval_loss", "did you mean run.metric=eval.after.loss?"),
        ("accuracy", "write run.metric=eval.after.loss, or train.loss_last"),
    ],
)
def test_a_metric_that_no_run_writes_is_refused(metric: str, remedy: str) -> None:
    problem = unknown_metric(metric)
    assert problem is not None and problem.what == f"run.metric={metric}: no run writes such a number"
    assert problem.remedy is not None and problem.remedy.startswith(remedy.partition("=")[0])
    told = runner("-m", "train.max_steps=1,2", f"run.metric={metric}")
    assert told.exit_code == 2 and f"run.metric={metric}: no run writes such a number" in told.stderr


@pytest.mark.parametrize(
    "metric", ["eval.after.loss", "eval.before.exact_match", "train.tokens_per_second", "seconds", "cost.usd",
               "plan.peak_gib.measured", "eval.after.reward_of_my_own"],
)  # fmt: skip
def test_a_metric_that_some_run_writes_is_taken(metric: str) -> None:
    assert unknown_metric(metric) is None


ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def test_what_an_objective_measures_is_what_its_trainer_names() -> None:
    from runner.train.objectives import kto, preference, sft

    trainers = {
        "sft": sft.SftTrainer, "pretrain": sft.SftTrainer, "dpo": preference.DpoTrainer, "kto": kto.KtoTrainer,
        "orpo": preference.OrpoTrainer, "reward": preference.RewardModelTrainer,
    }  # fmt: skip
    for name, trainer in trainers.items():
        assert {"loss", *trainer.METRICS.values()} == set(HELD_OUT[name]) - {"perplexity"}, name
    assert set(preference.CpoTrainer.METRICS.values()) - set(HELD_OUT["dpo"]) == {"nll_loss"}


PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("words", "metric", "why", "instead"),
    [
        ("eval.num_prompts=0", "eval.after.exact_match", "eval.num_prompts=0 asks no prompts", "eval.after.perplexity"),
        ("", "eval.after.reward_accuracy", "objective=sft does not measure it", "eval.after.num_endless"),
        ("", "eval.before.reward_mine", "objective=sft does not measure it", "eval.before.loss"),
        ("data.eval_fraction=0", "eval.after.loss", "data.eval_fraction=0 holds no rows out", "train.loss_last"),
        ("objective=dpo", "eval.after.perplexity", "objective=dpo does not measure it", "eval.after.reward_margin"),
        ("objective=dpo", "eval.after.nll_loss", "objective=dpo does not measure it", "eval.after.logps_chosen"),
        ("", "plan.x", "the plan of this run has no such number", "plan.seconds.error"),
        ("", "plan.host_ram_gib.error", "the plan of this run has no such number", "plan.peak_gib.measured"),
        ("", "cost.usd", "this run rents nothing", "train.tokens_per_second"),
        ("", "cost.x", "this run rents nothing", "seconds"),
    ],
)
def test_a_metric_that_this_run_does_not_write_is_refused(
    here: Path, trained: list[RunSpec], words: str, metric: str, why: str, instead: str
) -> None:
    (here / "x.jsonl").write_text(PAIR * 40 if "dpo" in words else ROW * 40, "utf-8")
    sweep = ["-m", "train.max_steps=1,2", "data.path=x.jsonl", *words.split()]
    told = " ".join(runner(*sweep, f"run.metric={metric}").stderr.split())
    assert f"run.metric={metric}: {why}" in told and instead in told and not trained
    assert runner(*sweep, f"run.metric={instead}").exit_code == 0 and len(trained) == 2


def test_rewards_are_of_grpo_and_the_bill_is_of_rented_runs(here: Path) -> None:
    (here / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 40, "utf-8")
    grpo = ("objective=grpo", "train.batch_size=8", "data.path=q.jsonl", "objective.rewards=[exact_match,length]")
    assert unwritten_metric(spec_of(*grpo, "run.metric=eval.after.reward_length"), None) is None
    assert unwritten_metric(spec_of(*grpo), None) is None
    problem = unwritten_metric(spec_of(*grpo, "run.metric=eval.after.loss"), None)
    assert problem is not None and "eval.after.loss: objective=grpo does not measure it" in problem.what
    assert problem.remedy is not None and problem.remedy.endswith(
        "reward, eval.after.reward_exact_match, eval.after.reward_length"
    )
    rented = ("where=runpod", "hw=l4")
    assert unwritten_metric(spec_of(*rented, "run.metric=cost.usd"), None) is None
    problem = unwritten_metric(spec_of(*rented, "run.metric=cost.x"), None)
    assert problem is not None and problem.remedy is not None and "cost.usd, cost.predicted_usd" in problem.remedy


@pytest.mark.parametrize(
    ("words", "metric", "mode"),
    [
        ("", "eval.after.loss", "min"),
        ("objective=grpo", "eval.after.reward", "max"),
        ("objective=grpo run.metric=eval.after.reward", "eval.after.reward", "max"),
        ("objective=grpo run.metric_mode=min", "eval.after.reward", "min"),
        ("objective=grpo run.metric=train.loss_last", "train.loss_last", "min"),
        ("run.metric=eval.after.exact_match run.metric_mode=max", "eval.after.exact_match", "max"),
    ],
)
def test_the_metric_is_the_objectives_unless_one_is_named(here: Path, words: str, metric: str, mode: str) -> None:
    (here / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 40, "utf-8")
    run = spec_of("train.batch_size=8", "data.path=q.jsonl", *words.split()).run
    assert (run.metric, run.metric_mode) == (metric, mode)


def test_a_sweep_of_grpo_is_sorted_by_its_reward(here: Path, trained: list[RunSpec]) -> None:
    sweep = ("-m", "train.batch_size=8", "train.max_steps=1")
    told = runner(*sweep, "objective=grpo", "train.seed=1,2", "--json")
    assert told.exit_code == 0 and len(trained) == 2, told.stderr
    (kept,) = here.glob("runs/sweeps/*/sweep.json")
    assert json.loads(kept.read_text("utf-8"))["metric"] == "eval.after.reward"

    told = runner(*sweep, "objective=sft,grpo")
    said = " ".join(told.stderr.split())
    assert told.exit_code == 2 and "eval.after.loss (min) and eval.after.reward (max)" in said and len(trained) == 2
    told = runner(*sweep, "objective=sft,grpo", "run.metric=train.loss_last", "run.metric_mode=min")
    assert told.exit_code == 0 and len(trained) == 4, told.stderr


def test_pods_at_once_without_a_rented_place_are_refused_before_torch_is_loaded(here: Path) -> None:
    told = runner("-m", "sweep.max_pods=3", "train.max_steps=1,2")
    assert told.exit_code == 2 and "2 of 2 runs are not rented" in told.stderr
    assert "Loading torch" not in told.stderr


def test_a_folder_that_cannot_be_written_is_told_in_words(here: Path) -> None:
    (here / "file").write_text("", "utf-8")
    told = runner("-m", "train.max_steps=1,2", f"run.output_dir={here / 'file'}")
    assert (
        told.exit_code == 2 and f"run.output_dir={here / 'file'} cannot be written to: Not a directory" in told.stderr
    )
    told = runner("-m", "train.max_steps=1,2", "run.output_dir=/proc/x")
    assert told.exit_code == 2 and "/proc/x cannot be written to" in told.stderr


# ── points that cannot run ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The runs that are started; each reports its seed as its loss: NaN for 13, and 7 breaks in a way of its own."""
    seen: list[RunSpec] = []

    def execute(run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: object = None) -> Outcome:
        seen.append(spec)
        if spec.train.seed == 7:
            raise ZeroDivisionError("by zero")
        run.set_status("done")
        loss = float("nan") if spec.train.seed == 13 else float(spec.train.seed)
        run.write("summary.json", {"run_id": run.id, "eval": {"after": {"loss": loss}}})
        return Outcome(run, 0)

    monkeypatch.setattr(local, "execute", execute)
    return seen


@pytest.mark.parametrize(
    ("words", "runs", "code", "why"),
    [
        ("train.max_steps=0,1,2", [1, 2], 2, "train.max_steps=0: expected at least 1"),
        ("train.precision=fp32,fp16 train.max_steps=3", [3], 2, "train.precision=fp16 needs a GPU"),
        ("objective=sft,dpo train.max_steps=3", [3], 2, "objective=dpo needs preferences"),
        ("hw=local,h100 train.max_steps=3", [3], 3, "h100 needs 1 × H100"),
        ("method=lora,lorra train.max_steps=3", [3], 2, "there is no method 'lorra'"),
        ("method=lora,full method.rank=4 train.max_steps=3", [3], 2, "method=full has no rank"),
    ],
)
def test_a_point_that_cannot_run_is_told_first_and_is_a_row(
    here: Path, trained: list[RunSpec], words: str, runs: list[int], code: int, why: str
) -> None:
    told = runner("-m", *words.split(), "--json")
    assert told.exit_code == 1
    assert [spec.train.max_steps for spec in trained] == runs
    total = len(runs) + 1
    assert f"1 of {total} points cannot run; the others do" in told.stderr and why in told.stderr
    rows = json.loads(told.stdout)
    assert sorted(row["index"] for row in rows) == list(range(total))
    (wrong,) = (row for row in rows if row["exit_code"])
    assert wrong["exit_code"] == code and why in wrong["error"]
    assert (wrong["run_id"], wrong["metric"]) == (None, None)


@pytest.mark.parametrize(
    ("words", "code", "whats"),
    [
        ("train.sed=1 train.seed=1,2", 2, ["unknown key train.sed", "did you mean train.seed?"]),
        ("train.max_steps=0,-1", 2, ["train.max_steps=0: expected", "train.max_steps=-1: expected"]),
        ("train.max_steps=0 train.seed=1,2", 2, ["train.max_steps=0: expected at least 1"]),
        ("hw=h100 train.seed=1,2", 3, ["h100 needs 1 × H100"]),
        ("method=lorra,fulll", 2, ["there is no method 'lorra'"]),
        ("train.seed=interval(1,3)", 2, ["only a sweeper that searches", "name values"]),
        ("train.seed=1,2 push.to=me/tuned", 2, ["the runs of a sweep would upload to me/tuned", "upload the best"]),
        ("train.seed=1,2 +hydra.sweeper.pruner=median", 2, ["cannot prune", "eval.early_stopping_patience=3"]),
    ],
)
def test_where_no_point_can_run_nothing_is_started(
    here: Path, trained: list[RunSpec], words: str, code: int, whats: list[str]
) -> None:
    told = runner("-m", *words.split())
    assert told.exit_code == code and not trained
    assert all(told.stderr.count(what) == 1 for what in whats), told.stderr
    assert list(here.iterdir()) == []


def test_a_fault_of_one_run_costs_only_that_run(here: Path, trained: list[RunSpec]) -> None:
    told = runner("-m", "train.seed=7,1", "--json")
    assert told.exit_code == 1
    assert [(row["metric"], row["exit_code"]) for row in json.loads(told.stdout)] == [(1.0, 0), (None, 1)]


# ── what a recipe says about the sweep ─────────────────────────────────────────────────────────

RECIPE = """\
defaults: [config, override /hydra/sweeper: {sweeper}, _self_]
hydra:
  sweeper:
    params:
      {first}
      train.max_steps: 1,2
"""


def test_params_of_a_recipe_are_a_grid_and_a_typed_word_wins(here: Path, trained: list[RunSpec]) -> None:
    write(here / "mine.yaml", RECIPE.format(sweeper="basic", first="train.seed: 3,4"))
    assert runner("-m", "mine.yaml", "train.seed=5").exit_code == 0
    assert [(spec.train.seed, spec.train.max_steps) for spec in trained] == [(5, 1), (5, 2)]


@pytest.mark.parametrize("sweeper", ["basic", "searching"])
def test_params_of_a_recipe_are_checked_like_words(
    here: Path, trained: list[RunSpec], searching: Any, sweeper: str
) -> None:
    write(here / "mine.yaml", RECIPE.format(sweeper=sweeper, first="train.sed: 3,4"))
    told = runner("-m", "mine.yaml", "method=lora")
    assert told.exit_code == 2 and not trained
    assert "unknown key train.sed  (mine.yaml:5)" in told.stderr and "did you mean train.seed?" in told.stderr


# ── a sweeper that chooses its points ──────────────────────────────────────────────────────────

SEARCHING = """
from dataclasses import dataclass
from typing import Any, Dict, Optional
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

@dataclass
class Conf:
    _target_: str = "hydra_plugins.searching.Searching"
    direction: Any = "minimize"
    params: Optional[Dict[str, str]] = None

ConfigStore.instance().store(group="hydra/sweeper", name="searching", node=Conf)

class Searching(Sweeper):
    # chooses what it is told to; ends, as Optuna does, at what is no number
    choices: list = []
    heard: list = []
    directions: list = []
    def __init__(self, direction, params):
        self.directions.append(direction)
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)
    def sweep(self, arguments):
        for number, words in enumerate(self.choices):
            (result,) = self.launcher.launch([words], initial_job_idx=number)
            self.heard.append(result.return_value)
            assert self.heard[-1] == self.heard[-1], "NaN"
"""


@pytest.fixture
def searching(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An HPO sweeper as a plug-in of Hydra's."""
    package = here.parent / f"{here.name}_plugins" / "hydra_plugins"
    write(package / "searching.py", SEARCHING)
    import hydra_plugins

    monkeypatch.setattr(hydra_plugins, "__path__", [*hydra_plugins.__path__, str(package)])
    monkeypatch.delitem(sys.modules, "hydra_plugins.searching", raising=False)
    module = import_module("hydra_plugins.searching")
    Plugins.instance().register(module.Searching)
    return module.Searching


INF = float("inf")


def test_a_trial_without_a_number_or_that_cannot_run_is_the_worst_and_the_search_goes_on(
    here: Path, trained: list[RunSpec], searching: Any
) -> None:
    searching.choices = [[f"++train.seed={n}"] for n in (13, 7, 3)] + [["++train.max_steps=0"], ["++train.seed=2"]]
    told = runner("-m", "hydra/sweeper=searching", "train.seed=int(interval(1,20))", "--json")
    assert searching.heard == [INF, INF, 3.0, INF, 2.0]
    assert told.exit_code == 1
    assert [row["metric"] for row in json.loads(told.stdout)] == [2.0, 3.0, None, None, None]


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("train.max_steps=int(interval(0,9))", "train.max_steps=0: expected at least 1"),
        ("train.max_steps=interval(1,9)", "write train.max_steps=int(interval(1,9))"),
        ("train.learnin_rate=interval(1e-5,1e-3)", "did you mean train.learning_rate?"),
        ("method=choice(lora,lorra)", "there is no method 'lorra'"),
        ("hydra.sweeper.direction=maximize", "write run.metric_mode=max"),
        ("hydra.sweeper.direction=[minimize,maximize]", "a run has one metric"),
    ],
)
def test_what_a_sweeper_may_choose_is_checked_before_the_first_run(
    here: Path, trained: list[RunSpec], searching: Any, word: str, what: str
) -> None:
    told = runner("-m", "hydra/sweeper=searching", word)
    assert told.exit_code == 2 and what in told.stderr and not trained


def test_the_direction_of_a_search_is_that_of_the_metric(here: Path, trained: list[RunSpec], searching: Any) -> None:
    searching.choices = [["++train.seed=13"]]
    runner("-m", "hydra/sweeper=searching", "train.seed=int(interval(1,20))", "run.metric_mode=max")
    assert (searching.directions, searching.heard) == (["maximize"], [-INF])


def test_a_sweeper_that_breaks_is_told_in_words(here: Path, trained: list[RunSpec], searching: Any) -> None:
    searching.choices = [["nowhere.x=1"]]
    told = runner("-m", "hydra/sweeper=searching", "train.seed=int(interval(1,20))")
    assert told.exit_code == 1 and "the sweeper stopped: " in told.stderr and "Traceback" not in told.stderr
