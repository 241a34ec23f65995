"""What another launcher has left in the environment places nobody: a run starts its own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.launcher import inherited_ranks, torchrun
from tests.conftest import ROOT, run_cli, spec_of
from tests.support.processes import losses, only_run, words

LEFT = {
    "LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "NODE_RANK": "1",
    "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "PET_NNODES": "4", "PET_STANDALONE": "1", "PET_MODULE": "1",
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7", "ACCELERATE_TORCH_DEVICE": "meta", "FSDP_OFFLOAD_PARAMS": "true",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "PMI_SIZE": "4", "PMI_RANK": "3", "MV2_COMM_WORLD_RANK": "3", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3", "CROSS_RANK": "1", "LOCAL_SIZE": "2",
}  # fmt: skip
SET = {"OMPI_MCA_btl": "tcp", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "INFO", "RANKING": "x"}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("hw.num_processes=2", "deepspeed=none")], ids=["one", "two"])
def test_a_run_is_the_same_whatever_another_launcher_left(
    more: tuple[str, ...], model: Path, tmp_path: Path, clean: list[float]
) -> None:
    done = run_cli(*words(model, tmp_path, *more), code=0, OMP_NUM_THREADS="1", timeout=300, **LEFT)
    run = only_run(tmp_path)
    assert run is not None and losses(run) == pytest.approx(clean, rel=1e-4, abs=0)
    assert "Note    not used, of another launcher: ACCELERATE_GRADIENT_ACCUMULATION_STEPS, " in done.stdout
    assert "hw.num_gpus, hw.num_processes and hw.num_nodes say who trains" in done.stdout


@pytest.fixture(scope="module")
def clean(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses where nobody left anything."""
    out = tmp_path_factory.mktemp("clean")
    done = run_cli(*words(model, out), OMP_NUM_THREADS="1")
    run = only_run(out)
    assert done.returncode == 0 and run is not None and "another launcher" not in done.stdout
    return losses(run)


def test_settings_are_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**LEFT, **SET}.items():
        monkeypatch.setenv(name, value)
    found = torchrun.process_environment(spec_of("hw=cpu", "hw.env={MASTER_PORT: '1234'}"))
    assert {name for name in LEFT if name in found} == {"SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "MASTER_PORT"}
    assert found["MASTER_PORT"] == "1234"  # the hardware profile's own
    assert {name: found.get(name) for name in SET} == {
        **SET,
        "CUDA_VISIBLE_DEVICES": "",
    }  # hw=cpu: no GPU is looked for


def test_the_launcher_s_own_variables_are_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name not in inherited_ranks.without_ranks(os.environ):
            monkeypatch.delenv(name)
    assert inherited_ranks.inherited_rank_notes() == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert inherited_ranks.inherited_rank_notes() == [
        "not used, of another launcher: LOCAL_RANK; hw.num_gpus, hw.num_processes and hw.num_nodes say who trains"
    ]


LAUNCHER = """
import os, subprocess, sys
for rank in range(2):
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    code = subprocess.call([sys.executable, "-m", "runner", "train.max_steps=1"], env=env)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [("torchrun", "torchrun"), ("accelerate", "accelerate launch"), ("deepspeed", "deepspeed"), ("mpirun", "mpirun")],
)
def test_several_copies_are_refused(name: str, told: str, tmp_path: Path) -> None:
    """`torchrun --nproc-per-node 2 -m runner …` would train the same twice."""
    (tmp_path / name).write_text(LAUNCHER, "utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / name)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert f"{told} starts 2 copies of the runner, and each would be a run of its own  ({told})" in done.stderr
    assert f"without {told}: it starts a process per GPU (hw.num_gpus=2)" in done.stderr


def test_torchrun_itself_is_recognised(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "runner", "train.max_steps=1"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert "torchrun starts 2 copies of the runner" in done.stderr
