"""`doctor` finds what would end a run, says what to do about it, and never shows a key."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.version import Version
from rich.console import Console

from runner.cli.options import request_of
from runner.doctor import checks, gpu_checks, software, system
from runner.doctor.checks import print_findings
from runner.doctor.finding import STATES, DoctorTarget, Finding, exit_code
from runner.doctor.gpu_checks import Card, Driver, GpuReport
from runner.doctor.software import Torch
from runner.machine import detect
from runner.machine.detect import Gpu, Machine
from runner.resolve.plan_inputs import plan_if_known
from runner.resolve.steps import resolved
from tests.conftest import ROOT, run_cli
from tests.machine.test_hardware import GIB, H100, T4, V100, fake_nvml, machine_with, put_nvidia_smi, root_with
from tests.support.front import LAPTOP, runner

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "RUNPOD_API_KEY")
H100B = replace(H100, uuid="GPU-cc34")
B200 = Gpu("B200", "GPU-bb00", 179.1, 10.0)


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A laptop without a GPU and without keys, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detect, "detect", lambda root=Path("/"): LAPTOP)
    for name in (*NAMES, "HF_TOKEN_PATH", "HF_HUB_CACHE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))


def run_of(*words: str) -> DoctorTarget:
    spec, notes = resolved(request_of(words, ()))
    return DoctorTarget(spec, plan_if_known(spec, notes))


def named(found: list[Finding], name: str) -> Finding:
    (finding,) = [f for f in found if f.name == name]
    return finding


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def space(monkeypatch: pytest.MonkeyPatch, *, size: float, free: float) -> None:
    """Every disk, and /dev/shm, is `size` GiB large and has `free` left."""
    usage = Usage(int(size * GIB), int((size - free) * GIB), int(free * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def unshare(script: str) -> subprocess.CompletedProcess[str]:
    """Run in a mount namespace of its own, where a test may mount what it likes; skipped where that is not allowed."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = ["unshare", "-m", "bash", "-ec", script.replace("PYTHON", sys.executable)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **NO_GPU}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


# ── the verb ───────────────────────────────────────────────────────────────────────────────────


def test_json_is_the_contract(tmp_path: Path) -> None:
    done = run_cli("doctor", "--json", cwd=tmp_path, **NO_GPU)
    answer = json.loads(done.stdout)
    assert set(answer) == {"exit_code", "run", "checks"}
    assert answer["run"] is None
    problems = [check for check in answer["checks"] if check["state"] == "problem"]
    assert done.returncode == answer["exit_code"] == (3 if problems else 0)
    for check in answer["checks"]:
        assert set(check) == {"name", "state", "found", "remedy", "facts"}
        assert check["state"] in STATES
        assert "\n" not in check["found"]
        assert check["remedy"] or check["state"] in ("ok", "note")
    looked_at = [check["name"] for check in answer["checks"]]
    assert {"driver", "disk", "cpu", "memory", "/dev/shm", "packages", "git", *NAMES} <= set(looked_at)
    assert "bandwidth" not in looked_at
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "seconds"), [([], 0.8), (["method=lora"], 1.5)])
def test_it_imports_no_torch_and_is_quick(words: list[str], seconds: float) -> None:
    code = (
        "import sys\n"
        "from runner.cli.main import cli\n"
        "try:\n"
        "    cli(['doctor', *sys.argv[1:]])\n"
        "finally:\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'deepspeed', 'runpod'} & sys.modules.keys()))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # 0.35 s and 0.7 s, however many work beside us
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **NO_GPU}, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < seconds


def test_several_gpus_are_told_of_the_measurement_that_was_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*gpus: Gpu) -> list[Finding]:
        monkeypatch.setattr(detect, "detect", lambda root=Path("/"): replace(LAPTOP, gpus=gpus))
        return [finding for finding in checks.examine_machine() if finding.name == "bandwidth"]

    (said,) = of(H100, H100B)
    assert (said.state, said.found) == ("note", "all-reduce over 2 GPUs: not measured")
    assert "doctor --bandwidth" in str(said.remedy)
    assert of(H100) == of() == []


def test_help_has_examples() -> None:
    said = runner("doctor", "--help").stdout
    assert "python -m runner doctor --bandwidth --json" in said
    assert "doctor" in runner("--help").stdout


