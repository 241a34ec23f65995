"""What `plan`, `fit` and `table` promise: a stable contract, true answers, exit codes, and nothing heavy."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from runner.config import conf_files
from tests.support.front import here, laptop, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

CONTRACT = {
    "fits", "peak_gib", "peak_phase", "phases", "host_ram_gib", "disk_gib", "zero_stage", "deepspeed", "micro_batch",
    "accumulation", "num_steps", "tokens_total", "hours", "usd", "price_source", "command", "env", "notes",
}  # fmt: skip
PHASES = ("load", "forward", "backward", "step", "eval", "save")


def plan(*words: str) -> dict[str, Any]:
    """`plan --json`, whatever its exit code, which must agree with what it says."""
    result = runner("plan", "--json", *words)
    content: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (3 if content["reasons"] else 0), result.output
    return content


# --- the contract ------------------------------------------------------------------------------


def test_the_contract() -> None:
    content = plan("model=mistral7b", "method=full", "hw=h100x3")
    assert content.keys() >= CONTRACT
    assert tuple(content["phases"]) == PHASES
    low, expected, high = (content["peak_gib"][k] for k in ("low", "expected", "high"))
    assert low <= expected <= high
    peak = content["phases"][content["peak_phase"]]
    assert sum(peak.values()) == pytest.approx(expected, abs=0.02)
    assert all(sum(terms.values()) <= expected + 0.02 for terms in content["phases"].values())
    assert content["command"][-3:] == ["-m", "runner.train", "runs/ID/spec.json"]
    assert content["price_source"].startswith("conf/hw, seen 20")


@pytest.mark.parametrize("recipe", conf_files.recipes())
def test_every_recipe_plans(recipe: str) -> None:
    content = plan(f"recipe={recipe}")
    assert content["fits"], content["reasons"]


IA3 = {
    "phi2": ("[k_proj,v_proj,fc2]", "[fc2]"),
    "phi3_mini": ("[qkv_proj,down_proj]", "[down_proj]"),
    "mixtral_8x7b": ("[k_proj,v_proj]", "[]"),
}
"""(IA)³'s layers in families that do not call them as Llama does."""


@pytest.mark.parametrize("method", conf_files.options("method"))
@pytest.mark.parametrize("model", ["mistral7b", "phi2", "mixtral_8x7b", "qwen3_8b", "phi3_mini", "smollm2_135m"])
def test_every_method_plans_every_kind_of_model(model: str, method: str) -> None:
    named: tuple[str, ...] = ()
    if method == "ia3" and model in IA3:
        refused = runner("plan", f"model={model}", "method=ia3", "hw=h200x8")
        assert refused.exit_code == 2
        targets, inside = IA3[model]
        assert f"write method.arguments.feedforward_modules={inside}, too" in " ".join(refused.stderr.split())
        named = (f"method.target_modules={targets}", f"method.arguments.feedforward_modules={inside}")
    content = plan(f"model={model}", f"method={method}", "hw=h200x8", *named)
    assert content["peak_gib"]["expected"] > 0.5
    assert content["trainable_parameters"] > 0


def test_the_main_job_fits_a_laptop() -> None:
    content = plan()
    assert content["fits"]
    assert content["peak_gib"]["expected"] == pytest.approx(2.15, abs=0.1)  # 1.8 to 1.9, measured


