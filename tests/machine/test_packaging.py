"""What `pip install` of the wheel gives: the package with its configs, away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runner import __version__, paths
from runner.config import conf_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend that pip would use."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_wheel_is_named_for_the_version_in_the_code(wheel: Path) -> None:
    assert wheel.name == f"llm_finetuning_runner-{__version__}-py3-none-any.whl"


def test_wheel_carries_every_config_and_nothing_of_the_checkout(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = (paths.CONF, paths.RECIPES, paths.DEEPSPEED_CONFIGS)
    files = {f for folder in folders for f in folder.rglob("*") if f.suffix in (".yaml", ".json")}
    assert {f"runner/assets/{file.relative_to(ROOT)}" for file in files} <= names
    assert {name.split("/")[0] for name in names} == {"runner", f"llm_finetuning_runner-{__version__}.dist-info"}


def test_installed_wheel_finds_its_configs_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:  # a pure Python wheel is installed by unpacking it
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "from runner.config import conf_files; from runner import paths\n"
        "print(paths.CONF, *conf_files.options('model'), *conf_files.recipes(), sep='\\n')"
    )
    # -I: neither the checkout nor an environment variable may help.
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        str(tmp_path / "site" / "runner" / "assets" / "conf"),
        *conf_files.options("model"),
        *conf_files.recipes(),
    ]
    assert done.stdout.splitlines() == expected


def test_checkout_reads_its_own_configs() -> None:
    assert paths.ASSETS == ROOT
