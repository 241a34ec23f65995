"""What travels to a pod, under which name, and what is installed there."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.cloud import payload, transfer
from runner.cloud.agent import agent, install
from runner.cloud.agent.install import FoundPython, choose_python
from runner.cloud.transfer import PodRunFolder
from runner.config import credentials
from runner.data import prepared_index
from runner.data.readers.sources import files_of
from runner.errors import RequestError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import Grpo, LocalPlace, RunSpec
from tests.conftest import ROOT
from tests.support.emulated import needs_sshd
from tests.support.front import spec_of
from tests.support.rented import rented_spec, run_of
from tests.support.sshd import Server, server

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
    (first,), (second,) = payload.payload_items(spec), payload.payload_items(same)
    a_file(tmp_path / "b", rows=5)
    (third,) = payload.payload_items(same)
    assert first.target == second.target != third.target
    there = payload.spec_for_pod(spec, "/workspace", [first])
    assert there.data.path == f"/workspace/{first.target}" and there.where == LocalPlace()
    assert there.run.output_dir == "/workspace/runs"
    assert there.train == spec.train and there.hw == spec.hw


def test_a_relative_file_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"data\.path=my\.jsonl is not there"):
        payload.payload_items(rented_spec("data.path=my.jsonl", "data=file", "data.format=text"))


@pytest.mark.parametrize(
    "words",
    [
        ("data.path=s3://bucket/rows/*.jsonl",),
        ("data.path=/workspace/datasets/*.jsonl",),  # of the pod's own volume
        ("data.path=/workspace/rows.jsonl", "data.chat_template=chatml"),
    ],
)
def test_what_is_elsewhere_stays_as_it_is(words: tuple[str, ...]) -> None:
    spec = rented_spec("data=file", *words)
    assert payload.payload_items(spec) == payload.prepared_tokens(spec) == []
    assert payload.spec_for_pod(spec, "/workspace", []).data == spec.data


def test_every_kind_of_file_travels_and_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources, a reward function of one's own, a template: each key then names what has its content."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(**columns): return []")
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    for name in ("a.jsonl", "b.jsonl"):
        a_file(tmp_path, name, rows=3 if name == "a.jsonl" else 4)
    spec = rented_spec(
        "objective=grpo", "objective.rewards=[length,./mine.py:score]", "data=file",
        "data.sources=[{path: a.jsonl, weight: 2}, {path: '*.jsonl'}]", "data.chat_template=my.jinja",
        "train.batch_size=8", "train.micro_batch_size=8",
    )  # fmt: skip
    found = payload.payload_items(spec)
    assert [(item.key, item.source.name) for item in found] == [
        ("data.sources.0.path", "a.jsonl"), ("data.sources.1.path", tmp_path.name),
        ("data.chat_template", "my.jinja"), ("objective.rewards.1", "mine.py"),
    ]  # fmt: skip
    there = payload.spec_for_pod(spec, "/workspace", found)
    one, two = there.data.sources
    assert one.path == f"/workspace/{found[0].target}" and one.weight == 2
    assert two.path == f"/workspace/{found[1].target}/*.jsonl" and found[1].files == ("a.jsonl", "b.jsonl")
    assert isinstance(there.objective, Grpo)
    assert there.objective.rewards == ["length", f"/workspace/{found[3].target}:score"]
    assert there.data.chat_template == f"/workspace/{found[2].target}"


def test_the_demo_and_the_hub_send_no_data() -> None:
    assert payload.payload_items(rented_spec()) == []


def test_the_wheel_is_the_project_and_the_same_each_time(tmp_path: Path) -> None:
    name, content = payload.packed_wheel()
    assert payload.packed_wheel() == (name, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert "runner/train/__main__.py" in names and "runner/assets/conf/config.yaml" in names
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'click')))\n"
        "import runner.launcher.on_pod, runner.hub.upload, runner.paths as p\n"
        "from runner.resolve.plan_inputs import hardware\n"  # what a run that is out of memory is advised to take
        "assert p.CONF.is_dir() and p.DEEPSPEED_CONFIGS.is_dir() and hardware(); print(runner.__file__)"
    )
    said = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.startswith(str(tmp_path)), said.stderr


def test_what_is_installed_has_no_hydra_and_has_torch() -> None:
    names = [install.requirement_name(line) for line in payload.training_requirements()]
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
    choice = choose_python(None, FoundPython("/usr/bin/python3", "3.12", image), NEEDS)
    assert choice.how == how and says in choice.why


def test_an_image_whose_python_is_too_old_trains_with_one_that_uv_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"]
    assert f">={install.OLDEST[0]}.{install.OLDEST[1]}," in wanted
    old = FoundPython("/usr/bin/python3", "3.10", ALL)
    choice = choose_python(None, old, NEEDS)
    assert (choice.how, choice.why) == ("pinned", "with Python 3.12 and the pinned torch: the image's is 3.10")
    done: list[list[str]] = []
    monkeypatch.setattr(install, "_do", done.append)
    order = {"constraints": "", "requirements": NEEDS}
    folder = tmp_path / "env"
    monkeypatch.setattr(install, "_uv", lambda python: None)
    with pytest.raises(ValueError, match=r"the image's Python is 3\.10, 3\.11 is needed, and uv is not there"):
        install.make_environment(folder, choice, old, order)
    monkeypatch.setattr(install, "_uv", lambda python: folder.mkdir() or "/usr/bin/uv")
    install.make_environment(folder, choice, old, order)
    assert done[0] == ["/usr/bin/uv", "venv", "--python", "3.12", str(folder)]


def test_a_python_that_was_named_is_taken_or_refused() -> None:
    image = FoundPython("/usr/bin/python3", "3.12", {})
    assert choose_python(FoundPython("/mine", "3.11", ALL), image, NEEDS).how == "given"
    with pytest.raises(ValueError, match=r"/mine lacks torch>=2\.13"):
        choose_python(FoundPython("/mine", "3.11", {**ALL, "torch": "2.12.1"}), image, NEEDS)


def test_around_an_images_torch_nothing_of_it_is_pinned() -> None:
    pins = "torch==2.13.0\ntriton==3.5\nnvidia-nccl-cu12==2.1\nnvidia-ml-py==13.6\ntrl==1.16\n"
    kept = install.pins_without_torch(pins, "2.14.0").split()
    assert "trl==1.16" in kept and "torch==2.14.0" in kept and "torch==2.13.0" not in kept and "triton==3.5" not in kept


FLASH_WHEELS = [
    {"torch": "2.13", "python": "3.12", "build": "", "url": "https://host/cu130.whl"},
    {"torch": "2.13", "python": "3.12", "build": "cu126", "url": "https://host/cu126.whl"},
]


@pytest.mark.parametrize(
    ("how", "versions", "python", "build", "expected"),
    [
        ("pinned", {}, "3.12", "", ["flash-attn @ https://host/cu130.whl"]),
        ("pinned", {"torch": "2.8.0+cu128"}, "3.12", "cu126", ["flash-attn @ https://host/cu126.whl"]),
        ("around", {"torch": "2.13.1+cu126"}, "3.12", "", ["flash-attn @ https://host/cu126.whl"]),
        ("around", {"torch": "2.13.1+cu130"}, "3.12", "", ["flash-attn @ https://host/cu130.whl"]),
        ("around", {"torch": "2.13.1", "flash-attn": "2.8.3"}, "3.11", "", []),
        ("image", {"torch": "2.13.1", "flash-attn": "2.8.3"}, "3.11", "", []),
        ("pinned", {}, "3.11", "", None),
        ("pinned", {}, "3.12", "cu129", None),
        ("around", {"torch": "2.14.0+cu130"}, "3.12", "", None),
    ],
)
def test_the_wheel_of_flash_attn_is_that_of_python_torch_and_its_build(
    how: str, versions: dict[str, str], python: str, build: str, expected: list[str] | None
) -> None:
    order = {"requirements": [*NEEDS, "flash-attn"], "constraints": "torch==2.13.0\n", "flash_attn": FLASH_WHEELS}
    image, choice = FoundPython("/usr/bin/python3", python, versions), install.PythonChoice(how, "")
    if expected is None:
        with pytest.raises(ValueError, match=f"no wheel of flash-attn is known for Python {python} and torch"):
            install.flash_attn_requirements(order, choice, image, build)
        return
    assert install.flash_attn_requirements(order, choice, image, build) == expected
    assert install.flash_attn_requirements({**order, "requirements": NEEDS}, choice, image, build) == []


def test_flash_attn_that_does_not_load_is_said() -> None:
    assert "No module named 'flash_attn_2_cuda'" in str(install.flash_attn_problem(sys.executable))


def test_this_python_is_found_out_about(tmp_path: Path) -> None:
    order = {
        "python": None, "image_python": sys.executable, "requirements": ["rich>=13"], "alone": [], "constraints": "",
        "environments": str(tmp_path),
    }  # fmt: skip
    (tmp_path / "install-order.json").write_text(json.dumps(order))
    assert install.main(tmp_path) == 0
    answer = json.loads((tmp_path / "install.json").read_text())
    assert answer["how"] == "image" and answer["python"] == sys.executable
    assert install.probe_python("/usr/bin/false", NEEDS) is None


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
def remote(there: Server, tmp_path: Path) -> Iterator[PodRunFolder]:
    link = there.connection()
    found = PodRunFolder(link, str(tmp_path / "workspace"), "run-1")
    for name in agent.FOLDERS:
        (tmp_path / "workspace" / name).mkdir(parents=True)
    (tmp_path / "workspace" / "runs" / "run-1" / "logs").mkdir(parents=True)
    yield found
    link.close()


@needs_sshd
def test_an_item_that_is_there_is_not_sent_twice(remote: PodRunFolder, tmp_path: Path) -> None:
    spec = rented_spec(f"data.path={a_file(tmp_path)}", "data=file", "data.format=text")
    run, said = run_of(spec, tmp_path / "here"), []
    code = transfer.send_run(remote, run, spec, said.append)
    assert (Path(code) / "runner" / "train" / "worker.py").is_file()
    there = RunSpec.model_validate(json.loads((Path(remote.folder) / "spec.json").read_text()))
    assert there.data.path is not None and Path(there.data.path).read_text() == a_file(tmp_path).read_text()
    assert "is there already" not in said[0]
    assert transfer.send_run(remote, run, spec, said.append) == code
    assert "is there already" in said[1]


@needs_sshd
def test_a_glob_sends_what_fits_and_links_send_what_they_point_to(remote: PodRunFolder, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    a_file(corpus / "deep", "# a.jsonl", rows=1)
    (corpus / "notes.txt").write_text("stays here")
    (corpus / "deep" / "b.jsonl").symlink_to(a_file(tmp_path, "elsewhere", rows=2))
    (corpus / "deep" / "c.jsonl").symlink_to(tmp_path / "nowhere")
    spec = rented_spec(f"data.path={corpus}/**/*.jsonl", "data=file", "data.format=text")
    transfer.send_run(remote, run_of(spec, tmp_path / "here"), spec, lambda line: None)
    there = RunSpec.model_validate(json.loads((Path(remote.folder) / "spec.json").read_text()))
    assert there.data.path is not None
    sent = files_of(there.data.path)
    assert [Path(file).name for file in sent] == ["# a.jsonl", "b.jsonl"]
    assert [Path(file).read_text().count("\n") for file in sent] == [1, 2] and not Path(sent[1]).is_symlink()
    assert not list((tmp_path / "workspace").rglob("notes.txt"))


@needs_sshd
@pytest.mark.parametrize("linked", ["the folder", "a folder in it", "the file"])
def test_through_links_the_pod_sees_what_is_seen_here(linked: str, remote: PodRunFolder, tmp_path: Path) -> None:
    """Also with what an earlier attempt of the same run has left behind."""
    real = tmp_path / "real"
    real.mkdir()
    a_file(real, "a.jsonl", rows=2)
    (real / ".#a.jsonl").symlink_to("nobody@nowhere")  # an editor's lock
    named = tmp_path / "named.jsonl" if linked == "the file" else tmp_path / "named"
    if linked == "a folder in it":
        named.mkdir()
        a_file(named, "b.jsonl", rows=3)
        (named / "more").symlink_to(real)  # which nobody reads here either
    else:
        named.symlink_to(real / "a.jsonl" if linked == "the file" else real)
    spec = rented_spec(f"data.path={named}", "data=file", "data.format=text")
    (item,) = payload.payload_items(spec)
    left = tmp_path / "workspace" / f"{item.target}.{remote.run_id}.part"
    left.mkdir(parents=True)
    (left / ".a.jsonl.x7Gh").write_text("half a row")
    transfer.send_run(remote, run_of(spec, tmp_path / "here"), spec, lambda line: None)
    assert not left.exists()
    there = RunSpec.model_validate(json.loads((Path(remote.folder) / "spec.json").read_text()))
    assert there.data.path is not None and Path(there.data.path).name == named.name
    sent, mine = ([Path(name).read_text() for name in files_of(str(path))] for path in (there.data.path, named))
    assert sent == mine and len(sent) == 1


@needs_sshd
def test_what_another_run_has_sent_meanwhile_stays(remote: PodRunFolder, tmp_path: Path) -> None:
    """Two launchers send the same to one volume: the first one's stays, for it may be read already."""
    spec = rented_spec(f"data.path={a_file(tmp_path)}", "data=file", "data.format=text")
    (item,) = payload.payload_items(spec)
    target = tmp_path / "workspace" / item.target
    put = remote.connection.put

    def late(*args: Any, **options: Any) -> None:
        put(*args, **options)
        if target.parent.is_dir() and not target.exists():
            target.write_text("whole, and being read")

    object.__setattr__(remote.connection, "put", late)
    transfer.send_run(remote, run_of(spec, tmp_path / "here"), spec, lambda line: None)
    assert target.read_text() == "whole, and being read"
    assert [file.name for file in target.parent.iterdir()] == [target.name]


