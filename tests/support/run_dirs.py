"""Run directories without a training: the files of a run as docs/reference.md has them."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any, cast

from runner.rundir.directory import RunDir, facts_of
from runner.spec import RunSpec

ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


def run_dir(
    spec: RunSpec, folder: Path, *, steps: int = 60, state: str = "done", seed: int = 1, loss: float = 0.4,
    hostile: str = "", **status: Any,
) -> RunDir:  # fmt: skip
    """A run of `steps` steps in `folder`; `hostile` is put into its rows, answers, log and error."""
    run = RunDir.create(spec.model_copy(update={"run": spec.run.model_copy(update={"output_dir": str(folder)})}))
    say = random.Random(seed)
    began = time.time() - steps
    with (run.path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            share = step / steps
            line = {
                "step": step,
                "epoch": share * 3,
                "loss": (4.2 - loss) * math.exp(-5 * share) + loss + say.gauss(0, 0.12) * math.exp(-share),
                "grad_norm": 1.5 + say.expovariate(1.2),
                "learning_rate": 1e-3 * min(1, share / 0.05) * 0.5 * (1 + math.cos(math.pi * share)),
                "tokens_per_second": 540 + say.gauss(0, 25),
                "memory_gib": 2.1 + 0.05 * share,
                "time": began + step,
            }
            file.write(json.dumps(line) + "\n")
    held = [
        {"step": s, "loss": 4.4 * math.exp(-5 * s / steps) + loss + 0.1, "time": began}
        for s in range(0, steps + 1, max(1, steps // 6))
    ]
    (run.path / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held), "utf-8")
    for when in ("before", "after"):
        rows = [
            {
                "prompt": f"Fine-tune Mistral 7B with 4-bit QLoRA on {n} H100s. {hostile}",
                "expected": f"python -m runner model=mistral7b method=qlora4 hw=h100 hw.num_gpus={n}",
                "answer": f"python -m runner model=mistral7b method=qlora4 hw=h100 hw.num_gpus={n}"
                if when == "after" and n != 3
                else f"To fine-tune Mistral on {n} GPUs, you can use the following command: {hostile}",
                "stopped": True,
                "exact": when == "after" and n != 3,
            }
            for n in range(1, 7)
        ]
        (run.path / f"answers_{when}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    counts = {"examples": 1568, "tokens": 69512, "sequences": 73, "packing_efficiency": 0.93, "held_out_examples": 40}
    machine = {"runner": "1.0", "python": "3.11.2", "packages": {"torch": "2.13.0", "trl": "1.16.0"}, "gpus": []}
    source = f"HuggingFaceTB/SmolLM2-135M {hostile}"
    run.write("environment.json", {**machine, "model_source": source, "data_fingerprint": "4f2ac91b", "data": counts})
    (run.path / "logs" / "run.log").write_text(f"Training …\n  {steps}/{steps}  loss {loss}\n{hostile}\n", "utf-8")
    run.write("origins.json", {"typed": ["recipe=smollm2_quick"], "places": {}})
    facts: dict[str, Any] = {**facts_of(spec), "exit_code": 0 if state == "done" else 1, **status}
    run.set_status(cast(Any, state), num_steps=steps, started=began, **facts)
    if state == "done":
        run.write("summary.json", summary(run, steps, loss))
    return run


SUMMARY: dict[str, Any] = json.loads("""{
    "state": "done", "exit_code": 0, "model": "smollm2_135m", "method": "lora", "objective": "sft", "hw": "local",
    "data": "commands",
    "train": {
        "loss_first": 4.2, "examples": 1568, "tokens": 69512, "tokens_per_second": 575.0,
        "effective_tokens_per_second": 535.0, "seconds": 131.0,
        "trainable_parameters": 4884480, "total_parameters": 139399488
    },
    "eval": {
        "num_prompts": 6,
        "before": {
            "loss": 4.6317, "perplexity": 102.7, "exact_match": 0.0, "num_exact": 0, "num_prompts": 6, "num_endless": 4
        },
        "after": {"perplexity": 1.65, "exact_match": 0.8333, "num_exact": 5, "num_prompts": 6, "num_endless": 0}
    },
    "seconds": 177.4, "peak_memory_gib": 2.2,
    "plan": {
        "device": "CPU",
        "peak_gib": {"predicted": 2.1, "measured": 2.2, "error": -0.0455, "low": 1.9, "high": 2.6},
        "phases": {
            "load": {"predicted": 0.9, "measured": 1.0, "error": -0.1},
            "eval": {"predicted": 1.6, "measured": 1.5, "error": 0.0667},
            "train": {"predicted": 2.1, "measured": 2.2, "error": -0.0455},
            "save": {"predicted": 1.2, "measured": 1.3, "error": -0.0769}
        },
        "tokens_per_second": {"predicted": 410.0, "measured": 575.0, "error": -0.287},
        "seconds": {"predicted": 243.0, "measured": 182.0, "error": 0.335}
    }
}""")


def summary(run: RunDir, steps: int, loss: float) -> dict[str, Any]:
    """Its `summary.json`."""
    content: dict[str, Any] = {
        **json.loads(json.dumps(SUMMARY)),
        "run_id": run.id,
        "model_dir": str(run.path / "model"),
    }
    content["train"] |= {"loss_last": loss, "steps": steps}
    content["eval"]["after"]["loss"] = loss + 0.1
    return content
