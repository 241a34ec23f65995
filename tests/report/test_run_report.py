"""The report of runs: whatever state a run is in, all of it is told, and nothing that comes from data is markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from runner.cloud import clock, executor
from runner.cloud.download import OURS
from runner.config.command_line import Request
from runner.config.compose import compose
from runner.config.sweep_points import read_sweep
from runner.report.run_report import comparison, curves
from runner.report.run_report.facts import RunFacts, gather
from runner.report.run_report.json_report import as_json
from runner.report.run_report.markdown import markdown
from runner.report.run_report.page import page
from runner.report.run_report.write import write_report
from runner.rundir.directory import RunDir
from runner.runs.origins import record_origins, record_resume
from runner.spec import RunSpec
from tests.support.front import runner, spec_of
from tests.support.run_dirs import ATTACK, run_dir

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WORDS = ("recipe=smollm2_quick", "hw=cpu")


@pytest.fixture
def spec(here: Path) -> RunSpec:
    """A run on a laptop, in an empty working directory."""
    return spec_of(*WORDS)


def text_of(html: str) -> str:
    """What a reader sees of a page."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def test_a_finished_run_is_told_in_all_its_parts(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs")
    shown = text_of(page([gather(run)]))
    for title in (
        "Curves",
        "Held-out rows",
        "Answers",
        "Plan beside measured",
        "Data",
        "Repeat it",
        "Settings",
        "Environment",
    ):
        assert title in shown, title
    assert "0 of 6 → 5 of 6" in shown and "4.632 → 0.5" in shown and "2 min 57 s" in shown
    assert "✓ right" in shown and "✗ wrong" in shown
    assert "Training 2.10 GiB 2.20 GiB -4.5%" in shown
    assert f"python -m runner runs/{run.id}/spec.json" in shown and "Packing efficiency 93.0%" in shown


def test_the_page_needs_no_network_and_runs_its_own_scripts_alone(spec: RunSpec, here: Path) -> None:
    html = page([gather(run_dir(spec, here / "runs"))])
    assert not re.search(r"<(link|img|iframe|script src)\b|url\(|@import", html)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None and "default-src &#x27;none&#x27;" in policy[1] and "unsafe" not in policy[1]
    assert policy[1].count("sha256-") == 3 and ' style="' not in html and not re.search(r"<[^>]+\son\w+=", html)


def test_texts_of_data_models_and_logs_are_never_markup(spec: RunSpec, here: Path) -> None:
    hostile = ATTACK + "</script><!--<script>"
    run = run_dir(spec, here / "runs", state="failed", hostile=hostile, error=f"no more {hostile}", data=hostile)
    for html in (page([gather(run)]), page([gather(run), gather(run_dir(spec, here / "runs"))])):
        assert "<img" not in html and "<script>document" not in html and "<!--<" not in html
        assert (
            len(re.findall(r"<script\b", re.sub(r"<script>.*?</script>", "<script></script>", html, flags=re.DOTALL)))
            == 3
        )
    assert "<img" not in markdown([gather(run)]) and "<script" not in markdown([gather(run)])


def test_control_sequences_and_lone_surrogates_of_a_log_are_dropped(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state="failed", error="red \x1b[31mtext\x00")
    file = run.path / "status.json"
    file.write_text(file.read_text("utf-8").replace("text", "text \\ud800"), "utf-8")
    page([gather(run)]).encode("utf-8")
    assert "\x1b" not in page([gather(run)]) and "red text" in page([gather(run)])


@pytest.mark.parametrize("state", ["failed", "interrupted", "killed", "training", "created"])
def test_a_run_in_any_state_is_told_with_its_end(state: str, spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state=state, steps=7, error="out of memory" if state == "failed" else None)
    shown = text_of(page([gather(run)]))
    assert state in shown and "End of the log" in shown and "7 of" not in shown
    assert ("out of memory" in shown) == (state == "failed")
    assert ("going on" in shown) == (state in ("training", "created"))


