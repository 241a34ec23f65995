"""The same work by this project and by LLaMA-Factory, taking turns on this machine.

LLaMA-Factory gets an environment of its own under the cache (2.5 GB, pinned, made once). No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import yaml

from benchmarks.attention import common_words
from benchmarks.bench import ROOT, Benchmark, alone, say, table
from runner.config.conf_files import load_choice
from runner.paths import cache_dir
from runner.rundir.directory import RunDir
from runner.spec import ModelSpec

PEER, PINNED = "LLaMA-Factory", "llamafactory==0.9.5"
ROUNDS = 3
ROWS, MANY_ROWS, SEED = 96, 100_000, 0
WORDS = 70, 0.6
"""Median of an answer's words, and the spread of its logarithm."""
BATCH, LENGTH, RANK = 4, 1024, 8
LIMIT_S = 1800

EXPLANATION = f"""\
## Beside {PEER}

The same model (SmolLM2-135M), the same {ROWS} alpaca rows (answers of {WORDS[0]} words in the median), one epoch of
them, LoRA of rank {RANK} on all linear layers where it is LoRA, batches of {BATCH} rows, {LENGTH} tokens at most, bf16;
{MANY_ROWS:,} such rows where they are only prepared. Whole commands, `{{ours}}` and `llamafactory-cli train FILE`
({PINNED} with its own pins, torch {{torch}}), took turns {{rounds}} times. What is not named here is each
one's default: {PEER} recomputes activations, this project does not on a CPU. Training is the time that each reports for
it, without loading; the others are whole commands. Speeds are of the same rows: a ratio of 2 is half the time. Memory
is the peak of all processes of a command, shared pages counted once.

Preparation misses its target. Of tokenising, a profile gives 37 % to the chat template, which is rendered twice a row
(the conversation, and the prompt as generation will ask for it), 32 % to the tokenizer and 9 % to the masks; {PEER}
writes its own strings instead of the model's template. Rows are read twice, as all are checked before anything starts.
"""


class Contestant(NamedTuple):
    """One command: words for this project, or keys of a file for the peer."""

    name: str
    ours: tuple[str, ...] = ()
    theirs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Work:
    """A piece of work. The first contestant is the one that the others are compared with."""

    title: str
    contestants: tuple[Contestant, ...]
    rows: int = ROWS
    trains: bool = True
    target: Mapping[str, float] | None = None
    """Speed that is aimed at, by contestant, in units of the first one's."""


