"""Detect installed and compilable kernels from package records and files, without importing them."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from importlib import metadata, util
from pathlib import Path

from runner.machine import detect
from runner.plan.attention_kernels import has_sinks
from runner.spec import RunSpec

TRITON_SINCE = 7.0
"""Oldest compute capability that Triton compiles for: github.com/triton-lang/triton/issues/161."""
INSTALL_COMPILER = "apt-get install gcc python3-dev (conda install gcc for a Python of conda's)"


def flash_attn() -> str | None:
    """Version of flash-attn; None without it. By the package: flash-attn-4 calls its module the same."""
    return _version("flash-attn")


def flash_attn_3() -> str | None:
    """Version of FlashAttention 3, a package of its own; None without it."""
    return _version("flash-attn-3")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed_attention(spec: RunSpec) -> str | None:
    """Return the attention of `train.attention=auto` if a faster kernel than torch's own is installed.

    That is FlashAttention 3 on Hopper: 1.5 to 2 times version 2, which torch has (arXiv 2407.08608)."""
    hw = spec.hw
    could = hw.accelerator == "cuda" and hw.compute_capability == 9.0 and spec.train.precision != "fp32"
    if not could or has_sinks(spec.model) or spec.is_rented or detect.why_not_here(hw) or flash_attn_3() is None:
        return None
    return "flash_attention_3"


def liger(spec: RunSpec) -> bool:
    """Liger's kernels are on: as asked, else on a GPU where some for the model are installed."""
    if spec.train.liger != "auto":
        return spec.train.liger
    return spec.hw.accelerator == "cuda" and has_liger() and has_liger_for(spec.model.architecture)


def has_liger() -> bool:
    """`liger-kernel` is installed."""
    return util.find_spec("liger_kernel") is not None


def has_liger_for(architecture: str | None) -> bool:
    """Liger has kernels for a `model_type`; for another it patches nothing, and logs that. True where not known."""
    package = util.find_spec("liger_kernel")
    try:
        folder = (package.submodule_search_locations or [""])[0] if package else ""
        text = (Path(folder) / "transformers" / "monkey_patch.py").read_text("utf-8")
    except OSError:
        return True
    known = re.findall(r'^ +"([\w-]+)": *apply_liger', text, re.M)  # the rows of MODEL_TYPE_TO_APPLY_LIGER_FN
    return architecture is None or not known or architecture in known


def compiles_kernels(spec: RunSpec) -> bool:
    """A run on a GPU compiles with Triton as it trains: the head of TRL's trainers (but of those for ORPO, CPO and
    reward models), Liger's kernels, or the layers (`train.compile`)."""
    headless = spec.objective.passes(spec.method.adapts).head in ("logits", "number")
    return spec.hw.accelerator == "cuda" and (not headless or liger(spec) or spec.train.compile is True)


def no_compiler_of_layers(spec: RunSpec) -> tuple[str, str] | None:
    """As `no_compiler`, for `train.compile=true` on a CPU: torch.compile writes C++ (`torch/_inductor/cpp_builder.py`:
    CXX, else g++)."""
    named = os.environ.get("CXX")
    if spec.train.compile is not True or spec.hw.accelerator != "cpu" or shutil.which(named or "g++"):
        return None
    what = f"train.compile=true compiles C++, and there is no {named or 'g++'}"
    return what, "apt-get install g++, or write train.compile=false"


def no_compiler() -> tuple[str, str] | None:
    """The part that Triton lacks to build the launcher of a kernel (`triton/runtime/build.py`: CC, else gcc, else
    clang), and what to do about it; None where nothing is missing."""
    named = os.environ.get("CC")
    if named and shutil.which(named) is None:
        return f"CC={named}, with which Triton compiles its kernels, is not there", "unset CC, or name a C compiler"
    missing = [] if named or shutil.which("gcc") or shutil.which("clang") else ["no C compiler (gcc or clang)"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("no header files of Python (Python.h)")
    if not missing:
        return None
    return f"Triton compiles its kernels as a run begins, and there is {' and '.join(missing)}", INSTALL_COMPILER
