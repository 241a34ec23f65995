"""The hardware catalogue is true and unambiguous, and this machine is seen as it is."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from runner.config import conf_files
from runner.machine import detect
from runner.machine.detect import Gpu, Machine
from runner.spec import HardwareSpec
from tests.support.front import runner

NAMES = conf_files.options("hw")
GIB = 2**30

RTX4090 = Gpu("GeForce RTX 4090", "GPU-aa11", 23.99, 8.9)
H100 = Gpu("H100 80GB HBM3", "GPU-cc33", 79.65, 9.0)
T4 = Gpu("Tesla T4", "GPU-dd44", 15.0, 7.5)
V100 = Gpu("Tesla V100-SXM2-32GB", "GPU-ee55", 32.0, 7.0)


def spec_of(name: str, **changes: Any) -> HardwareSpec:
    return HardwareSpec.model_validate({**conf_files.load_choice("hw", name), **changes})


CUDA_NAMES = [name for name in NAMES if spec_of(name).accelerator == "cuda"]


def machine_with(*gpus: Gpu) -> Machine:
    return Machine(gpus, None, 0, num_cpus=16, memory_gib=125.0, cpu_bf16=True)


# --- the catalogue ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_file_validates_and_is_named_after_itself(name: str) -> None:
    spec = spec_of(name)
    assert spec.name == name


def test_nobody_can_mean_two_machines() -> None:
    said = {n: {s.casefold() for s in (n, spec_of(n).title, *spec_of(n).aliases) if s} for n in NAMES}
    clashes = [(a, b, said[a] & said[b]) for a, b in itertools.combinations(NAMES, 2) if said[a] & said[b]]
    assert clashes == []


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_no_fact_of_a_gpu_is_missing(name: str) -> None:
    facts = ("gpu", "memory_gib", "bf16", "compute_capability", "tflops_bf16", "bandwidth_gb_s", "interconnect")
    spec = spec_of(name)
    assert [fact for fact in facts if getattr(spec, fact) is None] == []
    since_ampere = (spec.compute_capability or 0) >= detect.AMPERE
    assert (spec.bf16, spec.flash_attention) == (since_ampere, since_ampere)


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_a_price_says_when_and_by_whom(name: str) -> None:
    spec = spec_of(name)
    assert spec.price_date
    if spec.usd_per_hour is None:
        assert spec.price_date == ("no dated price" if spec.runpod_gpu_id else "not on RunPod")
        return
    day, _, source = spec.price_date.partition(", ")
    assert day.startswith("2026")
    assert source


def test_the_list_says_why_there_is_no_price() -> None:
    lines = {line.split()[0]: line for line in runner("list", "hw").stdout.splitlines() if line.strip()}
    assert lines["rtx3090"].rstrip().endswith("no dated price") and lines["t4"].rstrip().endswith("not on RunPod")
    assert lines["rtx6000ada"].rstrip().endswith("0.84") and lines["rtx5090"].rstrip().endswith("0.99")


def test_what_a_pod_has_of_main_memory_is_known_of_all_that_are_priced() -> None:
    priced = [spec_of(name) for name in CUDA_NAMES if spec_of(name).usd_per_hour is not None]
    assert [hw.name for hw in priced if hw.rented_memory_gib_per_gpu is None] == []
    assert spec_of("rtx4090x2").main_memory_gib(rented=True) == 76  # 2 × 41 GB
    assert [hw.name for hw in priced if hw.rented_vcpus_per_gpu is None] == []
    assert (spec_of("h200").cpus(rented=True), spec_of("h200").cpus(rented=False)) == (24, None)
    assert spec_of("b200").main_memory_gib(rented=True) == 264 and spec_of("rtx4090x2").cpus(rented=True) == 12


def test_several_gpus_differ_from_one_in_number_and_name_only() -> None:
    groups = itertools.groupby(sorted(CUDA_NAMES, key=lambda n: spec_of(n).gpu or ""), lambda n: spec_of(n).gpu)
    for _, names in groups:
        facts = [spec_of(n).model_dump(exclude={"name", "title", "aliases", "num_gpus"}) for n in names]
        assert all(f == facts[0] for f in facts)


@pytest.mark.parametrize("name", [n for n in CUDA_NAMES if "x" in n.removeprefix("rtx")])
def test_the_number_in_the_name_is_the_number_of_gpus(name: str) -> None:
    assert spec_of(name).num_gpus == int(name.rpartition("x")[2])


def test_cards_without_peer_to_peer_switch_it_off_in_nccl() -> None:
    consumer = {n for n in CUDA_NAMES if "GeForce" in (spec_of(n).gpu or "")}
    assert {"rtx4090", "rtx3090", "rtx4090x2"} <= consumer
    for name in CUDA_NAMES:
        assert spec_of(name).env == (detect.NO_PEER_TO_PEER if name in consumer else {})


def test_t4_has_no_bf16_no_flash_attention_and_is_not_on_runpod() -> None:
    t4 = spec_of("t4")
    assert (t4.bf16, t4.flash_attention, t4.runpod_gpu_id) == (False, False, None)


# --- looking at this machine -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU of the machine that runs the tests is seen: nothing on PATH, no NVML, no selection."""
    nothing = tmp_path / "bin"
    nothing.mkdir()
    monkeypatch.setenv("PATH", str(nothing))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import pynvml raises ImportError
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def root_with(tmp_path: Path, **files: str) -> Path:
    """A folder that stands for `/`; `proc__meminfo=…` is `proc/meminfo`."""
    root = tmp_path / "root"
    for name, text in {"proc__meminfo": f"MemTotal: {64 * 2**20} kB\n", **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def fake_nvml(*gpus: Gpu, init_fails: bool = False) -> types.ModuleType:
    """A `pynvml` that knows these GPUs, with the vendor in their names as in reality."""

    class NVMLError(Exception):
        pass

    def init() -> None:
        if init_fails:
            raise NVMLError("Driver/library version mismatch")

    module = types.ModuleType("pynvml")
    vars(module).update(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus),
        nvmlDeviceGetHandleByIndex=lambda i: gpus[i],
        nvmlDeviceGetName=lambda g: f"NVIDIA {g.name}".encode(),  # bytes, as older versions return
        nvmlDeviceGetUUID=lambda g: g.uuid,
        nvmlDeviceGetMemoryInfo=lambda g: types.SimpleNamespace(total=int(g.memory_gib * GIB)),
        nvmlDeviceGetCudaComputeCapability=lambda g: tuple(map(int, str(g.compute_capability).split("."))),
    )
    return module


