"""Packages, torch's build for this driver, DeepSpeed's compilers, git: read from files, nothing imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from runner.doctor.finding import DoctorTarget, Finding, State
from runner.machine import kernels, torch_build
from runner.machine.detect import Machine
from runner.machine.torch_build import Driver, Torch, installed_torch
from runner.paths import ASSETS
from runner.report.invocation import PROJECT, install

# Without these some runs work, and what does not. The others of `train` every run needs.
_FOR_SOME = {
    "bitsandbytes": "method=qlora4, qlora8 and 8-bit optimisers",
    "deepspeed": "ZeRO",
    "hydra-joblib-launcher": "sweeps in parallel",
    "matplotlib": "pictures of the loss",
    "nvidia-ml-py": "the state of the GPUs",
    "psutil": "measuring memory",
    "tensorboard": "track=tensorboard",
    "wandb": "track=wandb",
}

_FLASH = 8.0
"""Compute capability from which flash-attn 2 has kernels (its README: Ampere, Ada, Hopper)."""


def software_findings(machine: Machine, driver: Driver | None, target: DoctorTarget | None) -> Iterator[Finding]:
    """Packages, torch, compilers where they matter, git."""
    yield _packages(target)
    torch = installed_torch()
    if torch is not None:
        yield _torch(torch, machine, driver)
    if any((gpu.compute_capability or 0) >= _FLASH for gpu in machine.gpus):
        yield _attention()
    if machine.gpus and torch is not None and torch.cuda is not None and (missing := kernels.no_compiler()):
        state: State = "problem" if target is None or kernels.compiles_kernels(target.spec) else "note"
        yield Finding("compiler", state, *missing)
    if target is None or "offload" in target.spec.deepspeed.name:
        yield from _compilers(torch, needed=target is not None)
    yield _git()


def requirements() -> dict[str, Requirement]:
    """Requirements of this version, by name: its own and those of `train`, for this Python and system."""
    lines = _of_checkout() or metadata.requires(PROJECT) or []
    found = {}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "train"}):
            found[requirement.name] = requirement
    return found


def _of_checkout() -> list[str] | None:
    """The requirements in pyproject.toml, which an editable install's own record may be older than."""
    file = ASSETS / "pyproject.toml"
    if not file.is_file():
        return None
    project = tomllib.loads(file.read_text("utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["train"]]


def _version(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None


def _packages(target: DoctorTarget | None) -> Finding:
    """Missing ones, then those older than the tests ran with."""
    try:
        asked = requirements()
    except metadata.PackageNotFoundError:
        what = "what this version asks for is not recorded: not installed by pip"
        return Finding("packages", "note", what, install("train"))
    have = {name: _version(name) for name in asked}
    facts = {"python": platform.python_version(), **{n: str(v) if v else None for n, v in have.items()}}
    missing = [name for name, version in have.items() if version is None]
    if missing:
        state: State = "warning"
        if _start_without(missing, target):
            state = "problem" if target is None or target.here else "note"
        why = [f"{name} ({_FOR_SOME[name]})" if name in _FOR_SOME else name for name in missing]
        return Finding("packages", state, f"not installed: {', '.join(why)}", install("train"), facts)
    older = [f"{name} {have[name]} (asked: {requirement.specifier})" for name, requirement in asked.items()
             if not requirement.specifier.contains(str(have[name]), prereleases=True)]  # fmt: skip
    if older:  # the bounds are what the tests ran with, not what is known to fail
        return Finding("packages", "warning", f"not as required: {', '.join(older)}", install("train"), facts)
    shown = ", ".join(f"{name} {have[name]}" for name in ("transformers", "trl", "peft", "deepspeed") if have.get(name))
    what = f"Python {platform.python_version()}, {shown}: all {len(asked)} as asked"
    return Finding("packages", "ok", what, None, facts)


def _start_without(missing: list[str], target: DoctorTarget | None) -> bool:
    """One of them stops a run (this run)."""
    if any(name not in _FOR_SOME for name in missing):
        return True
    if target is None:
        return False
    spec = target.spec
    needed = {
        "bitsandbytes": spec.method.packed or "8bit" in spec.train.optimizer
        or "paged" in spec.train.optimizer,
        "deepspeed": spec.deepspeed.name not in ("none", "auto"),
        "tensorboard": spec.track.name == "tensorboard",
        "wandb": spec.track.name == "wandb",
    }  # fmt: skip
    return any(needed.get(name, False) for name in missing)


def _torch(torch: Torch, machine: Machine, driver: Driver | None) -> Finding:
    """Its build against driver and cards."""
    build = "CUDA {}.{}".format(*torch.cuda) if torch.cuda else "CPU"
    what, facts = f"{torch.version}, {build} build", {"version": torch.version, "cuda": torch.cuda}
    if not machine.gpus:
        return Finding("torch", "ok", what, None, facts)
    if reason := torch_build.why_not(torch, machine.gpus, driver):
        return Finding("torch", "problem", f"{what}, {reason[0]}", reason[1], facts)
    return Finding("torch", "ok", what, None, facts)


def _attention() -> Finding:
    """What `train.attention=auto` means on GPUs that have a flash kernel."""
    versions = {"flash_attn": kernels.flash_attn(), "flash_attn_3": kernels.flash_attn_3()}
    found = [f"{name.replace('_', '-')} {version}" for name, version in versions.items() if version is not None]
    return Finding("attention", "ok", ", ".join(["torch's flash kernel (varlen)", *found]), None, versions)


def _compilers(torch: Torch | None, *, needed: bool) -> Iterator[Finding]:
    """Tools with which DeepSpeed builds its kernels when it first offloads to NVMe, or by a user's own JSON. Never more
    than a note: with the JSONs of this project nothing is built for main memory."""
    tools = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    compiler = next(filter(shutil.which, tools), None)
    nvcc = _nvcc()
    what = [f"C++: {compiler or 'none'}", f"nvcc: {nvcc or 'none'}"]
    missing = ["a C++ compiler (apt install g++)"] if compiler is None else []
    if torch is not None and torch.cuda is not None:
        target = "{}.{}".format(*torch.cuda)
        # DeepSpeed 0.19.8, op_builder/builder.py: any 11.x for 11.x and 12.x for 12.x, but 13.x must be the same.
        serves = nvcc is not None and (nvcc == target or nvcc.split(".")[0] == target.split(".")[0] in ("11", "12"))
        if not serves:
            missing.append(
                f"CUDA's toolkit {target}, as torch was built with" + (" (or DS_SKIP_CUDA_CHECK=1)" if nvcc else "")
            )
    facts = {"compiler": compiler, "nvcc": nvcc}
    if missing:
        remedy = f"for ZeRO with offload to NVMe install {' and '.join(missing)}"
        yield Finding("compiler", "note", "; ".join(what), remedy, facts)
    elif needed:
        yield Finding("compiler", "ok", "; ".join(what) + ": DeepSpeed can build its kernels", None, facts)


def _nvcc() -> str | None:
    """Version of the nvcc that torch's extension builder would take: CUDA_HOME, else PATH, else /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    tool = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def _git() -> Finding:
    try:
        said = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Finding("git", "note", "not there: a run does not record the commit of its code", "install git")
    return Finding("git", "ok", said.strip().removeprefix("git version "))
