"""What travels to a pod, under which name, and what is installed there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import checkpoints
from runner.cloud import agent, install, parcels, ship, wheel
from runner.cloud.install import Found, decide
from runner.cloud.ship import Berth
from runner.errors import RequestError
from runner.rundir import RunDir
from runner.spec import LocalPlace, RunSpec
from tests.emulated import needs_sshd
from tests.rented import rented_spec, run_of
from tests.sshd import Server, server

NEEDS = ["torch>=2.13", "transformers>=5.20", "pydantic<3,>=2.14"]
ALL = {"torch": "2.13.0+cu128", "transformers": "5.23.0", "pydantic": "2.14.1"}


def a_file(folder: Path, name: str = "my.jsonl", rows: int = 4) -> Path:
    file = folder / name
    file.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(rows)), "utf-8")
    return file


def test_parcels_are_named_by_their_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    spec = rented_spec(f"data.path={a_file(tmp_path / 'a')}", "data=file", "data.format=text")
    same = rented_spec(f"data.path={a_file(tmp_path / 'b')}", "data=file", "data.format=text")
    (first,), (second,) = parcels.parcels(spec), parcels.parcels(same)
    a_file(tmp_path / "b", rows=5)
    (third,) = parcels.parcels(same)
    assert first.target == second.target != third.target
    there = parcels.rewritten(spec, "/workspace", [first])
    assert there.data.path == f"/workspace/{first.target}" and there.where == LocalPlace()
    assert there.run.output_dir == "/workspace/runs"
    assert there.train == spec.train and there.hw == spec.hw


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    spec = rented_spec(f"data.path={file}", "data=file", "data.format=text")
    file.unlink()
    with pytest.raises(RequestError, match=r"data\.path=.*my\.jsonl is not there"):
        parcels.parcels(spec)


def test_the_demo_and_the_hub_send_no_data() -> None:
    assert parcels.parcels(rented_spec()) == []


def test_the_wheel_is_the_project_and_the_same_each_time(tmp_path: Path) -> None:
    name, content = wheel.packed()
    assert wheel.packed() == (name, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert "runner/train/__main__.py" in names and "runner/assets/conf/config.yaml" in names
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'click')))\n"
        "import runner.execute.there, runner.paths as p\n"
        "assert p.CONF.is_dir() and p.DEEPSPEED_CONFIGS.is_dir(); print(runner.__file__)"
    )
    said = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-c", code],
        env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.startswith(str(tmp_path)), said.stderr


def test_what_is_installed_has_no_hydra_and_has_torch() -> None:
    names = [install.name_of(line) for line in wheel.requirements()]
    assert "hydra-core" not in names and {"torch", "trl", "pydantic", "rich"} <= set(names)
    assert "pytest" not in names


@pytest.mark.parametrize(
    ("image", "how", "says"),
    [
        (ALL, "image", "everything"),
        ({"torch": "2.13.1"}, "around", "2.13.1"),
        ({**ALL, "pydantic": "2.9"}, "around", "2.13.0+cu128"),
        ({"torch": "2.8.0+cu128"}, "pinned", "has 2.8.0+cu128, and torch>=2.13 is needed"),
        ({}, "pinned", "has none"),
    ],
)
def test_which_python_trains(image: dict[str, str], how: str, says: str) -> None:
    choice = decide(None, Found("/usr/bin/python3", "3.12", image), NEEDS)
    assert choice.how == how and says in choice.why


def test_a_python_that_was_named_is_taken_or_refused() -> None:
    image = Found("/usr/bin/python3", "3.12", {})
    assert decide(Found("/mine", "3.11", ALL), image, NEEDS).how == "given"
    with pytest.raises(ValueError, match=r"/mine lacks torch>=2\.13"):
        decide(Found("/mine", "3.11", {**ALL, "torch": "2.12.1"}), image, NEEDS)


def test_around_an_images_torch_nothing_of_it_is_pinned() -> None:
    pins = "torch==2.13.0\ntriton==3.5\nnvidia-nccl-cu12==2.1\nnvidia-ml-py==13.6\ntrl==1.16\n"
    kept = install.without_torch(pins, "2.14.0").split()
    assert "trl==1.16" in kept and "torch==2.14.0" in kept and "torch==2.13.0" not in kept and "triton==3.5" not in kept


def test_this_python_is_found_out_about(tmp_path: Path) -> None:
    order = {
        "python": None, "image_python": sys.executable, "requirements": ["rich>=13"], "alone": [], "constraints": "",
        "environments": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "install-order.json").write_text(json.dumps(order))
    assert install.main(tmp_path) == 0
    answer = json.loads((tmp_path / "install.json").read_text())
    assert answer["how"] == "image" and answer["python"] == sys.executable
    assert install.probe("/usr/bin/false", NEEDS) is None


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really: by pip, from its index, with a pin, for a Python that lacks the package."""
    monkeypatch.setattr(install, "_uv", lambda python: None)  # which would be installed into that Python
    bare = str(Path(sys.base_prefix) / "bin" / "python3")
    order = {
        "python": None, "image_python": bare, "requirements": ["sqlparse>=0.5"], "alone": [],
        "constraints": "sqlparse==0.5.3\n", "environments": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "install-order.json").write_text(json.dumps(order))
    assert install.main(tmp_path) == 0
    answer = json.loads((tmp_path / "install.json").read_text())
    assert answer["how"] == "pinned" and answer["python"].startswith(str(tmp_path / "cache" / "env-"))
    version = [answer["python"], "-c", "import sqlparse; print(sqlparse.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip() == "0.5.3"
    made = Path(answer["python"]).stat().st_mtime_ns
    monkeypatch.setattr(install, "_do", lambda command: pytest.fail(f"made anew: {command}"))
    assert install.main(tmp_path) == 0
    assert Path(answer["python"]).stat().st_mtime_ns == made


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path / "sshd") as found:
        yield found