LORA = {"finetuning_type": "lora", "lora_rank": RANK, "lora_target": "all"}
PADDED = ("train.packing=false", f"train.batch_size={BATCH}", f"train.micro_batch_size={BATCH}")
PACKED = ("train.packing=true", "train.batch_size=1")
WORKS = {
    "typo": Work("a misspelt key is refused", (
        Contestant(PEER, theirs={**LORA, "learning_rat": 1e-4}),
        Contestant("this project", ("method=lora", f"method.rank={RANK}", *PADDED, "train.learning_rat=1e-4")),
    ), trains=False, target={"this project": 18}),
    "lora": Work("LoRA", (
        Contestant(f"{PEER}, its default", theirs=LORA),
        Contestant(f"{PEER}, packed (neat_packing)", theirs={**LORA, "neat_packing": True}),
        Contestant("this project, padded", ("method=lora", f"method.rank={RANK}", *PADDED)),
        Contestant("this project, packed", ("method=lora", f"method.rank={RANK}", *PACKED)),
    ), target={"this project, padded": 1.1, "this project, packed": 2.0}),
    "full": Work("full", (
        Contestant(PEER, theirs={"finetuning_type": "full"}),
        Contestant("this project, padded", ("method=full", *PADDED)),
    )),
    "qlora4": Work("QLoRA, 4 bits", (
        Contestant(PEER, theirs={**LORA, "quantization_bit": 4}),
        Contestant("this project, padded", ("method=qlora4", f"method.rank={RANK}", *PADDED)),
    )),
    "prepare": Work("rows are prepared", (
        Contestant(PEER, theirs={**LORA, "tokenized_path": "prepared", "do_train": False}),
        Contestant("this project", ("method=lora", f"method.rank={RANK}", *PADDED)),
    ), rows=MANY_ROWS, trains=False, target={"this project": 2.0}),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--only`, `--rounds`, `--environment`."""
    parser.add_argument("--only", nargs="+", choices=[*WORKS], default=[*WORKS])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"times that each command runs (default {ROUNDS})")
    parser.add_argument("--environment", type=Path, help=f"a virtual environment that has {PINNED} (default: make one)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and MiB of every command, by work and contestant; what was said by one that failed."""
    environment = options.environment or _environment()
    measured: dict[str, Any] = {"rounds": options.rounds, "torch": version("torch"), "works": {}}
    for name in options.only:
        runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in WORKS[name].contestants}
        for number in range(options.rounds):
            for one in WORKS[name].contestants:
                with tempfile.TemporaryDirectory(prefix="runner-benchmark-") as folder:
                    found = _run(WORKS[name], one, name, Path(folder), environment)
                say(f"peers: {name}, {one.name}, {number + 1} of {options.rounds}: {found}")
                runs[one.name].append(found)
        measured["works"][name] = runs
    return measured


def _environment() -> Path:
    """A virtual environment with the peer; made once."""
    folder = cache_dir() / "peers" / PINNED
    if not (folder / "made").is_file():
        say(f"peers: installing {PINNED} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        wanted = [PINNED, torch, f"bitsandbytes=={version('bitsandbytes')}"]
        pip = folder / "bin" / "pip"
        subprocess.run([pip, "install", "-q", *wanted], check=True)
        # The index builds these two for CUDA: beside a CPU build of torch neither can be imported. The peer asks
        # whether torchvision is there; it imports torchaudio without asking, and uses it for sound alone.
        subprocess.run([pip, "uninstall", "-q", "-y", "torchvision", "torchaudio"], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torchaudio").mkdir()
        (site / "torchaudio" / "__init__.py").touch()
        (folder / "made").touch()
    return folder


def rows_file(path: Path, count: int) -> Path:
    """Write alpaca rows, the same every time."""
    draw, words = random.Random(SEED), common_words()
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            length = min(500, max(5, round(draw.lognormvariate(0, WORDS[1]) * WORDS[0])))
            asked, answer = (" ".join(draw.choice(words) for _ in range(n)) for n in (12, length))
            out.write(json.dumps({"instruction": asked, "input": "", "output": answer}) + "\n")
    return path


def _run(work: Work, one: Contestant, name: str, folder: Path, environment: Path) -> dict[str, Any]:
    """One command: its seconds, those of the training it reports, its peak in MiB."""
    rows = rows_file(folder / "rows.jsonl", work.rows)
    env = {**os.environ, "RUNNER_CACHE": str(cache_dir()), "HF_HUB_OFFLINE": "1"}
    if one.theirs is None:
        verb = ("data", "prepare") if name == "prepare" else ()
        words = (*verb, "data=file", f"data.path={rows}", "data.eval_fraction=0", "hw=cpu", "eval.num_prompts=0",
                 "train.num_epochs=1", f"train.max_length={LENGTH}", f"run.output_dir={folder}/runs")  # fmt: skip
        if name == "prepare":
            env["RUNNER_CACHE"] = str(_emptied_cache(folder))
        command = [sys.executable, "-m", "runner", *words, *one.ours]
    else:
        command = [
            str(environment / "bin" / "llamafactory-cli"),
            "train",
            str(_keys(one.theirs, folder, rows, _model())),
        ]
        env["HF_DATASETS_CACHE"] = str(folder / "datasets")
    code, seconds, mib, said = _watched(command, folder if one.theirs else ROOT, env)
    found: dict[str, Any] = {"seconds": round(seconds, 3), "mib": round(mib)}
    if (code == 0) == (name == "typo"):
        return found | {"failed": " ".join(said.split()[-60:])}
    if work.trains:
        found["training"] = round(_training(folder, one), 3)
    return found


def _emptied_cache(folder: Path) -> Path:
    """A cache that has the demo model and no prepared rows."""
    cache = folder / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(cache_dir() / "models")
    return cache


def _keys(theirs: Mapping[str, Any], folder: Path, rows: Path, model: Path) -> Path:
    """The peer's file, as its own examples are written."""
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": rows.name}}), "utf-8")
    keys = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "dataset": "rows",
        "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": LENGTH, "output_dir": str(folder / "out"),
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "bf16": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "learning_rate": 2e-4,
    } | dict(theirs)  # fmt: skip
    file = folder / "peer.yaml"
    file.write_text(yaml.safe_dump(keys), "utf-8")
    return file


def _model() -> Path:
    from runner.train import model_loading

    return Path(model_loading.source_of(ModelSpec(**load_choice("model", "smollm2_135m"))))


def _watched(command: list[str], cwd: Path, env: Mapping[str, str]) -> tuple[int, float, float, str]:
    """Exit code, seconds, peak MiB of the whole family, and what it said."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        peak, family = 0.0, psutil.Process(process.pid)
        while process.poll() is None and time.monotonic() - began < LIMIT_S:
            peak = max(peak, _mib(family))
            time.sleep(0.05)
        seconds = time.monotonic() - began
        process.kill()
        process.wait()
        said.seek(0)
        return process.returncode, seconds, peak, said.read().decode(errors="replace")


def _mib(family: psutil.Process) -> float:
    """Proportional set size: a page that n processes share counts as 1/n of it in each."""
    total = 0
    with suppress(psutil.Error):  # it has ended meanwhile
        for one in (family, *family.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total / 2**20


def _training(folder: Path, one: Contestant) -> float:
    """Seconds of the training alone, as the contestant itself says."""
    if one.theirs is None:
        (run,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
        return float(RunDir(run).summary["train"]["seconds"])
    return float(json.loads((folder / "out" / "train_results.json").read_text("utf-8"))["train_runtime"])


def section(measured: dict[str, Any]) -> str:
    """A row for each contestant of each work."""
    head = ["", "s, whole command", "s, training", "rows/s", "speed, ratio", "target", "peak MiB"]
    body = [line for name, runs in measured["works"].items() for line in _lines(WORKS[name], runs)]
    said = EXPLANATION.format(ours="python -m runner …", torch=measured["torch"], rounds=measured["rounds"])
    return said + "\n" + table(head, body)


def _lines(work: Work, runs: Mapping[str, list[dict[str, Any]]]) -> list[list[str]]:
    key = "training" if work.trains else "seconds"
    base: float | None = None
    found = []
    for one in work.contestants:
        name = f"{work.title}: {one.name}"
        if failed := next((run["failed"] for run in runs[one.name] if "failed" in run), None):
            found.append([f"{name}: failed (`{failed[-80:]}`)", *[""] * 6])
            continue
        whole, timed, mib = (median(run[k] for run in runs[one.name]) for k in ("seconds", key, "mib"))
        base = base or timed
        target = (work.target or {}).get(one.name)
        found.append([
            name, f"{whole:.2f}", f"{timed:.1f}" if work.trains else "",
            f"{work.rows / timed:,.1f}" if work.trains or work.rows > ROWS else "",
            "1" if one is work.contestants[0] else f"**{base / timed:.2f}**", f"{target}" if target else "",
            f"{mib:,.0f}",
        ])  # fmt: skip
    return found


MEASURES = ("runner/train", "runner/data")
BENCHMARK = Benchmark("peers", add_options, measure, section, measures=MEASURES)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