def test_the_main_job_is_predicted_whether_or_not_its_model_is_unpacked(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 294 steps: 69,582 tokens, and 52 s of measuring before and after on two cores."""
    known = plan("hw.num_cpus=2")
    monkeypatch.setenv("RUNNER_CACHE", str(here / "empty"))
    for content in (known, plan("hw.num_cpus=2")):
        assert content["num_steps"] == pytest.approx(294, rel=0.02)
        assert content["tokens_total"] == pytest.approx(69_582, rel=0.02)
        assert content["hours_parts"]["evaluation"] * 3600 == pytest.approx(52, rel=0.1)


def test_measuring_takes_longer_the_more_is_measured() -> None:
    def seconds(*words: str) -> float:
        return float(plan("hw.num_cpus=1", *words)["hours_parts"]["evaluation"]) * 3600

    usual, unasked = seconds(), seconds("eval.num_prompts=0")
    assert unasked < usual / 3
    assert seconds("eval.num_prompts=0", "eval.every_steps=100") > 1.9 * unasked  # two more
    assert seconds("eval.max_new_tokens=128") > usual  # after training answers end where they should
    assert seconds("eval.max_new_tokens=16") < usual


def test_the_demo_data_for_another_model_are_named_as_such(here: Path) -> None:
    note = "data is the bundled demo: name data= and train.max_length= for your own run"
    assert note not in plan()["notes"]
    assert note in plan("model=mistral7b", "hw=h100")["notes"]
    assert note in " ".join(runner("plan", "model=mistral7b", "hw=h100").output.split())
    assert note not in plan("model=mistral7b", "hw=h100", "data=ultrachat_200k", "train.max_steps=10")["notes"]


def test_a_held_out_set_that_nobody_counted_is_left_out_and_the_plan_says_so() -> None:
    words = ("model=mistral7b", "hw=h100", "data=hub", "data.id=org/rows", "data.eval_split=test", "train.max_steps=10")
    note = "time: the held-out loss is left out, as the number of held-out rows is not known"
    unknown, bounded = plan(*words), plan(*words, "data.max_eval_examples=500")
    assert note in unknown["notes"] and note not in bounded["notes"]
    assert bounded["hours_parts"]["evaluation"] > unknown["hours_parts"]["evaluation"]


# --- facts that users have reported: who fits, who dies, and where --------------------------------


def test_llama2_7b_full_zero2_dies_on_eight_v100(here: Path) -> None:
    """With DeepSpeed's own buckets of 500 million elements, as its documentation has them; 17 million fit, barely."""
    words = ("model=llama2_7b", "method=full", "hw=v100x8", "deepspeed=zero2", "train.max_length=2048")
    batch = ("train.batch_size=64", "train.micro_batch_size=4")
    own = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "fp16": {"enabled": True}}
    write(here / "zero2.json", json.dumps(own))
    theirs = plan(*words, *batch, "deepspeed.config=./zero2.json")
    assert not theirs["fits"]
    assert theirs["peak_phase"] == "backward"
    assert plan(*words, *batch)["peak_gib"]["expected"] < theirs["peak_gib"]["expected"] - 1.5


def test_llama3_8b_full_zero3_dies_on_eight_24_gb_cards() -> None:
    eight = ("hw=rtx4090", "hw.num_gpus=8", "deepspeed=zero3", "train.max_length=4096", "train.batch_size=8")
    content = plan("model=llama3_8b", "method=full", *eight)
    assert not content["fits"]
    assert content["peak_phase"] == "backward"


def test_a_32b_with_full_offload_dies_of_744_gb_of_main_memory() -> None:
    words = ("model=llama30b", "method=full", "hw=a100x8", "deepspeed=zero3_offload", "hw.host_memory_gib=693")
    content = plan(*words)
    assert content["peak_gib"]["expected"] < 80
    assert any("main memory" in reason for reason in content["reasons"])


def test_70b_qlora4_on_four_24_gb_cards_dies_while_loading_and_would_settle_near_10_gb() -> None:
    content = plan("model=llama2_70b", "method=qlora4", "hw=rtx4090", "hw.num_gpus=4", "deepspeed=zero3")
    assert not content["fits"]
    assert content["peak_phase"] == "load"
    assert 9 < sum(content["phases"]["step"].values()) < 13


# --- answers ------------------------------------------------------------------------------------


def test_zero_stages_shard_more_and_more() -> None:
    words = ("model=mistral7b", "method=full", "hw=a100x8", "train.micro_batch_size=1", "train.batch_size=8")
    peaks = [plan(*words, f"deepspeed={s}")["peak_gib"]["expected"] for s in ("none", "zero1", "zero2", "zero3")]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[3] < peaks[0] / 4


def test_the_deepspeed_json_has_nothing_open() -> None:
    content = plan("model=mistral7b", "method=full", "hw=h100x3", "deepspeed=zero3")
    assert '"auto"' not in json.dumps(content["deepspeed"])
    printed = runner("plan", "--deepspeed", "model=mistral7b", "method=full", "hw=h100x3", "deepspeed=zero3")
    assert json.loads(printed.stdout) == content["deepspeed"]
    assert content["deepspeed"]["zero_optimization"]["stage"] == 3


