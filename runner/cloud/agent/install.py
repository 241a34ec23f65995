"""Find or create the Python that trains, in the pod. Standard library only, Python 3.10 or later; run by the agent.

`install.py DIR` reads DIR/install-order.json and leaves DIR/install.json {python, how, torch}. In this order:

    given    a Python that was named (RUNNER_POD_PYTHON), if it has what is needed
    image    the image's own, if it has all that is needed, recent enough
    around   an environment around the image's torch, which is recent enough: 3 GB less to download
    pinned   an environment with the pinned torch

An environment is made once per set of requirements and kept in the workspace's cache, on the volume where there is one.

`install.py --gpus N` says why N GPUs of this host cannot be trained on, and ends with REFUSED; it needs no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PROBE = """
import importlib.metadata as m, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "versions": found}))
"""
INDEX = "https://download.pytorch.org/whl"
"""PyTorch's own index of wheels, one folder per CUDA. PyPI's torch 2.13 is built for CUDA 13."""
SEES = """
import torch
for number in range(torch.cuda.device_count()): torch.zeros(1, device=f"cuda:{number}").add(1).item()
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)
"""
REFUSED = 3
OLDEST = (3, 11)
"""Oldest Python that trains (`requires-python`)."""
INSTEAD = "3.12"
"""The Python that uv brings where the image's is older."""
FLASH = "flash-attn"


@dataclass(frozen=True)
class FoundPython:
    """A Python and the packages it has, of those that matter."""

    executable: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True)
class PythonChoice:
    """The chosen installation, and the reason in words."""

    how: str
    why: str