@pytest.mark.usefixtures("laptop")
def test_wrong_words_are_told_as_for_any_run() -> None:
    result = runner("doctor", "hw=h100x33", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["problems"][0]["remedy"] == "write hw=h100 hw.num_gpus=33"


@pytest.mark.usefixtures("laptop")
def test_a_run_is_held_against_the_machine() -> None:
    result = runner("doctor", "hw=h100x3", "model=llama3_8b", "method=lora", "--json")
    answer = json.loads(result.stdout)
    checks = {check["name"]: check for check in answer["checks"]}
    assert result.exit_code == answer["exit_code"] == 3
    assert answer["run"] == {
        "model": "llama3_8b",
        "method": "lora",
        "hw": "h100x3",
        "deepspeed": "none",
        "where": "local",
    }
    assert checks["hardware"]["state"] == "problem"
    assert checks["hardware"]["found"].startswith("h100x3 needs 3 × H100 80GB HBM3")
    assert checks["HF_TOKEN"]["state"] == "problem"
    assert "huggingface.co/meta-llama/" in checks["HF_TOKEN"]["remedy"]
    assert checks["disk"]["facts"]["needed_gib"] > 15  # 8 B parameters in 16 bits
    assert "the run takes" in checks["memory"]["found"]
    assert checks["run"]["state"] == "ok"


@pytest.mark.usefixtures("laptop")
def test_a_run_that_does_not_fit_is_a_problem() -> None:
    found = checks.examine_machine(run_of("model=llama2_70b", "method=full", "hw=cpu"))
    refused = [f for f in found if f.name == "run"]
    assert refused
    assert all(f.state == "problem" and "needs" in f.found for f in refused)
    assert exit_code(found) == 3


@pytest.mark.usefixtures("laptop")
def test_for_a_rented_machine_this_one_needs_no_room() -> None:
    found = checks.examine_machine(run_of("model=llama3_70b", "hw=h100x3", "method=qlora4", "where=runpod"))
    assert "hardware" not in [f.name for f in found]
    assert named(found, "RUNPOD_API_KEY").state == "problem"
    assert "the run takes" not in named(found, "memory").found


def test_what_to_do_stands_below_and_the_count_last() -> None:
    out = io.StringIO()
    found = [
        Finding("disk", "problem", "no room", "make some"),
        Finding("git", "note", "none"),
        Finding("cpu", "ok", "2"),
    ]
    print_findings(Console(file=out, width=60), found)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "problem  disk  no room",
        "               → make some",
        "note     git   none",
        "ok       cpu   2",
        "Not ready (1 problem, 1 note)",
    ]