def test_files_that_are_missing_or_half_written_are_named_and_left_out(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state="killed")
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5}\n{"step": 2, "lo', "utf-8")
    (run.path / "answers_after.jsonl").unlink()
    (run.path / "environment.json").write_text("[", "utf-8")
    facts = gather(run)
    assert facts.training["loss"] == ([1], [4.5]) and "(not answered)" in page([facts])
    for file in list(run.path.glob("*.json*")):
        if file.name != "status.json":
            file.unlink()
    shown = text_of(page([gather(run)]))
    assert "Missing" in shown and "spec.json, metrics.jsonl" in shown and "nothing to draw yet" in shown
    as_json([gather(run)]), markdown([gather(run)])


def test_a_run_before_its_first_step_misses_nothing(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state="loading")
    (run.path / "metrics.jsonl").unlink()
    assert not any("Missing" in note for note in gather(run).notes)


def test_sixty_long_runs_are_one_page_of_bounded_size(spec: RunSpec, here: Path) -> None:
    facts = gather(run_dir(spec, here / "runs", steps=3000))
    assert len(page([facts] * 80).encode()) < 1_000_000


def test_a_loss_that_is_not_finite_is_a_gap_and_is_named(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state="failed")
    lines = [{"step": n, "loss": float("nan") if n in (3, 4) else 1.0} for n in range(1, 6)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    facts = gather(run)
    assert facts.training["loss"] == ([1, 2, 3, 4, 5], [1.0, 1.0, None, None, 1.0])
    assert "loss is not finite at 2 steps: 3, 4." in facts.notes
    assert json.loads(json.dumps(as_json([facts]), allow_nan=False))["runs"][0]["curves"]["loss"][1][2] is None


def test_steps_that_a_resumed_run_did_again_count_once(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", steps=4)
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss": 0.25}\n{"step": 4, "loss": 0.125}\n')
    run.write("resumes.json", {"resumes": [{"after_step": 2, "overrides": []}]})
    facts = gather(run)
    assert facts.training["loss"][0] == [1, 2, 3, 4] and facts.training["loss"][1][2:] == [0.25, 0.125]
    assert any("after step 2" in note for note in facts.notes)


def test_curves_of_10_000_steps_keep_every_spike_and_the_page_small(spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", steps=10_000)
    assert len(page([gather(run)]).encode()) < 400_000
    values: list[float | None] = [1.0] * 10_000
    values[4321], values[7000] = 99.0, -5.0
    steps, kept = curves.thinned((list(range(10_000)), values))
    assert len(steps) <= curves.MOST_OF_A_CURVE and {(4321, 99.0), (7000, -5.0)} <= set(zip(steps, kept, strict=True))
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 9999


def test_every_value_has_the_place_that_set_it(here: Path) -> None:
    request = Request(overrides=(*WORDS, "train.learning_rate=5e-4"))
    composed, spec = compose(request), spec_of(*request.overrides)
    run = run_dir(spec, here / "runs")
    record_origins(run, request, composed, spec)
    rows = {row.key: row for row in gather(run).spec_rows}
    assert rows["train.learning_rate"].place == "command line" and rows["train.learning_rate"].value == 5e-4
    assert re.fullmatch(r"conf/model/smollm2_135m\.yaml:\d+", rows["model.id"].place)
    assert rows["run.report"].place == "default" and rows["train.micro_batch_size"].place.startswith("derived")
    assert gather(run).typed == list(request.overrides)
    record_resume(run, ("train.max_steps=9",))
    places = {row.key: row.place for row in gather(run).spec_rows}
    assert places["train.max_steps"] == "command line of a resume" and places["train.learning_rate"] == "command line"


def two_points(here: Path) -> list[RunFacts]:
    found = []
    for rate, loss in (("1e-4", 0.9), ("1e-3", 0.3), ("3e-3", 0.6)):
        spec = spec_of(*WORDS, f"train.learning_rate={rate}")
        found.append(gather(run_dir(spec, here / "runs", loss=loss, sweep="sweep-1")))
    return found


def test_runs_are_sorted_by_their_metric_and_only_keys_that_differ_are_shown(here: Path) -> None:
    found = two_points(here)
    assert [f.metric_value for f in comparison.by_result(found)] == pytest.approx([0.4, 0.7, 1.0])
    assert comparison.differing(found) == [("train.learning_rate", [1e-4, 1e-3, 3e-3])]
    facts = as_json(found)
    assert facts["best"] == found[1].id and facts["sweep"] == "sweep-1"
    assert list(facts["differs"]) == ["train.learning_rate"]
    shown = text_of(page(found))
    assert "Parallel coordinates" in shown and "learning_rate 0.001" in shown and "method.rank" not in shown
    table = markdown(found)
    assert table.index("0.001") < table.index("0.003") < table.index("0.0001") and "method.rank" not in table


def test_a_run_without_a_result_is_last(here: Path) -> None:
    found = two_points(here)
    failed = gather(run_dir(spec_of(*WORDS), here / "runs", state="failed"))
    assert comparison.by_result([failed, *found])[-1] is failed


def test_the_verb_writes_the_page_beside_the_run_and_several_here(spec: RunSpec, here: Path) -> None:
    one, other = (run_dir(spec, here / "runs") for _ in range(2))
    assert runner("report", f"runs/{one.id}").exit_code == 0
    assert (one.path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert runner("report", one.id, f"runs/{other.id}/spec.json").exit_code == 0
    assert "2 runs" in (here / "report.html").read_text("utf-8")
    assert json.loads(runner("report", one.id, "--json").stdout)["runs"][0]["run_id"] == one.id
    assert runner("report", one.id, "--format", "md").stdout.startswith(f"### {one.id}")
    assert runner("report", one.id, "-o", "x.md").exit_code == 0 and (here / "x.md").is_file()


def test_a_sweeps_folder_stands_for_its_runs(spec: RunSpec, here: Path) -> None:
    found = two_points(here)
    folder = here / "runs" / "sweeps" / "sweep-1"
    folder.mkdir(parents=True)
    for number, facts in enumerate(found):
        (folder / f"point-{number:04d}.json").write_text(json.dumps({"run_id": facts.id}), "utf-8")
    (folder / "point-0009.json").write_text('{"run_id": null}', "utf-8")
    assert runner("report", "runs/sweeps/sweep-1", "-o", "sweep.html").exit_code == 0
    assert "3 runs" in (here / "sweep.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no run is named"),
        (("runs/nothing",), "there is no run runs/nothing"),
        (("ID", "-o", "runs/ID/spec.json"), "ends in .html"),
        (("ID", "-o", "x.html", "--format", "md"), "ends in .md"),
        (("ID", "--json", "--format", "md"), "exclude each other"),
        (("ID", "-o", "missing/x.html"), "cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_to_type(
    words: tuple[str, ...], told: str, spec: RunSpec, here: Path
) -> None:
    run = run_dir(spec, here / "runs")
    result = runner("report", *(word.replace("ID", run.id) for word in words))
    assert result.exit_code == 2 and told in result.output
    assert json.loads((run.path / "spec.json").read_text("utf-8"))


def test_the_page_of_a_rented_run_is_made_here_with_its_cost(spec: RunSpec, here: Path) -> None:
    """Not in the pod, which is a stranger's machine: what it may have written there is not downloaded."""
    run = run_dir(spec, here / "runs")
    pod = SimpleNamespace(gpu_id="NVIDIA L4", cloud="secure", id="p1")
    meter = SimpleNamespace(started=clock.now() - 3600)
    lease = SimpleNamespace(usd=lambda: 1.25, meter=meter, usd_per_hour=0.4, pod=pod, say=print)
    executor.account(run, cast(Any, lease))
    assert "$1.25" in text_of((run.path / "report.html").read_text("utf-8"))
    assert {"report.html", "origins.json"} <= set(OURS)


def test_the_points_of_a_sweep_keep_where_their_values_came_from(here: Path) -> None:
    points = read_sweep(Request(overrides=(*WORDS, "train.learning_rate=1e-4,3e-4"))).points
    for point, rate in zip(points, (1e-4, 3e-4), strict=True):
        composed = compose(point)
        run = run_dir(composed, here / "runs")
        record_origins(run, point, composed, composed)
        rows = {row.key: row for row in gather(run).spec_rows}
        assert rows["train.learning_rate"].value == rate and rows["train.learning_rate"].place == "command line"
        assert any(word.startswith("train.learning_rate=") for word in gather(run).typed)


@pytest.mark.parametrize("state", ["done", "failed", "interrupted"])
def test_a_run_that_has_ended_gets_its_page(state: str, spec: RunSpec, here: Path) -> None:
    run = run_dir(spec, here / "runs", state=state)
    assert write_report(run) == run.path / "report.html"


def test_run_report_false_and_a_run_that_goes_on_get_none(spec: RunSpec, here: Path) -> None:
    assert write_report(run_dir(spec, here / "runs", state="training")) is None
    without = spec_of(*WORDS, "run.report=false")
    run = run_dir(without, here / "runs")
    assert write_report(run) is None and not (run.path / "report.html").exists()


def test_a_page_that_cannot_be_made_does_not_fail_the_run(
    spec: RunSpec, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_dir(spec, here / "runs")
    (run.path / "report.html").mkdir()  # as a full disk, it cannot be replaced
    assert write_report(run) is None
    assert "no report.html" in (run.path / "logs" / "run.log").read_text("utf-8")


def browser(file: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The page after its scripts, and what the console said."""
    assert CHROMIUM is not None
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}",
        "--virtual-time-budget=4000",
    ]
    command = [CHROMIUM, *words, "--enable-logging=stderr", *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1280,2400", "390,2400"])
def test_a_browser_draws_the_curves_without_an_error(size: str, spec: RunSpec, here: Path, tmp_path: Path) -> None:
    run = run_dir(spec, here / "runs", hostile=ATTACK)
    file = tmp_path / "report.html"
    file.write_text(page([gather(run)]), "utf-8")
    dom, said = browser(file, tmp_path / "profile", f"--window-size={size}")
    assert said == ""
    assert 'data-charts="5"' in dom and "data-failed" not in dom and "<canvas" in dom
    assert f"<title>{run.id}</title>" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_a_comparison(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(two_points(here)), "utf-8")
    dom, said = browser(file, tmp_path / "profile")
    assert said == "" and 'data-charts="5"' in dom and "data-failed" not in dom


def test_the_run_of_a_directory_name_is_not_followed_out_of_it(spec: RunSpec, here: Path) -> None:
    """A page holds what is in the run's directory, and reads no path that its files name."""
    run = run_dir(spec, here / "runs", state="failed")
    run.write("summary.json", {"model_dir": "/etc/passwd"})
    assert "root:" not in text_of(page([gather(RunDir(run.path))]))