@needs_sshd
def test_tokens_that_were_prepared_travel(
    remote: PodRunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other settings, or of a file that has changed since, they stay."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    file = a_file(tmp_path)
    words = (f"data.path={file}", "data=file", "data.format=text")
    entry = tmp_path / "cache" / "tokenised" / "abc"
    entry.mkdir(parents=True)
    (entry / "rows.arrow").write_bytes(b"rows")
    prepared_index.record_prepared(spec_of("model=mistral7b", "method=lora", "train.max_steps=10", *words), [entry])
    assert prepared_index.prepared_folders(rented_spec(*words)) == [
        "tokenised/abc"
    ]  # where and how it trains does not matter
    assert prepared_index.prepared_folders(rented_spec(*words, "train.max_length=64")) == []
    assert prepared_index.prepared_folders(rented_spec(*words, "data.chat_template=chatml")) == []
    run, said = run_of(rented_spec(*words), tmp_path / "here"), []
    for _ in range(2):
        transfer.send_run(remote, run, rented_spec(*words), said.append)
    assert (tmp_path / "workspace" / "cache" / "runner" / "tokenised" / "abc" / "rows.arrow").read_bytes() == b"rows"
    assert [line for line in said if "tokens" in line][1].endswith("abc is there already (0.0 MB)")
    a_file(tmp_path, rows=5)
    assert prepared_index.prepared_folders(rented_spec(*words)) == []


@needs_sshd
def test_the_later_checkpoint_counts(remote: PodRunFolder, tmp_path: Path) -> None:
    spec = rented_spec()
    run = run_of(spec, tmp_path / "here")
    for folder, step in ((run.path, 4), (Path(remote.folder), 8)):
        place = folder / "checkpoints" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "weights").write_text(f"{step}")
        checkpoints.seal(place, {})
    (run.path / "metrics.jsonl").write_text("mine\n")
    (Path(remote.folder) / "metrics.jsonl").write_text("theirs\n")
    transfer.send_run(remote, run, spec, lambda line: None)
    assert (Path(remote.folder) / "metrics.jsonl").read_text() == "theirs\n"
    place = checkpoints.folder(run, 12)
    place.mkdir()
    (place / "weights").write_text("12")
    checkpoints.seal(place, {})
    transfer.send_run(remote, run, spec, lambda line: None)
    assert (Path(remote.folder) / "metrics.jsonl").read_text() == "mine\n"
    assert checkpoints.complete(RunDir(Path(remote.folder))) == [8, 12]