# ── keys ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("words", [(), ("--json",), ("model=llama3_8b", "track=wandb", "where=runpod", "hw=h100x3")])
def test_no_key_is_ever_printed(words: tuple[str, ...], tmp_path: Path) -> None:
    secrets = {name: f"{name[:2].lower()}_s3cr3t{i}XyZ" for i, name in enumerate(NAMES)}
    secrets["HF_TOKEN"] += " "
    port = {"RUNPOD_API_BASE_URL": "http://127.0.0.1:9"}  # nobody answers
    done = run_cli("doctor", *words, cwd=tmp_path, **secrets, **port, **NO_GPU)
    assert all(name in done.stdout for name in NAMES)
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("value", "state", "found"),
    [
        ("hf_abc", "ok", "set"),
        ("", "note", "not set"),
        ("  ", "note", "not set"),
        ("hf_abc\n", "warning", "a line break"),
        ('"hf_abc"', "warning", "a quote"),
    ],
)
def test_a_key_is_set_or_not_or_looks_wrong(
    value: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", value)
    key = named(list(system.key_findings(None)), "HF_TOKEN")
    assert key.state == state
    assert found in key.found
    assert "hf_abc" not in repr(key)


@pytest.mark.usefixtures("laptop")
def test_keys_that_their_own_tools_keep_count(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_abc")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password s3cr3t\n")
    (tmp_path / ".netrc").chmod(0o600)
    found = list(system.key_findings(None))
    assert [named(found, name).state for name in NAMES] == ["ok", "ok", "note"]
    assert "s3cr3t" not in repr(found)


@pytest.mark.usefixtures("laptop")
def test_a_run_without_its_key() -> None:
    def states(*words: str) -> list[str]:
        found = list(system.key_findings(run_of(*words)))
        return [named(found, name).state for name in NAMES]

    assert states("method=lora") == ["note", "note", "note"]
    assert states("track=wandb") == ["note", "warning", "note"]  # it is recorded offline
    assert states("model=llama3_8b", "method=qlora4", "hw=h100", "where=runpod") == ["problem", "note", "problem"]


# ── disk and memory ────────────────────────────────────────────────────────────────────────────


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    done = unshare(
        f"mount -t tmpfs -o size=1m none {tmp_path}; head -c 1000k /dev/zero > {tmp_path}/full || true\n"
        f"PYTHON -m runner doctor run.output_dir={tmp_path}/runs || echo exit code $?; ls -A {tmp_path}"
    )
    assert f"runs ({tmp_path}/runs) cannot be written to: No space left on device" in done.stdout
    assert "→ name another folder: run.output_dir=…" in done.stdout
    assert done.stdout.endswith("exit code 3\nfull\n")


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(("folder", "why"), [("/proc/nowhere/runs", "No such file"), ("/dev/null/runs", "Not a dir")])
def test_a_folder_that_cannot_be_written_to_is_a_problem(folder: str, why: str) -> None:
    found = [f for f in system.disk_findings(run_of(f"run.output_dir={folder}")) if f.state == "problem"]
    assert found[0].found.startswith(f"runs ({folder}) cannot be written to: {why}")


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(("free", "state"), [(0.1, "problem"), (5, "warning"), (50, "ok")])
def test_little_room_is_told_without_a_run(free: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    space(monkeypatch, size=100, free=free)
    assert named(list(system.disk_findings(None)), "disk").state == state


@pytest.mark.usefixtures("laptop")
def test_room_is_held_against_the_plan_once_per_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("model=llama3_8b", "method=full", "hw=h100x3")
    assert run.plan is not None
    needed = run.plan.disk_gib
    for free, state in ((needed - 1, "problem"), (needed + 1, "warning"), (needed * 2, "ok")):
        space(monkeypatch, size=1000, free=free)
        finding = named(list(system.disk_findings(run)), "disk")  # one disk for all three folders
        assert (finding.state, finding.facts["needed_gib"]) == (state, pytest.approx(needed, abs=0.1))


@pytest.mark.usefixtures("laptop")
def test_every_term_of_a_planned_disk_lies_in_one_folder() -> None:
    for words in (
        ("method=lora",),
        ("model=phi2", "hw=h100"),
        ("model=phi2", "hw=h100", "deepspeed=zero3_offload", "deepspeed.nvme_path=/tmp"),
    ):
        terms = [term for folder in system.run_folders(run_of(*words)) for term in folder.terms]
        assert sorted(terms) == ["checkpoints", "data", "final_model", "offloaded", "tokenised", "weights"]
    (shards,) = [
        folder for folder in system.run_folders(run_of("recipe=pretrain_2b", "hw=local")) if "shards" in folder.terms
    ]
    assert shards.path.resolve() == Path.cwd().resolve() and 40 < shards.needed_gib < 60


@pytest.mark.usefixtures("laptop")
def test_a_run_that_its_disk_has_no_room_for_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space(monkeypatch, size=100, free=0.125)
    done = runner("method=lora", "train.max_steps=1", f"run.output_dir={tmp_path}/runs")
    said = " ".join(done.stderr.split())
    assert done.exit_code == 3 and not (tmp_path / "runs").exists()
    assert re.search(r"128 MiB of 100\.0 GiB free for runs, cache, .*; the run takes \d\.\d", said)
    assert "make room, or name a folder on a larger disk: " in said
    run = run_of("method=lora")
    assert run.plan is not None
    space(monkeypatch, size=100, free=1.02 * run.plan.disk_gib)
    assert "the run takes" in system.check_disk(run.spec, run.plan)[0]
    space(monkeypatch, size=100, free=50)
    assert system.check_disk(run.spec, run.plan) == []


@pytest.mark.parametrize(
    ("free", "cards", "state"),
    [(1 / 16, 0, "warning"), (1 / 16, 1, "warning"), (1 / 16, 2, "problem"), (0.7, 8, "warning"), (8, 8, "ok")],
)
def test_dockers_64_mib_of_shared_memory_are_flagged(
    free: float, cards: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space(monkeypatch, size=max(free, 1 / 16), free=free)
    found = named(list(system.system_findings(machine_with(*[H100] * cards), None)), "/dev/shm")
    assert found.state == state
    if state != "ok":
        assert "--shm-size" in str(found.remedy)


def test_a_real_small_shared_memory_is_flagged() -> None:
    done = unshare("mount -t tmpfs -o size=64m none /dev/shm; PYTHON -m runner doctor || true")
    assert re.search(r"warning +/dev/shm +64 MiB free of 64 MiB", done.stdout)


def test_a_system_without_shared_memory_needs_none(tmp_path: Path) -> None:
    assert named(list(system.system_findings(LAPTOP, None, tmp_path)), "/dev/shm").state == "ok"


def test_memory_is_what_the_container_may_use(tmp_path: Path) -> None:
    meminfo = f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n"
    limit = {"proc__self__cgroup": "0::/job\n", "sys__fs__cgroup__job__memory.max": f"{8 * GIB}\n"}
    root = root_with(tmp_path, proc__meminfo=meminfo, **limit)
    found = named(list(system.system_findings(detect.detect(root), None, root)), "memory")
    assert (found.state, found.found) == ("ok", "8.0 GiB (the container's limit; the machine has 64.0), 8.0 free")


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(("total", "free", "state"), [(1, 1, "problem"), (64, 1, "warning"), (64, 60, "ok")])
def test_memory_is_held_against_the_plan(total: int, free: int, state: str, tmp_path: Path) -> None:
    root = root_with(tmp_path, proc__meminfo=f"MemTotal: {total * 2**20} kB\nMemAvailable: {free * 2**20} kB\n")
    machine = replace(LAPTOP, memory_gib=float(total))
    assert named(list(system.system_findings(machine, run_of("method=lora"), root)), "memory").state == state


def test_cores_and_bfloat16() -> None:
    slow = replace(LAPTOP, cpu_bf16=False)
    assert named(list(system.system_findings(slow, None)), "cpu").state == "note"
    starved = replace(machine_with(H100, H100B), num_cpus=1)
    assert named(list(system.system_findings(starved, None)), "cpu").state == "warning"


# ── driver and GPUs ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Finding]]:
    """`gpu_machine(H100, H100, nvmlDeviceGetMigMode=…)`: what is found where these GPUs and this NVML are."""

    def look(*cards: Gpu, run: DoctorTarget | None = None, **answers: Any) -> list[Finding]:
        nvml = fake_nvml(*cards)
        used = answers.pop("used_gib", 0.3)
        defaults = {
            "nvmlSystemGetDriverVersion": "580.82.07",
            "nvmlSystemGetCudaDriverVersion_v2": 13000,
            "nvmlDeviceGetMemoryInfo": lambda g: types.SimpleNamespace(
                total=int(g.memory_gib * GIB), used=int(used * GIB)
            ),
            "nvmlDeviceGetP2PStatus": 0,
        }
        vars(nvml).update({name: _answering(nvml, answer) for name, answer in {**defaults, **answers}.items()})
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        root = root_with(tmp_path, dev__nvidiactl="")
        machine = detect.detect(root)
        return list(gpu_checks.gpu_findings(gpu_checks.read_gpus(machine, root), machine, run))

    return look


def _answering(nvml: Any, answer: Any) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        if answer is NotImplemented:
            raise nvml.NVMLError("Not Supported")
        return answer(*arguments) if callable(answer) else answer

    return function


def test_healthy_cards_stand_in_one_line(gpu_machine: Callable[..., list[Finding]]) -> None:
    found = gpu_machine(H100, H100B)
    assert [(f.name, f.state, f.found) for f in found] == [
        ("driver", "ok", "NVIDIA 580.82.07, CUDA 13.0"),
        ("gpus", "ok", "2 × H100 80GB HBM3, 79.7 GiB each, compute capability 9.0"),
        ("p2p", "ok", "all cards reach each other over NVLink"),
    ]
    assert [card["used_gib"] for card in found[1].facts["gpus"]] == [0.3, 0.3]
    json.dumps([f.facts for f in found])


@pytest.mark.parametrize(
    ("answers", "state", "says"),
    [
        ({"nvmlDeviceGetTotalEccErrors": 2}, "warning", "2 uncorrectable memory errors"),
        ({"nvmlDeviceGetRemappedRows": (1, 1, 1, 0)}, "warning", "waits to be replaced"),
        ({"nvmlDeviceGetRemappedRows": (1, 1, 0, 1)}, "problem", "could not be replaced"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x24}, "warning", "slowed down by heat"),
        ({"nvmlDeviceGetCurrentClocksThrottleReasons": 0x80}, "warning", "slowed down by the power supply"),
        ({"nvmlDeviceGetCurrentClocksEventReasons": 0x5}, "ok", "H100"),  # idle, or at its power cap
        ({"nvmlDeviceGetComputeMode": 2}, "problem", "PROHIBITED"),
        ({"nvmlDeviceGetComputeMode": 3}, "ok", "H100"),  # one process at a time: what a run is
        ({"nvmlDeviceGetMigMode": (1, 1)}, "warning", "MIG is on"),
        ({"used_gib": 30.0}, "warning", "other processes use 30.0 of 79.7 GiB"),
        ({"nvmlDeviceGetTotalEccErrors": NotImplemented, "nvmlDeviceGetRemappedRows": NotImplemented}, "ok", "H100"),
    ],
)
def test_a_sick_card_is_told(
    answers: dict[str, Any], state: str, says: str, gpu_machine: Callable[..., list[Finding]]
) -> None:
    _, card = gpu_machine(H100, **answers)
    assert card.state == state
    assert says in card.found
    assert bool(card.remedy) == (state != "ok")


@pytest.mark.usefixtures("laptop")
def test_memory_that_others_hold_is_missing_to_a_run(
    gpu_machine: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("model=mistral7b", "method=lora", "hw=h100")
    assert run.plan is not None
    needed = run.plan.peak_gib["expected"]
    monkeypatch.setattr(detect, "detect", lambda root: machine_with(H100))
    short = gpu_machine(H100, used_gib=80 - needed, run=run)[1]
    enough = gpu_machine(H100, used_gib=2.0, run=run)[1]
    assert (short.state, enough.state) == ("problem", "warning")
    assert f"the run needs {needed:.1f}" in short.found


def test_an_old_card_has_no_bfloat16(gpu_machine: Callable[..., list[Finding]]) -> None:
    _, card = gpu_machine(T4)
    assert (card.state, card.name) == ("note", "gpu 0")
    assert "no bfloat16" in card.found


@pytest.mark.parametrize("name", ["GeForce RTX 4090", "GeForce RTX 3090"])
def test_consumer_cards_need_peer_to_peer_off(name: str, gpu_machine: Callable[..., list[Finding]]) -> None:
    pair = (Gpu(name, "GPU-aa11", 23.99, 8.9), Gpu(name, "GPU-bb22", 23.99, 8.9))
    p2p = named(gpu_machine(*pair, nvmlDeviceGetP2PStatus=2), "p2p")
    assert p2p.state == "note"
    assert "needs NCCL_P2P_DISABLE=1" in p2p.found
    bridged = named(gpu_machine(*pair), "p2p")  # RTX 3090s with an NVLink bridge
    assert "over NVLink, which is not used" in bridged.found


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (lambda one, other, index: 0 if index == 0 else 5, "ok", "over PCIe"),
        (lambda one, other, index: 1, "warning", "1 of 1 pairs of cards do not reach each other"),
        (NotImplemented, "note", "does not say"),
    ],
)
def test_peer_to_peer_of_other_cards(
    answer: Any, state: str, says: str, gpu_machine: Callable[..., list[Finding]]
) -> None:
    p2p = named(gpu_machine(H100, H100B, nvmlDeviceGetP2PStatus=answer), "p2p")
    assert p2p.state == state
    assert says in p2p.found


def test_nvml_is_asked_in_its_own_numbers() -> None:
    import pynvml

    assert (pynvml.NVML_P2P_CAPS_INDEX_NVLINK, pynvml.NVML_P2P_STATUS_OK) == (
        gpu_checks._P2P_NVLINK,
        gpu_checks._P2P_OK,
    )
    assert (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC) == (1, 0)
    assert pynvml.NVML_COMPUTEMODE_PROHIBITED == gpu_checks._PROHIBITED
    asked = re.findall(r'"(nvml\w+)"', Path(gpu_checks.__file__).read_text("utf-8"))
    assert len(asked) > 10
    assert [name for name in asked if not hasattr(pynvml, name)] == []


def test_a_driver_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(H100, init_fails=True))
    monkeypatch.setenv("PATH", str(tmp_path))
    root = root_with(tmp_path, dev__nvidiactl="")
    (driver,) = gpu_checks.gpu_findings(gpu_checks.read_gpus(machine_with(), root), machine_with(), None)
    assert driver.state == "problem"
    assert "Driver/library version mismatch" in driver.found