def version_numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cu128` → (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def requirement_name(requirement: str) -> str:
    """`torch>=2.13` → `torch`."""
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower()


def lower_bound(requirement: str) -> tuple[int, ...]:
    """`torch>=2.13,<3` → (2, 13); empty without one."""
    bound = re.search(r"[>=]=\s*([\w.]+)", requirement)
    return version_numbers(bound[1]) if bound else ()


def missing_requirements(found: FoundPython, requirements: list[str]) -> list[str]:
    """The requirements that it does not meet."""
    return [
        line
        for line in requirements
        if requirement_name(line) not in found.versions
        or version_numbers(found.versions[requirement_name(line)]) < lower_bound(line)
    ]


def choose_python(given: FoundPython | None, image: FoundPython, requirements: list[str]) -> PythonChoice:
    """Choose the Python that trains. ValueError if a named one is unusable."""
    if given is not None:
        missing = missing_requirements(given, requirements)
        if missing:
            raise ValueError(f"{given.executable} lacks {', '.join(missing)}")
        return PythonChoice("given", f"{given.executable}, as RUNNER_POD_PYTHON says")
    if not is_too_old(image) and not missing_requirements(image, requirements):
        return PythonChoice("image", "the image's own Python has everything")
    if is_too_old(image):
        return PythonChoice("pinned", f"with Python {INSTEAD} and the pinned torch: the image's is {image.python}")
    torch = next((line for line in requirements if requirement_name(line) == "torch"), "torch")
    has = image.versions.get("torch")
    if has and not missing_requirements(image, [torch]):
        return PythonChoice("around", f"around the image's torch {has}")
    return PythonChoice("pinned", f"with the pinned torch: the image has {has or 'none'}, and {torch} is needed")


def is_too_old(found: FoundPython) -> bool:
    """The packages that train have left this Python."""
    return version_numbers(found.python) < OLDEST


def build_for(driver: str, capabilities: list[float]) -> str:
    """Folder of PyTorch's index whose torch this driver and these GPUs can run, such as `cu126`; empty for PyPI's own.

    A driver serves every CUDA of its major version: 580 begins 13, 525 began 12. CUDA 12.6's build has kernels for
    compute capability 5.0 to 9.0, 12.9's from 7.5 to 12.0, 13.0's from 7.5. ValueError where none fits.
    """
    branch, oldest, newest = int(driver.split(".")[0]), min(capabilities), max(capabilities)
    if oldest >= 7.5 and branch >= 580:
        return ""
    if branch >= 525 and oldest >= 5.0 and newest <= 9.0:
        return "cu126"
    if branch >= 570 and oldest >= 7.5:
        return "cu129"
    raise ValueError(f"no torch fits the host: NVIDIA driver {driver}, compute capabilities {capabilities}")


def wanted_build(gpus: int) -> str:
    """`build_for` this host, where GPUs are to be used; ValueError where their driver does not answer."""
    if not gpus:
        return ""
    words = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"the host's NVIDIA driver does not respond: {error}") from None
    rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
    try:
        driver, capabilities = rows[0][0].strip(), [float(row[1]) for row in rows]
    except (IndexError, ValueError):
        said = " ".join(f"{done.stdout} {done.stderr}".split()) or f"nvidia-smi ends with {done.returncode}"
        raise ValueError(f"the host's NVIDIA driver does not respond: {said}") from None
    return build_for(driver, capabilities)


def gpu_problem(gpus: int) -> str | None:
    """Return why so many GPUs of this host are unusable, tested without torch; None if they work."""
    try:
        wanted_build(gpus)
        check_gpus_compute(ctypes.CDLL("libcuda.so.1"), gpus)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check_gpus_compute(driver: Any, gpus: int) -> None:
    """Write a number on every GPU and read it back (CUDA's driver API); ValueError in the driver's own words."""

    def do(name: str, *arguments: Any) -> None:
        if code := getattr(driver, name)(*arguments):
            said = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(said))
            words = (said.value or b"unknown").decode(errors="replace")
            raise ValueError(f"the host's GPUs do not compute: {name} fails with {code}, {words}")

    count = ctypes.c_int()
    do("cuInit", 0)
    do("cuDeviceGetCount", ctypes.byref(count))
    if count.value < gpus:
        raise ValueError(f"the host's driver shows {count.value} of {gpus} GPUs")
    for number in range(count.value):
        device, context = ctypes.c_int(), ctypes.c_void_p()
        place, value = ctypes.c_uint64(), ctypes.c_uint32()
        do("cuDeviceGet", ctypes.byref(device), number)
        do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        do("cuCtxSetCurrent", context)
        do("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(4))
        do("cuMemsetD32_v2", place, ctypes.c_uint32(7), ctypes.c_size_t(1))
        do("cuMemcpyDtoH_v2", ctypes.byref(value), place, ctypes.c_size_t(4))
        if value.value != 7:
            raise ValueError(f"GPU {number} of the host does not keep what is written")


def torch_gpu_problem(executable: str, gpus: int) -> str | None:
    """Return why a Python's torch does not compute on so many GPUs; None if it does."""
    if not gpus:
        return None
    done = subprocess.run([executable, "-c", SEES], capture_output=True, text=True, timeout=300)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:] or ["no message"]
    if done.returncode == 0 and int(said[0]) >= gpus:
        return None
    return f"torch sees {said[0]} of {gpus} GPUs" if done.returncode == 0 else f"torch cannot use the GPUs: {said[0]}"


def flash_attn_problem(executable: str) -> str | None:
    """Return why a Python's flash-attn is unusable, such as a wheel for another torch or C++ ABI."""
    done = subprocess.run(
        [executable, "-c", "import torch, flash_attn_2_cuda"], capture_output=True, text=True, timeout=300
    )
    said = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return None if done.returncode == 0 else f"flash-attn does not load: {said[0]}"


def flash_attn_wheel(wheels: list[dict[str, Any]], python: str, torch: str, build: str) -> str:
    """Address of the wheel of flash-attn for a Python and a torch of that folder of PyTorch's index; ValueError."""
    for wheel in wheels:
        same = version_numbers(wheel["torch"]) == version_numbers(torch)[:2] and wheel["python"] == python
        if same and wheel["build"] == build:
            return str(wheel["url"])
    raise ValueError(f"no wheel of flash-attn is known for Python {python} and torch {torch} {build}".rstrip())


def flash_attn_requirements(order: dict[str, Any], choice: PythonChoice, image: FoundPython, build: str) -> list[str]:
    """Return the requirements that add flash-attn: none if it is not requested, or the image has it."""
    wanted = any(requirement_name(line) == FLASH for line in order["requirements"])
    if not wanted or choice.how not in ("around", "pinned") or (choice.how == "around" and FLASH in image.versions):
        return []
    pinned = re.search(r"(?m)^torch==([\w.]+)", order["constraints"])
    torch = image.versions["torch"] if choice.how == "around" else pinned[1] if pinned else ""
    if choice.how == "around":  # PyPI's own says nothing, and is for CUDA 13.0
        build = torch.partition("+")[2].replace("cu130", "")
    python = INSTEAD if is_too_old(image) else image.python
    return [f"{FLASH} @ {flash_attn_wheel(order.get('flash_attn') or [], python, torch, build)}"]


def pins_for_build(constraints: str, build: str) -> str:
    """The pins with torch's for that folder of PyTorch's index."""
    return re.sub(r"(?m)^(torch==[\w.]+)$", rf"\1+{build}", constraints) if build else constraints


def pins_without_torch(constraints: str, version: str) -> str:
    """The pins, with the image's torch in place of theirs and none for what it brings."""
    tied = re.compile(r"^(torch|torchvision|torchaudio|triton|nvidia-[\w-]+)\b", re.IGNORECASE)
    kept = [line for line in constraints.splitlines() if not tied.match(line)]
    return "\n".join([*kept, f"torch=={version}", ""])


def probe_python(executable: str, requirements: list[str]) -> FoundPython | None:
    """Return the packages of a Python; None if it does not run."""
    names = json.dumps([requirement_name(line) for line in requirements])
    try:
        done = subprocess.run([executable, "-c", PROBE, names], capture_output=True, text=True, timeout=120)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return FoundPython(executable, answer["python"], answer["versions"])


def make_environment(
    folder: Path,
    choice: PythonChoice,
    image: FoundPython,
    order: dict[str, Any],
    build: str = "",
    alone: list[str] | None = None,
) -> str:
    """The Python of an environment in `folder`; made whole or not at all. CalledProcessError if a step fails,
    ValueError where no Python is new enough. `alone`: packages whose own requirements are not wanted."""
    python = str(folder / "bin" / "python")
    if (folder / "COMPLETE").exists():
        log_line(f"the environment is there already: {folder}")
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    around = choice.how == "around"
    pins = folder.parent / f"{folder.name}.txt"
    pins.write_text(
        pins_without_torch(order["constraints"], image.versions["torch"])
        if around
        else pins_for_build(order["constraints"], build),
        "utf-8",
    )
    site = ["--system-site-packages"] if around else []
    uv = _uv(image.executable)
    if uv:
        _do([uv, "venv", "--python", INSTEAD if is_too_old(image) else image.executable, *site, str(folder)])
        install = [uv, "pip", "install", "--python", python]
    elif is_too_old(image):
        raise ValueError(
            f"the image's Python is {image.python}, {OLDEST[0]}.{OLDEST[1]} is needed, and uv is not there"
        )
    else:
        _do([image.executable, "-m", "venv", *site, str(folder)])
        install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if build and not around:  # that index has old versions of other packages, too, which uv would be content with
        install += ["--extra-index-url", f"{INDEX}/{build}", *(["--index-strategy", "unsafe-best-match"] if uv else [])]
    _do([*install, "-c", str(pins), *(line for line in order["requirements"] if requirement_name(line) != FLASH)])
    if alone:
        _do([*install, "--no-deps", *alone])
    (folder / "COMPLETE").touch()
    return python


def _uv(python: str) -> str | None:
    """uv, which is ten times as fast as pip; installed by pip where it is not there."""
    if found := shutil.which("uv"):
        return found
    subprocess.run([python, "-m", "pip", "install", "-q", "uv"], check=False, stdin=subprocess.DEVNULL)
    return shutil.which("uv")


def _do(command: list[str]) -> None:
    log_line("$ " + " ".join(command))
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": ""})


def log_line(line: str) -> None:
    """One line for the log."""
    print(line, flush=True)


def main(folder: Path) -> int:
    """Decide, make, leave word."""
    order = json.loads((folder / "install-order.json").read_text("utf-8"))
    needed = [*order["requirements"], *order["alone"]]
    given = None
    if order.get("python"):
        given = probe_python(order["python"], needed)
        if given is None:
            log_line(f"{order['python']}, which RUNNER_POD_PYTHON names, does not run in the pod")
            return 1
    image = probe_python(order.get("image_python") or shutil.which("python3") or sys.executable, needed)
    if image is None:
        log_line("the image has no Python")
        return 1
    gpus = int(order.get("gpus") or 0)
    try:
        build = "" if given else wanted_build(gpus)
        has_torch = given is None and not missing_requirements(
            image, [line for line in needed if requirement_name(line) == "torch"]
        )
        if has_torch and (reason := torch_gpu_problem(image.executable, gpus)):
            log_line(f"the image's {reason}")
            image = replace(image, versions={k: v for k, v in image.versions.items() if k != "torch"})
        choice = choose_python(given, image, needed)
        log_line(f"trains with {choice.how}: {choice.why}")
        python = (given or image).executable
        if choice.how in ("around", "pinned"):
            torch = image.versions.get("torch", "") if choice.how == "around" else ""
            flash = flash_attn_requirements(order, choice, image, build)
            key = json.dumps(
                [choice.how, image.python, torch, needed, order["constraints"], *([build] if build else []), *flash]
            )
            name = f"env-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            python = make_environment(
                Path(order["environments"]) / name, choice, image, order, build, [*order["alone"], *flash]
            )
        if given is None and (reason := torch_gpu_problem(python, gpus)):
            raise ValueError(reason)
        if FLASH in map(requirement_name, needed) and (reason := flash_attn_problem(python)):
            raise ValueError(reason)
    except ValueError as error:
        log_line(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    found = probe_python(python, needed)
    version = found.versions.get("torch") if found else None
    answer = {"python": python, "how": choice.how, "why": choice.why, "torch": version}
    (folder / "install.json").write_text(json.dumps(answer), "utf-8")
    return 0


def check_gpus(gpus: int) -> int:
    """`--gpus`: the exit code."""
    reason = gpu_problem(gpus)
    if reason:
        log_line(reason)
    return REFUSED if reason else 0


if __name__ == "__main__":
    if sys.argv[1] == "--gpus":
        sys.exit(check_gpus(int(sys.argv[2])))
    sys.exit(main(Path(sys.argv[1]).absolute()))