@needs_sshd
def test_only_the_secrets_that_are_needed_go_and_into_memory(
    remote: PodRunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("WANDB_API_KEY", "w_x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a_x")
    file = agent.SHM / "runner-run-1.env"
    try:
        assert transfer.send_secrets(remote, rented_spec()) == ["HF_TOKEN"]
        assert json.loads(file.read_text()) == {"HF_TOKEN": "hf_x"} and file.stat().st_mode & 0o777 == 0o600
        assert transfer.send_secrets(remote, rented_spec("track=wandb")) == ["HF_TOKEN", "WANDB_API_KEY"]
        data = rented_spec("data=file", "data.sources=[{path: 's3://rows/a.jsonl'}]")
        assert transfer.send_secrets(remote, data) == ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"]
    finally:
        file.unlink(missing_ok=True)


@needs_sshd
def test_keys_that_their_own_tools_keep_here_go_too(
    remote: PodRunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*credentials.HUB, "WANDB_API_KEY", *credentials.S3):
        monkeypatch.delenv(name, raising=False)
    for name, text in {
        "token": "hf_file\n", ".netrc": "machine api.wandb.ai login user password w_file\n",
        "aws": "[default]\naws_access_key_id = a_file\naws_secret_access_key = s_file\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws"))
    file = agent.SHM / "runner-run-1.env"
    spec = rented_spec("track=wandb", "data=file", "data.path=s3://rows/a.jsonl")
    try:
        transfer.send_secrets(remote, spec)
        assert json.loads(file.read_text()) == {
            "HF_TOKEN": "hf_file", "WANDB_API_KEY": "w_file", "AWS_ACCESS_KEY_ID": "a_file",
            "AWS_SECRET_ACCESS_KEY": "s_file",
        }  # fmt: skip
        monkeypatch.setenv("HUGGINGFACEHUB_API_TOKEN", "hf_chain")
        transfer.send_secrets(remote, spec)
        assert json.loads(file.read_text())["HF_TOKEN"] == "hf_chain"
    finally:
        file.unlink(missing_ok=True)