def test_without_nvml_the_driver_is_known_from_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    put_nvidia_smi(tmp_path, "echo 'NVIDIA H100 80GB HBM3, GPU-cc33, 81559, 9.0'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\nGCC version: 12"
    root = root_with(tmp_path, proc__driver__nvidia__version=said)
    machine = detect.detect(root)
    found = list(gpu_checks.gpu_findings(gpu_checks.read_gpus(machine, root), machine, None))
    assert [f.found for f in found] == ["NVIDIA 575.57.08", "1 × H100 80GB HBM3, 79.7 GiB, compute capability 9.0"]


def test_cards_without_a_driver_are_seen_on_the_bus(tmp_path: Path) -> None:
    card, sound = "sys__bus__pci__devices__0000:01:00.0__", "sys__bus__pci__devices__0000:01:00.1__"
    files = {f"{card}vendor": "0x10de\n", f"{card}class": "0x030200\n"}
    files |= {f"{sound}vendor": "0x10de\n", f"{sound}class": "0x040300\n"}
    root = root_with(tmp_path, **files)
    (driver,) = gpu_checks.gpu_findings(gpu_checks.read_gpus(machine_with(), root), machine_with(), None)
    assert driver.state == "warning"
    assert driver.found.startswith("NVIDIA cards on the bus: 1")
    assert "--gpus all" in str(driver.remedy)


def test_hidden_cards_are_told() -> None:
    seen = GpuReport(Driver("580.82", (13, 0)), None, (), {}, 0)
    machine = Machine((), "", 2, 16, 64.0, True)
    (driver,) = gpu_checks.gpu_findings(seen, machine, None)
    assert (driver.state, driver.found) == ("warning", "NVIDIA 580.82, CUDA 13.0, and no GPU is visible")
    shown = list(
        gpu_checks.gpu_findings(
            replace(seen, cards=(Card(H100, 0),)), replace(machine, gpus=(H100,), visible_devices="0"), None
        )
    )
    assert "CUDA_VISIBLE_DEVICES=0 hides 2" in [f.found for f in shown]


# ── software ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cuda", "driver", "gpu", "state", "says"),
    [
        (None, Driver("580.82", (13, 0)), H100, "problem", "CPU build, which does not see the GPUs"),
        ((13, 0), Driver("550.54", (12, 4)), H100, "problem", "the driver serves CUDA 12.4"),
        ((13, 0), Driver("550.54", (13, 0)), H100, "ok", "CUDA 13.0 build"),  # a forward-compatibility library
        ((13, 0), Driver("550.54", None), H100, "problem", "the driver is 550.54"),
        ((12, 8), Driver("525.60", (12, 0)), H100, "ok", "CUDA 12.8 build"),  # of the same family
        ((12, 8), Driver("580.82", (13, 0)), H100, "ok", "CUDA 12.8 build"),
        ((13, 0), Driver("580.82", (13, 0)), V100, "problem", "without kernels for Tesla V100"),
        ((12, 8), Driver("580.82", (13, 0)), V100, "ok", "CUDA 12.8 build"),
        ((12, 6), Driver("580.82", (13, 0)), B200, "problem", "without kernels for B200"),
        ((13, 0), Driver("580.82", (13, 0)), B200, "ok", "CUDA 13.0 build"),
        ((13, 0), None, T4, "ok", "CUDA 13.0 build"),
    ],
)
def test_torch_is_built_for_driver_and_cards(
    cuda: tuple[int, int] | None, driver: Driver | None, gpu: Gpu, state: str, says: str
) -> None:
    found = software._torch(Torch("2.13.0", cuda), machine_with(gpu), driver)
    assert found.state == state
    assert says in found.found
    assert bool(found.remedy) == (state == "problem")


