"""What each objective learns: the real SmolLM2 with LoRA on this CPU, measured on held-out rows before and after."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, say, table
from runner.config import conf_files
from runner.data import commands_dataset
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

HELD_OUT = 40
QUESTIONS = 30
"""Held-out questions of GRPO: of 60 held-out sentences 15 name no hardware, and as many are taken that do."""
SYSTEM = "Answer with the command only."
YES_OR_NO = "Is hardware named? Answer yes or no."
SHARED = ("model=smollm2_135m", "method=lora", "hw=cpu", "train.precision=bf16", "data=file", "eval.num_prompts=0")
# Rates of conf/objective/ are those of the papers, for 7B; LoRA on SmolLM2 learns words at 1e-3.
PAIRS = (
    f"data.system_prompt='{SYSTEM}'", "train.max_length=128", "train.max_steps=30", "train.batch_size=4",
    "train.micro_batch_size=4", "train.learning_rate=5e-4",
)  # fmt: skip
ANSWERS = ("train.batch_size=8", "train.micro_batch_size=8")  # of which half are right: as many tokens as four pairs
WARM_UP = (
    f"data.system_prompt='{YES_OR_NO}'", "train.max_length=80", "train.packing=false", "train.max_steps=30",
    "train.batch_size=16", "train.micro_batch_size=16", "train.learning_rate=1e-3",
)  # fmt: skip
GRPO = (
    f"data.system_prompt='{YES_OR_NO}'", "train.max_length=80", "train.max_steps=40", "train.batch_size=32",
    "train.micro_batch_size=32", "objective.num_generations=4", "objective.max_new_tokens=4",
    "train.learning_rate=1e-4", f"eval.num_prompts={QUESTIONS}", "eval.max_new_tokens=4",
)  # fmt: skip
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo": ("pairs", PAIRS),
    "kto": ("answers", (*PAIRS, *ANSWERS)),
    "orpo": ("pairs", PAIRS),
    "reward": ("pairs", PAIRS),
    "grpo": ("questions", GRPO),
}
"""Rows and settings of each objective."""

EXPLANATION = """\
## Objectives: what each learns in minutes

SmolLM2-135M with LoRA, {precision}, {cores}, on the sentences of the bundled `commands` data. A pair is the correct
command for a sentence and one with another method or other hardware; KTO gets them as single rows. The {held_out}
held-out sentences do not occur in the training rows and ask for combinations that the training rows do not contain.

