"""What renting says, and when: a price once, an image that cannot be pulled, a balance too small, a known cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from runner.cloud import executor, readiness
from runner.cloud.provider_errors import NoBalanceError, NoImageError, PullLimitError
from runner.cloud.rent_pod import acquire
from runner.report.failure_causes import cause_of
from runner.rundir.directory import RunDir
from runner.rundir.launch_options import LaunchOptions
from tests.support.emulated import Emulator
from tests.support.front import runner
from tests.support.rented import KEY, PLAN, creates, rented_spec, run_of

pytestmark = pytest.mark.usefixtures("state")


def rent(tmp_path: Path, said: list[str], *words: str) -> None:
    spec = rented_spec("where.setup_minutes=1", *words)
    acquire(run_of(spec, tmp_path / "runs"), spec, PLAN, KEY, said.append)


def test_a_price_above_the_catalogues_is_said_once(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hellos = iter([False] * 12 + [True] * 99)
    monkeypatch.setattr("runner.cloud.readiness.says_hello", lambda host, port: next(hellos))
    emulator.inject("price", factor=1.5)
    said: list[str] = []
    rent(tmp_path, said)
    assert sum("as the catalogue says" in line for line in said) == 1
    assert next(hellos) and "costs $1.11 an hour, not $0.74" in "\n".join(said)


LINES = (
    "error pulling image: Error response from daemon: manifest for ghcr.io/a/b:c not found: manifest unknown",
    "pull access denied for acme/private, repository does not exist or may require 'docker login'",
    "failed to resolve reference ghcr.io/acme/x:1: unexpected status: 401 Unauthorized",
    "no matching manifest for linux/amd64 in the manifest list entries",
    "invalid reference format: repository name must be lowercase",
)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_an_image_that_cannot_be_pulled_is_said_and_not_tried_on_other_pods(
    emulator: Emulator, tmp_path: Path, line: str
) -> None:
    emulator.inject("no_pull", detail=line, times=0)
    with pytest.raises(NoImageError) as caught:
        rent(tmp_path, [], "where.image=acme/private:1")
    (problem,) = caught.value.problems
    assert problem.what.startswith("the image acme/private:1 cannot be pulled: ") and problem.source == "where.image"
    assert line[-40:] in problem.what
    assert caught.value.exit_code == 2 and creates(emulator) == 1 and emulator.pods() == {}


def test_a_registry_that_limits_pulls_is_said_and_not_tried_on_other_pods(emulator: Emulator, tmp_path: Path) -> None:
    line = "toomanyrequests: You have reached your pull rate limit. You may increase the limit by authenticating"
    emulator.inject("no_pull", detail=line, times=0)
    with pytest.raises(PullLimitError) as caught:
        rent(tmp_path, [], "where.image=acme/public:1")
    (problem,) = caught.value.problems
    assert problem.what.startswith("the registry refuses to serve acme/public:1 now: ") and line in problem.what
    assert "where.template=ID" in str(problem.remedy) and "another registry" in str(problem.remedy)
    assert caught.value.exit_code == 3 and creates(emulator) == 1 and emulator.pods() == {}


def test_a_pull_that_another_host_may_do_better_is_tried_there(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("no_pull", detail="net/http: TLS handshake timeout")
    rent(tmp_path, [], "where.setup_minutes=0.05")
    assert creates(emulator) == 2 and len(emulator.pods()) == 1


@pytest.mark.parametrize(("detail", "code"), [(None, 2), ("toomanyrequests: You have reached your pull rate limit", 3)])
def test_the_command_says_why_no_pod_can_be_had(
    emulator: Emulator, tmp_path: Path, here: Path, detail: str | None, code: int
) -> None:
    emulator.inject("no_pull", detail=detail, times=0)
    words = ("where=runpod", "hw=rtx4090", "model=mistral7b", "method=qlora4", "train.max_steps=10")
    result = runner(*words, "where.image=acme/x:1", f"run.output_dir={tmp_path / 'runs'}", "--yes")
    assert result.exit_code == code and "Traceback" not in result.output
    said = " ".join(result.output.split())
    assert "acme/x:1" in said and ("manifest unknown" if code == 2 else "toomanyrequests") in said
    assert creates(emulator) == 1 and emulator.pods() == {}


@pytest.mark.parametrize("line", [
    "create container runpod/pytorch:1", "Pulling from runpod/pytorch",
    "net/http: TLS handshake timeout", "error pulling image: connection reset by peer", "start container: begin",
])  # fmt: skip
def test_what_another_host_may_do_better_is_no_fault_of_the_image(line: str) -> None:
    assert readiness.NO_IMAGE.search(line) is None and readiness.PULL_LIMIT.search(line) is None


def test_a_balance_that_pays_for_nothing_is_refused_and_one_that_is_too_small_is_said(
    emulator: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, console = rented_spec(), Console(width=300)
    asked, launch_options = [(spec, {**PLAN, "hours": 10.0})], LaunchOptions(yes=True)
    assert executor.confirm(asked, launch_options, console) and "Warning" not in capsys.readouterr().out
    emulator.world.settings.balance_usd = 2.0
    assert executor.confirm(asked, launch_options, console)
    assert "Warning the account has $2.00, less than the $7.40 that this costs" in capsys.readouterr().out
    emulator.world.settings.balance_usd = 0.05
    with pytest.raises(NoBalanceError, match=r"the account has \$0\.05, and the pod costs \$0\.74 an hour") as caught:
        executor.confirm(asked, launch_options, console)
    assert caught.value.exit_code == 3 and creates(emulator) == 0


def test_an_account_that_does_not_say_its_balance_rents_as_before(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("GraphQL has ended")

    monkeypatch.setattr("runpod.api.graphql.run_graphql_query", refuses)
    assert executor.confirm([(rented_spec(), PLAN)], LaunchOptions(yes=True), Console())


@pytest.mark.parametrize(("log", "what", "remedy"), [
    ("OSError: [Errno 28] No space left on device", "the disk is full", "where.container_disk_gb=…"),
    ("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url", "429", "HF_TOKEN"),
    ("The NVIDIA driver on your system is too old (found version 12040)", "driver is too old", "where.cuda_versions"),
])  # fmt: skip
def test_a_known_cause_of_a_failed_install_comes_with_its_remedy(
    tmp_path: Path, log: str, what: str, remedy: str
) -> None:
    run = RunDir(tmp_path / "run")
    (run.path / "logs").mkdir(parents=True)
    (run.path / "logs" / "install.log").write_text(f"$ pip install\n{log}\n")
    problem = executor._problem_of(run, "installing failed: logs/install.log says why")
    assert what in problem.what and remedy in str(problem.remedy)
    assert executor._problem_of(run, "the container was restarted").remedy == f"see {run.path / 'logs'}"
    assert cause_of("learning rate 4.29e-5 at step 429") is None