def test_torch_is_read_without_importing_it() -> None:
    found = software.installed_torch()
    assert found is not None
    assert found.version == metadata.version("torch")
    if "+cpu" in found.version:
        assert found.cuda is None


def test_what_is_asked_for_is_pyprojects_list() -> None:
    asked = software.requirements()
    assert {"click", "torch", "transformers", "deepspeed"} <= set(asked)
    assert "pytest" not in asked
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"torch{asked["torch"].specifier}"' in text


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(
    ("name", "version", "words", "state"),
    [
        ("torch", None, None, "problem"),
        ("torch", None, ("hw=h100", "model=phi2", "where=runpod"), "note"),
        ("wandb", None, None, "warning"),
        ("wandb", None, ("track=wandb",), "problem"),
        ("bitsandbytes", None, ("method=qlora4",), "problem"),
        ("bitsandbytes", None, ("method=lora",), "warning"),
        ("trl", "1.2.0", None, "warning"),
        ("trl", "99.0", None, "ok"),
        ("pydantic", "3.0", None, "warning"),  # an upper bound
    ],
)
def test_packages_are_there_and_new_enough(
    name: str, version: str | None, words: tuple[str, ...] | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {n: Version(next(iter(r.specifier)).version) for n, r in software.requirements().items()}
    installed |= {"pydantic": Version("2.14.3"), "hydra-core": Version("1.3.8")}
    wanted_run = run_of(*words) if words else None
    monkeypatch.setattr(
        software, "_version", lambda n: (Version(version) if version else None) if n == name else installed[n]
    )
    found = software._packages(wanted_run)
    assert found.state == state
    assert name in found.found or state == "ok"


def test_compilers_are_never_more_than_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (note,) = software._compilers(Torch("2.13.0", (13, 7)), needed=True)
    assert note.state == "note"
    assert "CUDA's toolkit 13.7" in str(note.remedy)
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert [f.state for f in software._compilers(Torch("2.13.0+cpu", None), needed=True)] == ["ok"]
    assert list(software._compilers(Torch("2.13.0+cpu", None), needed=False)) == []


@pytest.mark.parametrize(
    ("nvcc", "torch", "serves"), [("13.0", (13, 0), True), ("13.1", (13, 0), False), ("12.4", (12, 8), True)]
)
def test_deepspeed_wants_the_nvcc_that_torch_was_built_with(
    nvcc: str, torch: tuple[int, int], serves: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvcc"
    tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (found,) = software._compilers(Torch("2.13.0", torch), needed=True)
    assert found.state == ("ok" if serves else "note")


@pytest.mark.usefixtures("laptop")
def test_compilers_matter_to_offload_alone() -> None:
    def looked(*words: str) -> bool:
        return "compiler" in [
            f.name for f in software.software_findings(machine_with(), None, run_of("model=phi2", *words))
        ]

    assert looked("hw=h100x3", "deepspeed=zero2_offload")
    assert not looked("hw=h100x3", "deepspeed=zero2")


# ── bandwidth ──────────────────────────────────────────────────────────────────────────────────


def test_gloo_adds_up_between_two_processes() -> None:
    found = gpu_checks.bandwidth_finding(LAPTOP, None)
    assert (found.state, found.remedy) == ("ok", None), found.found
    assert found.found.startswith("gloo all-reduce over 2 CPU processes: ")
    assert (found.facts["backend"], found.facts["world_size"]) == ("gloo", 2)
    assert [size["mib"] for size in found.facts["sizes"]] == [1, 16]
    assert all(0 < size["bus_gb_s"] < 1000 for size in found.facts["sizes"])


def test_an_all_reduce_that_hangs_is_ended_and_told() -> None:
    found = gpu_checks.bandwidth_finding(LAPTOP, None, limit_s=0.2)
    assert found.state == "problem"
    assert "no answer within 0.2 s" in found.found
    assert found.remedy


@pytest.mark.parametrize(("speed", "state"), [(300.0, "ok"), (30.0, "warning")])
def test_a_slow_link_is_told_beside_what_plans_count_on(speed: float, state: str) -> None:
    pair = machine_with(H100, H100B)
    hw = detect.resolve(detect.HardwareSpec(name="local", accelerator="detect"), pair)
    content = {"backend": "nccl", "world_size": 2, "sizes": [{"mib": 256, "ms": 1.0, "bus_gb_s": speed}]}
    found = gpu_checks._judged_speed(content, "2 GPUs", hw)
    assert found.state == state
    assert "count on 370" in found.found


def test_the_error_of_a_rank_is_told_without_its_stack() -> None:
    output = (
        "W1120 torch/distributed/run.py:766] \n"
        "[rank1]: Traceback (most recent call last):\n"
        '[rank1]:   File "bandwidth.py", line 40, in main\n'
        "[rank1]: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert gpu_checks._reason(output).startswith("torch.distributed.DistBackendError: NCCL error in")
    assert gpu_checks._reason("") == "it failed without a message"