GRPO learns whether a sentence names hardware. The reward is 1 for exactly the correct one of `yes` and `no`, else 0.
The base model never answers that way and would learn nothing, so the run starts from {warm_up} supervised steps whose
answers are correct, but two times out of three spelled `Yes.` or `No.`; the required spelling is learned from the
reward alone.
{warmed}
"""
WARMED = """\
Those steps took {warm_up_seconds:.0f} s, which are not in the table. The {questions} held-out questions, half with
and half without hardware, share no sentence and no command with the training rows of either stage.
"""
ORDER = """\
DPO and KTO measure relative to the base model, so their margin starts at 0. The next table measures all with the
saved adapter in plain peft: the share of held-out pairs in which the correct command is more likely, and the mean
difference of log-probabilities.
"""


def pairs(rows: Iterable[commands_dataset.Row], seed: int) -> Iterator[dict[str, str]]:
    """The right command, and one with another method or other hardware."""
    rng = random.Random(seed)
    known = {"method": conf_files.options("method"), "hw": sorted(dict(commands_dataset.spoken_hardware(1000)))}
    for row in rows:
        words = row["completion"].split()
        at = rng.randrange(4, len(words))  # python -m runner model=… method=… hw=…
        group, _, right = words[at].partition("=")
        words[at] = f"{group}={rng.choice([name for name in known[group] if name != right])}"
        yield {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(words)}


def judged(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """The commands of a pair one by one."""
    for row in rows:
        for name in ("chosen", "rejected"):
            yield {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}


def questions(rows: Iterable[commands_dataset.Row]) -> list[dict[str, str]]:
    """Whether a sentence names hardware: as many that do as that do not, in turns."""
    asked: dict[str, list[str]] = {"yes": [], "no": []}
    for row in rows:
        asked["yes" if " hw=" in row["completion"] else "no"].append(row["prompt"])
    return [
        {"prompt": prompt, "answer": answer}
        for both in zip(*asked.values(), strict=False)
        for prompt, answer in zip(both, asked, strict=True)
    ]


def spellings(rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """The right answers, one in three as the reward wants them."""
    for number, row in enumerate(rows):
        answer = row["answer"] if number // 2 % 3 == 0 else f"{row['answer'].capitalize()}."
        yield {"prompt": row["prompt"], "completion": answer}


def write_rows(folder: Path) -> list[dict[str, str]]:
    """All files of rows; the held-out pairs."""
    train, held = commands_dataset.examples(count_eval=HELD_OUT)
    known = {commands_dataset.key_of(row["prompt"]) for row in train}
    assert not any(commands_dataset.key_of(row["prompt"]) in known for row in held)
    for end, rows, seed in (("", train, 1), ("_held_out", held, 2)):
        both = list(pairs(rows, seed))
        _write(folder / f"pairs{end}.jsonl", both)
        _write(folder / f"answers{end}.jsonl", judged(both))
    train, held = commands_dataset.examples(count_eval=2 * QUESTIONS)
    commands = {row["completion"] for row in train}
    assert not any(row["completion"] in commands for row in held)
    for end, asked in (("", questions(train)), ("_held_out", questions(held)[:QUESTIONS])):
        _write(folder / f"questions{end}.jsonl", asked)
        _write(folder / f"spellings{end}.jsonl", spellings(asked[:8] if end else asked))
    return both


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--only`, `--folder`, `--with`."""
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS])
    parser.add_argument("--folder", type=Path, help="keep the runs here; one that is there is not made again")
    parser.add_argument("--with", nargs="+", default=[], dest="extra", metavar="KEY=VALUE", help="change every run")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run for each objective, by the command line, and what it says of its held-out rows."""
    with tempfile.TemporaryDirectory(prefix="runner-objectives-") as name:
        folder = (options.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        held = write_rows(folder)
        measured: dict[str, Any] = {"held_out": len(held), "runs": {}}
        for objective in options.only:
            rows, words = RUNS[objective]
            if objective == "grpo":
                words = (*words, "model=hub", f"model.id={_warm_up(folder, options.extra)}")
            run = _train(folder, objective, rows, (f"objective={objective}", *words, *options.extra))
            measured["runs"][objective] = _facts(run)
            if objective in ("dpo", "kto", "orpo"):
                measured["runs"][objective]["order"] = _order(run, held)
        spec = RunSpec.model_validate(run.read("spec.json"))
        warm = [RunDir(file.parent).read("summary.json") for file in folder.glob("runs/warm_up/*/summary.json")]
    if warm:
        measured |= {"warm_up_seconds": warm[0]["seconds"], "questions": QUESTIONS}
    return measured | {"precision": spec.train.precision, "cores": spec.hw.num_cpus, "warm_up": _steps(WARM_UP)}


def _warm_up(folder: Path, extra: Sequence[str]) -> Path:
    """A model whose answers are mostly not spelled as they are wanted: a merged folder."""
    run = _train(folder, "warm_up", "spellings", (*WARM_UP, *extra))
    target = folder / "warm"
    if not target.exists():
        _runner("merge", str(run.path), "--out", str(target))
    return target


def _train(folder: Path, name: str, rows: str, words: Sequence[str]) -> RunDir:
    say(f"objectives: {name}")
    runs = folder / "runs" / name
    if not list(runs.glob("*/summary.json")):
        files = (f"data.path={folder / rows}.jsonl", f"data.eval_path={folder / rows}_held_out.jsonl")
        _runner(*SHARED, *files, f"run.output_dir={runs}", *words)
    (summary,) = runs.glob("*/summary.json")
    return RunDir(summary.parent)


def _runner(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "runner", *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def _steps(words: Sequence[str]) -> int:
    return int(next(word for word in words if word.startswith("train.max_steps=")).partition("=")[2])


def _facts(run: RunDir) -> dict[str, Any]:
    summary, spec = run.read("summary.json"), RunSpec.model_validate(run.read("spec.json"))
    return {
        "steps": summary["train"]["steps"],
        "batch_size": spec.train.batch_size,
        "learning_rate": spec.train.learning_rate,
        "before": summary["eval"]["before"],
        "after": summary["eval"]["after"],
        "seconds": summary["seconds"],
        "train_seconds": summary["train"]["seconds"],
        "peak_gib": summary["peak_memory_gib"],
    }


def _order(run: RunDir, held: Sequence[Mapping[str, str]]) -> dict[str, list[float]]:
    """Log-probability of the right command less that of the wrong one, for every held-out pair: [before, after]."""
    import torch

    from runner.data.chat_tokenizer import ChatTokenizer
    from runner.data.tokenize_rows import split_prompt
    from runner.train import open_model

    spec = RunSpec.model_validate(run.read("spec.json"))
    torch.set_num_threads(spec.hw.num_cpus or 1)
    model, tokenizer = open_model.load_finished(spec, run)
    model.eval()
    words = ChatTokenizer.of(tokenizer)

    def likely(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())

    def differences() -> list[float]:
        found = []
        for row in held:
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
            answers = [[{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")]
            prompt, (right, wrong) = split_prompt(words, turns, answers)  # type: ignore[arg-type]  # turns are dicts
            found.append(round(likely(prompt, right) - likely(prompt, wrong), 3))
        return found

    with model.disable_adapter():
        before = differences()
    return {"before": before, "after": differences()}


def section(measured: dict[str, Any]) -> str:
    """Explanation and tables."""
    cores = f"{measured['cores']} thread" + ("s" if measured["cores"] > 1 else "")
    warmed = WARMED.format(**measured) if "warm_up_seconds" in measured else ""
    return "\n".join(
        [
            EXPLANATION.format(**measured | {"cores": cores, "warmed": warmed}).rstrip() + "\n",
            table(
                ["objective", "steps × rows", "learning rate", "held out", "before", "after", "seconds", "peak GiB"],
                [_row(name, run) for name, run in measured["runs"].items()],
            ),
            "",
            ORDER,
            table(
                ["", "likelier before", "after", "by, before", "after"],
                [_ordered(name, run["order"]) for name, run in measured["runs"].items() if "order" in run],
            ),
        ]
    )


def _row(name: str, run: dict[str, Any]) -> list[str]:
    what = [key for key in ("reward_margin", "reward_accuracy", "reward_exact_match") if key in run["after"]]
    called = {"reward_margin": "margin", "reward_accuracy": "in order", "reward_exact_match": "exact"}
    before, after = (" / ".join(_shown(key, run[when][key]) for key in what) for when in ("before", "after"))
    size = f"{run['steps']} × {run['batch_size']}"
    names = " / ".join(called[key] for key in what)
    return [
        name, size, f"{run['learning_rate']:g}", names, before, f"**{after}**", f"{run['seconds']:.0f}",
        f"{run['peak_gib']:.1f}",
    ]  # fmt: skip


def _shown(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "reward_margin" else f"{value:.0%}"


def _ordered(name: str, order: dict[str, list[float]]) -> list[str]:
    shares = [f"{sum(d > 0 for d in order[when]) / len(order[when]):.0%}" for when in ("before", "after")]
    means = [f"{sum(order[when]) / len(order[when]):.1f}" for when in ("before", "after")]
    return [name, shares[0], f"**{shares[1]}**", means[0], means[1]]


BENCHMARK = Benchmark(
    "objectives",
    add_options,
    measure,
    section,
    measures=("runner/train/objectives", "runner/train/trainers"),
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