@pytest.fixture
def berth(there: Server, tmp_path: Path) -> Iterator[Berth]:
    link = there.connection()
    found = Berth(link, str(tmp_path / "workspace"), "run-1")
    for name in agent.FOLDERS:
        (tmp_path / "workspace" / name).mkdir(parents=True)
    (tmp_path / "workspace" / "runs" / "run-1" / "logs").mkdir(parents=True)
    yield found
    link.close()


@needs_sshd
def test_a_parcel_that_is_there_is_not_sent_twice(berth: Berth, tmp_path: Path) -> None:
    spec = rented_spec(f"data.path={a_file(tmp_path)}", "data=file", "data.format=text")
    run, said = run_of(spec, tmp_path / "here"), []
    code = ship.send(berth, run, spec, said.append)
    assert (Path(code) / "runner" / "train" / "worker.py").is_file()
    there = RunSpec.model_validate(json.loads((Path(berth.folder) / "spec.json").read_text()))
    assert there.data.path is not None and Path(there.data.path).read_text() == a_file(tmp_path).read_text()
    assert "is there already" not in said[0]
    assert ship.send(berth, run, spec, said.append) == code
    assert "is there already" in said[1]


@needs_sshd
def test_the_later_checkpoint_counts(berth: Berth, tmp_path: Path) -> None:
    spec = rented_spec()
    run = run_of(spec, tmp_path / "here")
    for folder, step in ((run.path, 4), (Path(berth.folder), 8)):
        place = folder / "checkpoints" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "weights").write_text(f"{step}")
        checkpoints.seal(place, {})
    (run.path / "metrics.jsonl").write_text("mine\n")
    (Path(berth.folder) / "metrics.jsonl").write_text("theirs\n")
    ship.send(berth, run, spec, lambda line: None)
    assert (Path(berth.folder) / "metrics.jsonl").read_text() == "theirs\n"
    place = checkpoints.folder(run, 12)
    place.mkdir()
    (place / "weights").write_text("12")
    checkpoints.seal(place, {})
    ship.send(berth, run, spec, lambda line: None)
    assert (Path(berth.folder) / "metrics.jsonl").read_text() == "mine\n"
    assert checkpoints.complete(RunDir(Path(berth.folder))) == [8, 12]


@needs_sshd
def test_only_the_secrets_that_are_needed_go_and_into_memory(berth: Berth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("WANDB_API_KEY", "w_x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a_x")
    file = agent.SHM / "runner-run-1.env"
    try:
        assert ship.tell_secrets(berth, rented_spec()) == ["HF_TOKEN"]
        assert json.loads(file.read_text()) == {"HF_TOKEN": "hf_x"} and file.stat().st_mode & 0o777 == 0o600
        assert ship.tell_secrets(berth, rented_spec("track=wandb")) == ["HF_TOKEN", "WANDB_API_KEY"]
    finally:
        file.unlink(missing_ok=True)