def put_nvidia_smi(tmp_path: Path, script: str) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def two_4090s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    second = Gpu(RTX4090.name, "GPU-bb22", RTX4090.memory_gib, 8.9)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(RTX4090, second))
    return root_with(tmp_path, dev__nvidiactl="")


def test_looking_imports_no_torch() -> None:
    code = (
        "import sys; from runner.machine import detect; detect.detect();"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, check=False, timeout=60)
    assert done.returncode == 0


def test_this_machine_has_cores_and_memory() -> None:
    machine = detect.detect()
    assert 1 <= machine.num_cpus <= (os.cpu_count() or 1)
    assert machine.memory_gib is None or machine.memory_gib > 0.1


def test_nvml_is_asked(two_4090s: Path) -> None:
    machine = detect.detect(two_4090s)
    assert [(g.name, g.memory_gib, g.compute_capability) for g in machine.gpus] == [
        ("GeForce RTX 4090", 23.99, 8.9)
    ] * 2
    assert str(machine) == "2 × GeForce RTX 4090 (24.0 GiB)"


def test_without_a_driver_nvml_is_not_even_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(RTX4090))
    assert detect.detect(root_with(tmp_path)).gpus == ()


@pytest.mark.parametrize("nvml", [None, fake_nvml(init_fails=True)])
def test_nvidia_smi_is_asked_where_nvml_does_not_answer(
    nvml: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    put_nvidia_smi(
        tmp_path,
        "echo 'NVIDIA GeForce RTX 4090, GPU-aa11, 24564, 8.9'\necho 'NVIDIA H100 80GB HBM3, GPU-cc33, 81559, 9.0'",
    )
    assert detect.detect(root_with(tmp_path, dev__nvidiactl="")).gpus == (RTX4090, H100)


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo 'A, B, [N/A], 8.9'", ""])
def test_a_broken_nvidia_smi_is_no_gpu(script: str, tmp_path: Path) -> None:
    put_nvidia_smi(tmp_path, script)
    assert detect.detect(root_with(tmp_path)).gpus == ()


@pytest.mark.parametrize(
    ("setting", "uuids"),
    [
        ("0,1", ["GPU-aa11", "GPU-bb22"]),
        ("1,0", ["GPU-bb22", "GPU-aa11"]),
        ("1", ["GPU-bb22"]),
        ("GPU-bb", ["GPU-bb22"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["GPU-aa11"]),  # the first entry that names nothing ends the list
        ("0,0", ["GPU-aa11"]),
        ("GPU-", []),  # ambiguous
        ("MIG-GPU-aa11", []),
    ],
)
def test_cuda_visible_devices_is_honoured(
    setting: str, uuids: list[str], two_4090s: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    machine = detect.detect(two_4090s)
    assert [gpu.uuid for gpu in machine.gpus] == uuids
    assert machine.num_hidden_gpus == 2 - len(uuids)


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx512f amx_bf16", True),
        ("flags\t\t: fpu avx512f avx512_vnni", False),
        ("Features\t: fp asimd bf16 i8mm", True),  # Arm
        ("Features\t: fp asimd", False),
    ],
)
def test_bf16_of_a_cpu_is_read_from_its_flags(flags: str, bf16: bool, tmp_path: Path) -> None:
    assert detect.detect(root_with(tmp_path, proc__cpuinfo=f"processor: 0\n{flags}\n")).cpu_bf16 is bf16


V2 = {"proc__self__cgroup": "0::/user/job\n"}
V1 = {"proc__self__cgroup": "4:memory:/job\n3:cpuset:/\n2:cpu,cpuacct:/job\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 64.0),
        ({**V2, "sys__fs__cgroup__user__job__memory.max": f"{8 * GIB}\n"}, 8.0),
        ({**V2, "sys__fs__cgroup__user__memory.max": f"{6 * GIB}\n"}, 6.0),  # the limit of the group above
        ({**V2, "sys__fs__cgroup__user__job__memory.max": "max\n"}, 64.0),
        ({**V1, "sys__fs__cgroup__memory__job__memory.limit_in_bytes": f"{4 * GIB}\n"}, 4.0),
        ({**V1, "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{3 * GIB}\n"}, 3.0),  # the host's path
        ({**V1, "sys__fs__cgroup__memory__job__memory.limit_in_bytes": "9223372036854771712\n"}, 64.0),
    ],
)
def test_memory_ends_at_the_containers_limit(files: dict[str, str], gib: float, tmp_path: Path) -> None:
    assert detect.detect(root_with(tmp_path, **files)).memory_gib == gib


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({**V2, "sys__fs__cgroup__user__job__cpu.max": "150000 100000\n"}, 2),
        ({**V2, "sys__fs__cgroup__user__job__cpu.max": "max 100000\n"}, 8),
        ({**V2, "sys__fs__cgroup__user__job__cpu.max": "1000 100000\n"}, 1),
        (
            {
                **V1,
                "sys__fs__cgroup__cpu__job__cpu.cfs_quota_us": "400000\n",
                "sys__fs__cgroup__cpu__job__cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                **V1,
                "sys__fs__cgroup__cpu__job__cpu.cfs_quota_us": "-1\n",
                "sys__fs__cgroup__cpu__job__cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_end_at_affinity_and_the_containers_quota(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert detect.detect(root_with(tmp_path, **files)).num_cpus == cores


def test_a_system_that_says_nothing_does_not_crash_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    for system in ("Darwin", "Windows"):
        monkeypatch.setattr("platform.system", lambda s=system: s)
        machine = detect.detect(tmp_path)
        assert machine.num_cpus >= 1
        assert machine.cpu_bf16 is False
        assert machine.gpus == ()


# --- resolving `detect` and `cpu` ------------------------------------------------------------------


def test_a_cpu_machine_becomes_a_cpu_with_its_facts() -> None:
    machine = Machine((), None, 0, num_cpus=2, memory_gib=23.5, cpu_bf16=True)
    hw = detect.resolve(spec_of("local"), machine)
    assert (hw.accelerator, hw.num_gpus, hw.num_cpus, hw.bf16) == ("cpu", 0, 2, True)
    assert (hw.memory_gib, hw.host_memory_gib) == (23.5, 23.5)
    assert (hw.name, hw.title, hw.world_size) == ("local", "this machine", 1)


def test_a_gpu_machine_becomes_its_gpus_with_facts_from_the_catalogue(two_4090s: Path) -> None:
    hw = detect.resolve(spec_of("local"), detect.detect(two_4090s))
    named = spec_of("rtx4090x2")
    facts = {"gpu", "num_gpus", "memory_gib", "compute_capability", "bf16", "flash_attention", "env"}
    facts |= {"tflops_bf16", "bandwidth_gb_s", "interconnect", "usd_per_hour", "price_date"}
    assert hw.model_dump(include=facts) == named.model_dump(include=facts)
    assert (hw.accelerator, hw.name, hw.world_size, hw.host_memory_gib) == ("cuda", "local", 2, 64.0)


def test_one_consumer_card_talks_to_nobody() -> None:
    assert detect.resolve(spec_of("local"), machine_with(RTX4090)).env == {}


def test_a_gpu_outside_the_catalogue_has_what_the_driver_says_only() -> None:
    hw = detect.resolve(spec_of("local"), machine_with(Gpu("Quadro P400", "GPU-x", 2.0, 6.1)))
    assert (hw.gpu, hw.memory_gib, hw.bf16, hw.flash_attention) == ("Quadro P400", 2.0, False, False)
    assert (hw.tflops_bf16, hw.usd_per_hour) == (None, None)


def test_an_old_driver_is_helped_by_the_catalogue() -> None:
    hw = detect.resolve(spec_of("local"), machine_with(Gpu(T4.name, T4.uuid, 15.0, None)))
    assert (hw.compute_capability, hw.bf16) == (7.5, False)
    unknown = detect.resolve(spec_of("local"), machine_with(Gpu("New", "GPU-n", 15.0, None)))
    assert (unknown.compute_capability, unknown.bf16, unknown.flash_attention) == (None, None, False)


def test_different_gpus_count_as_the_weakest() -> None:
    hw = detect.resolve(spec_of("local"), machine_with(H100, T4))
    assert (hw.gpu, hw.num_gpus, hw.memory_gib) == ("H100 80GB HBM3 + Tesla T4", 2, 15.0)
    assert (hw.compute_capability, hw.bf16, hw.tflops_bf16) == (7.5, False, None)


def test_what_the_user_wrote_is_kept() -> None:
    two = machine_with(RTX4090, RTX4090)
    hw = detect.resolve(spec_of("local", num_gpus=1, memory_gib=20.0, env={"A": "1"}), two)
    assert (hw.num_gpus, hw.memory_gib, hw.env) == (1, 20.0, {"A": "1"})
    hw = detect.resolve(spec_of("local", env={"NCCL_P2P_DISABLE": "0"}), two)
    assert hw.env == {"NCCL_P2P_DISABLE": "0", "NCCL_IB_DISABLE": "1"}
    assert detect.resolve(spec_of("local", num_gpus=0), two).accelerator == "cpu"
    assert detect.resolve(spec_of("local", flash_attention=False), two).flash_attention is False
    assert detect.resolve(spec_of("cpu", num_processes=2, num_cpus=1), two).world_size == 2
    assert detect.resolve(spec_of("cpu", num_processes=2, num_cpus=1), two).num_cpus == 1


def test_the_cpu_can_be_chosen_beside_gpus() -> None:
    hw = detect.resolve(spec_of("cpu"), machine_with(H100))
    assert (hw.accelerator, hw.num_gpus, hw.num_cpus, hw.memory_gib) == ("cpu", 0, 16, 125.0)
    assert (hw.gpu, hw.flash_attention) == (None, False)


def test_named_gpus_are_left_as_they_are() -> None:
    hw = spec_of("h100x3")
    assert detect.resolve(hw, machine_with()) is hw


def test_resolving_twice_changes_nothing() -> None:
    for machine in (machine_with(), machine_with(RTX4090, RTX4090)):
        once = detect.resolve(spec_of("local"), machine)
        assert detect.resolve(HardwareSpec.model_validate(once.model_dump()), machine) == once


# --- why not here ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gpus", "needs", "has"),
    [
        ("h100x3", (), "3 × H100 80GB HBM3 (79.7 GiB)", "no NVIDIA GPU (16 CPU cores, 125.0 GiB)"),
        ("h100x3", (H100, H100), "3 × H100 80GB HBM3 (79.7 GiB)", "2 × H100 80GB HBM3 (79.7 GiB)"),
        ("a40", (RTX4090,), "1 × A40 (45.0 GiB)", "1 × GeForce RTX 4090 (24.0 GiB)"),
        ("l4", (V100,), "1 × L4 (22.5 GiB)", "1 × Tesla V100-SXM2-32GB (32.0 GiB), without bfloat16"),
    ],
)
def test_why_not_here(name: str, gpus: tuple[Gpu, ...], needs: str, has: str) -> None:
    why = detect.why_not_here(spec_of(name), machine_with(*gpus))
    assert why == f"{name} needs {needs}; this machine has {has}"


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("h100x3", (H100, H100, H100)),
        ("h100", (H100, T4)),  # only the first is used
        ("h100", (Gpu("H100 PCIe", "GPU-p", 0.96 * 79.65, 9.0),)),
        ("rtx4090", (H100,)),  # more than enough
        ("t4", (T4,)),  # asks for no bfloat16
        ("cpu", ()),
        ("local", ()),
    ],
)
def test_why_here(name: str, gpus: tuple[Gpu, ...]) -> None:
    assert detect.why_not_here(spec_of(name), machine_with(*gpus)) is None


def test_hidden_gpus_are_mentioned(two_4090s: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    why = detect.why_not_here(spec_of("rtx4090x2"), detect.detect(two_4090s))
    assert why
    assert why.endswith("1 × GeForce RTX 4090 (24.0 GiB); CUDA_VISIBLE_DEVICES=1 hides 1")


def test_more_gpus_than_there_are_can_be_written_and_are_refused_here() -> None:
    hw = detect.resolve(spec_of("local", num_gpus=2), machine_with())
    assert hw.accelerator == "cuda"
    why = detect.why_not_here(hw, machine_with())
    assert why
    assert why.startswith("local needs 2 × GPU; this machine has no NVIDIA GPU")