def test_a_users_own_deepspeed_json_is_planned(here: Path) -> None:
    own = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e8}, "bf16": {"enabled": "auto"},
           "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
           "gradient_accumulation_steps": "auto"}  # fmt: skip
    write(here / "mine.json", json.dumps(own))
    content = plan("model=mistral7b", "method=full", "hw=a100x8", "deepspeed=zero3", "deepspeed.config=mine.json")
    assert content["deepspeed"]["zero_optimization"]["stage3_max_live_parameters"] == 1e8


def test_offload_is_never_silent() -> None:
    assert plan("model=llama2_70b", "method=full", "hw=h100x3")["zero_stage"] == "zero3"


def test_what_cannot_fit_is_refused_with_what_does(here: Path) -> None:
    result = runner("model=llama2_13b", "method=full", "hw=rtx4090")
    assert result.exit_code == 3
    assert "GiB at its peak" in result.output
    assert "it fits with" in result.output
    assert not (here / "runs").exists()


def test_slower_and_smaller_is_told_where_neither_alone_fits() -> None:
    """It came to a sixteenth of the context instead."""
    run = ("plan", "hw=l4", "model=mistral7b", "method=lora", "train.max_length=8192", "train.batch_size=8")
    both = "train.gradient_checkpointing=true train.micro_batch_size=1"
    asked = "train.gradient_checkpointing=4", "train.micro_batch_size=2"
    assert f"it fits with {both} (" in " ".join(runner(*run, *asked).stdout.split())
    assert runner(*run, *both.split()).exit_code == 0
    assert both not in " ".join(runner(*run, asked[0], "train.micro_batch_size=1").stdout.split())


def test_limits_of_money_and_time_refuse() -> None:
    words = ("model=mistral7b", "method=lora", "hw=h100")
    assert plan(*words)["reasons"] == []
    (cost,) = plan(*words, "where.max_usd=0.001")["reasons"]
    assert cost.endswith("more than where.max_usd=0.001")
    (time,) = plan(*words, "where.max_hours=0.001")["reasons"]
    assert time.endswith("more than where.max_hours=0.001")


def test_a_data_set_of_the_catalogue_has_a_time_and_a_price() -> None:
    planned = plan("model=mistral7b", "method=qlora4", "hw=rtx4090", "data=guanaco", "where=runpod", "where.max_usd=5")
    assert planned["num_steps"] == 741  # 9,846 rows of 397 tokens in 3,940 sequences of 1,024, three passes, 16 a step
    assert 1 < planned["usd"] < 5 and planned["reasons"] == []
    assert any("an estimate: bytes as the card" in note for note in planned["notes"])


def test_a_limit_without_a_figure_refuses_here_and_is_held_to_on_a_pod() -> None:
    words = (
        "model=mistral7b",
        "method=lora",
        "hw=h100",
        "data=hub",
        "data.id=org/rows",
        "where.max_usd=20",
    )  # rows not counted
    (reason,) = plan(*words)["reasons"]
    assert reason == "where.max_usd=20: what the run costs is not known"
    rented = plan(*words, "where=runpod")
    assert rented["reasons"] == []
    assert f"{reason}; the pod saves a checkpoint and ends at that limit" in rented["notes"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("method=qlora8", "hw=h100x3", "deepspeed=zero3"), "method=qlora4"),
        (("method=full", "hw=h100x3", "deepspeed=zero2_offload", "train.optimizer=adamw_8bit"), "optimizer=adamw"),
        (("method=full", "method.master_weights=false", "hw=t4"), "master_weights=true"),
    ],
)
def test_cells_that_cannot_work_are_refused(words: tuple[str, ...], remedy: str) -> None:
    result = runner("plan", "model=mistral7b", *words)
    assert result.exit_code == 2
    assert remedy in result.output


def test_where_auto_stays_here_if_it_fits_and_else_rents() -> None:
    assert spec_of("where=auto").where.name == "local"
    away = spec_of("where=auto", "model=mistral7b", "method=full")
    assert away.where.name == "runpod"
    assert away.hw.name in conf_files.options("hw")


