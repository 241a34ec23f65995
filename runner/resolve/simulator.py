"""Simulations of models that the plan's arithmetic does not know, by a process that has torch; kept in the cache."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from runner.errors import Problem, RequestError
from runner.hub.model_config import check_sizes, not_causal
from runner.paths import PACKAGE, cache_dir
from runner.plan.architectures import Traits
from runner.plan.autograd.ops import Setting
from runner.plan.model_shape import LayerShape, Matrix, Shape, add_simulated
from runner.plan.simulation import ANSWER, Facts, Recorded, Stretch
from runner.plan.trainable import Precision, Training
from runner.rundir.directory import write_atomically
from runner.spec import Method, ModelSpec

NEEDED = ("torch", "transformers", "peft", "trl", "accelerate")
"""Packages that a simulation takes; their versions are part of what it is kept under."""
CODE = (
    "train/simulated_step.py", "train/simulated_model.py", "train/step_segments.py", "train/fake_tensors.py",
    "train/varlen_attention.py", "train/varlen_kernels.py", "train/trainable_weights.py", "train/adapter_config.py",
)  # fmt: skip
"""Modules that decide what a simulation shows, likewise."""
LIMIT_S = 900.0
"""Seconds that the simulations of one command may take: the models of the tests take some seconds."""
SAID_AFTER_S, SAID_EVERY_S = 3.0, 10.0
"""Seconds of waiting after which a line on stderr says what is waited for, and between that and the next one."""


class SimulationError(RequestError):
    """A simulation that failed."""

    why = ""


def add(model: ModelSpec, config: Mapping[str, object], source: str, unknown: RequestError) -> None:
    """Let the plan simulate a model. RequestError, with what is `unknown`, where that cannot be done."""
    what = str(unknown)
    check_sizes(config, source)
    if missing := [name for name in NEEDED if _version(name) is None]:
        remedy = f"pip install {' '.join(missing)}: then such a model is simulated. {unknown.problems[0].remedy}"
        raise RequestError(Problem(f"{what}, and {', '.join(missing)} to simulate it is not here", source, remedy))
    try:
        found = simulated_shape(model.name, json.dumps(config, sort_keys=True), source)
    except SimulationError as error:
        remedy = f"correct it, or plan a model of about its sizes: {unknown.problems[0].remedy}"
        raise RequestError(Problem(f"{what}, and cannot be simulated: {error.why}", source, remedy)) from None
    add_simulated(model, found)


@lru_cache
def simulated_shape(name: str, config: str, source: str, process: Process | None = None) -> Shape:
    """The shape of the model that was built: its matrices by layer; what else it has counts with the last norm."""
    simulated = Simulated(name, str(json.loads(config)["model_type"]), config, source, process or _process())
    found = simulated.ask("model")
    kinds = [
        LayerShape(
            tuple(Matrix(n, i, o, b, count=c, linear=is_linear) for n, i, o, b, c, is_linear in one["matrices"]),
            one["other"],
        )
        for one in found["kinds"]
    ]
    layers = tuple(kinds[i] for i in found["layers"])
    known = sum(layer.parameters for layer in layers) + found["embedding"] + found["head"]
    bias = 0 if found["tied"] else found["head"] - found["vocab"] * found["hidden"]
    return Shape(
        traits=Traits(),
        layers=layers,
        hidden_size=found["hidden"],
        intermediate_size=found["inner"],
        num_heads=found["heads"],
        num_kv_heads=found["kv_heads"],
        head_dim=found["head_dim"],
        vocab_size=found["vocab"],
        context_length=found["context"],
        tie_embeddings=found["tied"],
        head_bias=bias > 0,
        position_parameters=found["embedding"] - found["vocab"] * found["hidden"],
        final_norm_parameters=found["total"] - known,
        simulation=simulated,
    )


@dataclass(eq=False)
class Process:
    """`runner.train.simulated_step`, started with the first request that no cache answers."""

    child: subprocess.Popen[str] | None = None
    errors: Any = None
    steps: int = 0
    seconds: float = 0.0
    ran: bool = False
    lines: SimpleQueue[str | None] = field(default_factory=SimpleQueue)
    """What the process prints; None at its end."""
    kind: str = ""
    spent: float = 0.0
    """Seconds that were waited for answers that no cache had."""
    began: float = 0.0
    told: float = 0.0
    late: bool = False
    attention: str | None = None
    """`sdpa` or `eager`, where a step could take no other."""

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer, from the cache where it has been given before."""
        text = json.dumps({"versions": _versions(), "request": request}, sort_keys=True)
        file = cache_dir() / "simulations" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or not what was written
            kept = json.loads(file.read_text("utf-8"))
            if kept["sha256"] == _digest(kept["answer"]):
                return self._counted(kept["answer"])
        self.ran = True
        self.began, self.kind = time.monotonic(), str(json.loads(request["config"]).get("model_type"))
        found = self._asked(request)
        seconds = time.monotonic() - self.began
        self.spent += seconds
        found["seconds"] = round(seconds, 2)
        if not found.pop("transient", False):
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps({"sha256": _digest(found), "answer": found}))
        return self._counted(found)

    def _counted(self, found: dict[str, Any]) -> dict[str, Any]:
        self.seconds += found["seconds"]
        self.steps += "forward" in found
        return found

    def _asked(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.child is None and "error" in (greeting := self._start()):
            return greeting
        assert self.child is not None and self.child.stdin is not None and self.child.stdout is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
        return self._answer()

    def _line(self) -> str | None:
        """The next line, None at the end of the process, which is killed when all takes too long; a wait is told."""
        while True:
            try:
                return self.lines.get(timeout=0.2)
            except Empty:
                spent = self.spent + time.monotonic() - self.began
            if spent > LIMIT_S and self.child is not None:
                self.late = True
                self.child.kill()
            elif spent > max(self.told, SAID_AFTER_S):
                said = f"Simulating {self.kind} for the plan … {spent:.0f} s, {LIMIT_S / 60:.0f} minutes at most"
                print(said, file=sys.stderr, flush=True)
                self.told = spent + SAID_EVERY_S

    def _answer(self) -> dict[str, Any]:
        assert self.child is not None
        while (line := self._line()) is not None:  # libraries print there, too, while they are imported
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        self.child.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:] or [f"exit code {self.child.returncode}"]
        self.child = None
        if self.late:
            kept = "what is finished is kept, and another try goes on from there"
            return {"error": f"it takes longer than {LIMIT_S / 60:.0f} minutes ({kept})", "transient": True}
        return {"error": f"the process that simulates ended: {last[0]}", "transient": True}

    def _start(self) -> dict[str, Any]:
        """Start it without a network and without a GPU, which it has no use for; its first answer."""
        offline = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # as long as the process
        self.child = subprocess.Popen(
            [sys.executable, "-m", "runner.train.simulated_step"], env={**os.environ, **offline}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        atexit.register(self.child.kill)
        self.lines = SimpleQueue()
        Thread(target=_read, args=(self.child.stdout, self.lines), daemon=True).start()
        return self._answer()


def _read(stream: Iterable[str], lines: SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _digest(answer: object) -> str:
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()


@lru_cache
def _process() -> Process:
    """One for this whole process."""
    return Process()


@dataclass(frozen=True, eq=False)
class Simulated:
    """A model that is simulated, and the method that it is bound to."""

    name: str
    model_type: str
    config: str
    source: str
    process: Process
    bound: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """What the process says; RequestError where it fails."""
        found = self.process.ask({"do": do, "config": self.config, "name": self.name, **self.bound, **more})
        if "not_causal" in found:
            raise not_causal(self.model_type, found["not_causal"], self.source)
        if "error" in found:
            what = f"{self.model_type} cannot be simulated: {found['error']}"
            remedy = "plan another method, or a known model of about its sizes"
            failed = SimulationError(Problem(what, self.source, remedy))
            failed.why = found["error"]
            raise failed
        return found

    def applied(self, made: Training, method: Method, precision: Precision, *, deepspeed: bool) -> Training:
        """The training with the values that the model really trains, its shape bound to the method."""
        if method.packed:
            weights = made.frozen_bytes / 2**30
            what = (
                f"{method.kind} of {self.model_type} cannot be simulated, as bitsandbytes has no kernels for fakes: "
                f"its weights take {weights:.1f} GiB at most, what a step keeps beside them is not known"
            )
            raise RequestError(Problem(what, "method", "plan method=lora: its weights take 16 bits"))
        bound = {"method": method.model_dump(mode="json"), "precision": precision, "deepspeed": deepspeed}
        simulated = replace(self, bound=bound)
        found = simulated.ask("method")
        weights = made.adapter_weights if made.adapter == found["adapter"] else found["adapter"]
        return replace(
            made,
            shape=replace(made.shape, simulation=simulated),
            base_trained=found["base_trained"],
            adapter=found["adapter"],
            adapter_weights=weights,
            adapter_width=found["adapter_width"] or made.adapter_width,
            frozen_bytes=float(found["frozen_bytes"]),
        )

    def record(
        self, setting: Setting, layers: Sequence[int], again: Sequence[bool], *, held: bool, quiet: bool
    ) -> Recorded:
        """A step of those layers."""
        if setting.head == "number":
            what = f"{self.model_type} with a head of one number cannot be simulated"
            raise RequestError(Problem(what, self.source, "plan it with objective=sft: it takes a little more"))
        found = self.ask(
            "step", layers=list(layers), again=list(again), held=held, quiet=quiet, b=setting.b, s=setting.s,
            attention=setting.attention, head=setting.head, labelled=setting.labelled,
        )  # fmt: skip
        if found["attention"] in ("sdpa", "eager") and setting.attention in ("flash", "blockwise"):
            self.process.attention = found["attention"]
        nothing = (0.0, 0.0, 0.0, 0.0)
        forget = tuple(Stretch(index, nothing, tuple(kept), 0.0) for index, kept in found["forget"])
        return Recorded(_stretches(found["forward"]), forget, _stretches(found["backward"]))

    def facts(self) -> Facts:
        """For the plan."""
        process = self.process
        versions = {name: _version(name) or "" for name in ("torch", "transformers")}
        return Facts(
            self.model_type, versions, process.steps, round(process.seconds, 1), not process.ran, process.attention
        )


def _stretches(found: Sequence[Mapping[str, Any]]) -> tuple[Stretch, ...]:
    return tuple(Stretch(one["index"], tuple(one["at_peak"]), tuple(one["kept"]), one["flops"]) for one in found)


@lru_cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@lru_cache
def _versions() -> dict[str, str | None]:
    """Versions of the packages, and of the code that simulates."""
    code = {name: hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() for name in CODE}
    return {name: _version(name) for name in NEEDED} | code