@pytest.mark.parametrize("verb", ["plan", "show", "fit", "table", "explain train.seed"])
def test_verbs_that_answer_for_one_run_refuse_a_sweep_in_words(verb: str) -> None:
    result = runner(*verb.split(), "-m", "method=full,lora")
    assert result.exit_code == 2
    assert f"-m sweeps over several runs, and {verb.split()[0]} answers for one" in result.output
    assert "python -m runner -m … plans every point" in result.output


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_what_where_auto_would_rent_is_refused_as_its_own_choice(sweep: tuple[str, ...], here: Path) -> None:
    result = runner(*sweep, "where=auto", "model=mistral7b", "method=full", "train.max_steps=1")
    assert result.exit_code == 2
    assert "where=auto: it needs" in result.output and "RUNPOD_API_KEY is not set" in result.output
    assert "where=local on a machine that has it" in result.output
    assert not (here / "runs").exists()


# --- any model ----------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_folder_with_a_config_is_planned(here: Path) -> None:
    write(here / "tiny" / "config.json", json.dumps(CONFIG))
    content = plan("model=hub", "model.id=tiny", "hw=rtx4090")
    assert content["fits"]
    full = plan("model=hub", "model.id=tiny", "hw=rtx4090", "method=full")
    assert full["trainable_parameters"] == 1_100_048_384  # TinyLlama 1.1B


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Hub that has org/open, and org/gated behind a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gated = "gated" in self.path and self.headers.get("Authorization") != "Bearer secret"
            found = self.path.split("/resolve/")[0] in ("/org/open", "/org/gated")
            self.send_response(403 if gated else 200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(CONFIG).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(here / "hf"))
    monkeypatch.setenv("RUNNER_CACHE", str(here / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.usefixtures("hub")
def test_a_hub_id_is_planned_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan("model=hub", "model.id=org/open", "hw=rtx4090", "method=full")
    assert first["trainable_parameters"] == 1_100_048_384
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there: the answer is kept
    assert plan("model=hub", "model.id=org/open", "hw=rtx4090", "method=full") == first


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("model_id", "words"),
    [("org/gated", "accept its licence"), ("org/none", "has no config.json"), ("nowhere", "no folder nowhere")],
)
def test_a_hub_that_refuses_says_why(model_id: str, words: str) -> None:
    result = runner("plan", "model=hub", f"model.id={model_id}", "hw=rtx4090")
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.usefixtures("hub")
def test_a_token_opens_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert plan("model=hub", "model.id=org/gated", "hw=rtx4090")["fits"]


@pytest.mark.usefixtures("hub")
def test_an_offline_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = runner("plan", "model=hub", "model.id=org/open", "hw=rtx4090")
    assert result.exit_code == 2
    assert "cannot be reached" in result.output


def test_an_unknown_architecture_is_refused_and_never_guessed(here: Path) -> None:
    write(here / "odd" / "config.json", json.dumps({**CONFIG, "model_type": "nobodys"}))
    result = runner("plan", "model=hub", "model.id=odd", "hw=rtx4090")
    assert result.exit_code == 2
    assert "nobodys" in result.output


@pytest.mark.parametrize("words", [("hw.num_gpus=0",), ("train.max_length=100000",), ("train.micro_batch_size=0",)])
def test_impossible_values_are_errors_of_the_schema(words: tuple[str, ...]) -> None:
    result = runner("plan", "model=mistral7b", "hw=h100", *words)
    assert result.exit_code == 2
    assert words[0].split("=")[0] in result.output


# --- fit and table ------------------------------------------------------------------------------


def fit(*words: str) -> list[dict[str, Any]]:
    """`fit --json`."""
    return json.loads(runner("fit", "--json", *words).stdout)


def test_fit_ranks_hardware_by_cost() -> None:
    rows = fit("model=llama2_70b", "method=lora")
    fitting = [row for row in rows if row["fits"]]
    assert fitting
    assert rows[: len(fitting)] == fitting
    priced = [row["usd_per_million_tokens"] for row in fitting if row["usd_per_million_tokens"] is not None]
    assert priced == sorted(priced)
    assert {row["model"] for row in rows} == {"llama2_70b"}


def test_fit_by_time_puts_the_fastest_first() -> None:
    rows = [row for row in fit("model=llama3_8b", "method=qlora4", "--by", "time") if row["fits"]]
    speeds = [row["tokens_per_second"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)


def test_fit_tells_what_to_change_where_a_method_does_not_fit() -> None:
    rows = {row["method"]: row for row in fit("model=llama3_8b", "hw=rtx4090")}
    assert set(rows) == {"full", "freeze", "lora", "qlora4", "qlora8"}  # other adapters are planned when named
    assert rows["qlora4"]["fits"]
    assert not rows["full"]["fits"]
    assert rows["full"]["note"].startswith("fits with ")


def test_fit_agrees_with_plan() -> None:
    (row,) = fit("model=llama3_8b", "hw=h100x3", "method=full")
    words = ("train.max_length=1024", "train.batch_size=16")
    planned = plan("model=llama3_8b", "hw=h100x3", "method=full", *words)
    assert row["zero_stage"] == planned["zero_stage"]
    assert row["peak_gib"] == pytest.approx(planned["peak_gib"]["expected"], abs=0.06)


OFFLOADED = ("model=llama30b", "method=full", "hw=h100x8", "deepspeed=zero3_offload")


def test_fit_counts_main_memory_as_plan_does() -> None:
    words = ("train.max_length=1024", "train.batch_size=16")
    for size in ("300", "2000"):
        (row,) = fit(*OFFLOADED, f"hw.host_memory_gib={size}")
        planned = plan(*OFFLOADED, *words, f"hw.host_memory_gib={size}")
        assert row["fits"] == planned["fits"] == (size == "2000")
        assert row["host_ram_gib"] == pytest.approx(planned["host_ram_gib"], rel=0.01)
        assert row["host_capacity_gib"] == planned["host_capacity_gib"] == float(size)
        assert row["peak_gib"] < row["capacity_gib"]


def test_fit_says_what_main_memory_lacks_and_what_would_fit() -> None:
    (row,) = fit(*OFFLOADED, "hw.host_memory_gib=300")
    assert row["note"] == "needs 700 GiB of main memory; the machine has 300 GiB; fits with deepspeed=zero3"
    (row,) = fit(*OFFLOADED, "hw.host_memory_gib=300", "deepspeed=zero3")
    assert row["fits"]


def test_fit_takes_the_main_memory_that_a_pod_is_sure_of() -> None:
    (row,) = fit(*OFFLOADED, "hw=h100", "where=runpod")
    assert not row["fits"]
    assert "such a pod is sure of" in row["note"]
    assert fit(*OFFLOADED, "hw=h100", "where=runpod", "hw.host_memory_gib=2000")[0]["fits"]


def test_what_is_advised_fits_the_main_memory_too() -> None:
    words = ("model=llama30b", "method=full", "hw=h100x8", "deepspeed=zero1")
    assert fit(*words)[0]["note"] == "fits with deepspeed=zero3"
    assert "no single change makes it fit" in fit(*words, "hw.host_memory_gib=10")[0]["note"]


def test_fit_with_nothing_that_fits_exits_with_3() -> None:
    assert runner("fit", "model=llama2_70b", "method=full", "hw=t4").exit_code == 3


def test_the_table_orders_methods_and_sizes() -> None:
    content = json.loads(runner("table", "--json").stdout)
    by_method = {row["method"]: row["cells"] for row in content["rows"]}
    for cells in by_method.values():
        assert cells[:4] == sorted(cells[:4])  # 7B, 13B, 30B, 65B
    order = ["full, fp32 weights", "full, bf16 weights", "LoRA, rank 16", "QLoRA, 8 bits", "QLoRA, 4 bits"]
    sevens = [by_method[name][0] for name in order]
    assert sevens == sorted(sevens, reverse=True)
    assert runner("table").exit_code == 0


def test_a_key_that_is_refused_is_not_said_to_have_no_effect(here: Path) -> None:
    told = runner("fit", "model=llama3_8b", "hw=rtx4090", "where.country=US")
    assert told.exit_code == 2 and "where=local has no country" in told.stderr and "no effect" not in told.stderr
    told = runner("fit", "model=llama3_8b", "method=lora", "hw=l40s", "where=runpod", "where.country=US")
    assert told.exit_code == 0 and "where.country has no effect on fit" in told.stderr
