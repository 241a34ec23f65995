"""`python -m runner.train.chat_process spec.json`: answers questions, a JSON line each, as they are generated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from transformers import TextStreamer

from runner.data.chat_tokenizer import ChatTokenizer
from runner.errors import RunnerError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import open_model, stop_tokens
from runner.train.__main__ import quiet_libraries
from runner.train.trainers.trainer_settings import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Pieces(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Writes text to a stream as JSON lines, when a word is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer."""
        if text:
            tell(self.out, {"text": text})


def tell(out: TextIO, said: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(said), file=out, flush=True)


class Models:
    """One model in memory: an adapter and its base are the same one, with the adapter on or off."""

    def __init__(self, spec: RunSpec, run: RunDir) -> None:
        self.spec, self.run, self.both = spec, run, spec.method.adapts
        self._side: str | None = None
        self._loaded: Any = None

    def of(self, side: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model of a side; another one is dropped first."""
        tuned = side == "tuned" or (self.both and (self.run.path / "model").is_dir())
        wanted = "tuned" if tuned else "base"
        if self._side != wanted:
            self._loaded = None
            self._loaded = open_model.load_finished(self.spec, self.run, base=not tuned)
            self._side = wanted
            self._loaded[0].eval()
        model, tokenizer = self._loaded
        return model, tokenizer


def answer(models: Models, question: dict[str, Any], out: TextIO) -> None:
    """Generate one answer to `{"side", "prompt", "max_new_tokens", "temperature"}`, piece by piece."""
    spec = models.spec
    model, tokenizer = models.of(question["side"])
    words = ChatTokenizer.of(tokenizer)
    system = [{"role": "system", "content": spec.data.system_prompt}] if spec.data.system_prompt else []
    turns: Any = [*system, {"role": "user", "content": question["prompt"]}]
    (ids,) = words.token_ids([words.prompt_text(turns)])
    batch = torch.tensor([ids], device=model.device)
    warm = question["temperature"] > 0
    settings: dict[str, Any] = {"do_sample": warm, **({"temperature": question["temperature"]} if warm else {})}
    stops = list(stop_tokens.stop_ids(getattr(model, "generation_config", None), tokenizer))
    off = (
        model.disable_adapter
        if question["side"] == "base" and models.both and hasattr(model, "disable_adapter")
        else None
    )
    with torch.inference_mode(), autocast(spec):
        generate = {
            "input_ids": batch, "attention_mask": torch.ones_like(batch), "max_new_tokens": question["max_new_tokens"],
            "streamer": Pieces(tokenizer, out), "eos_token_id": stops or None, "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }  # fmt: skip
        if off is None:
            output = model.generate(**generate)
        else:
            with off():
                output = model.generate(**generate)
    tell(out, {"done": True, "tokens": int(output.shape[1] - batch.shape[1])})


def main() -> int:
    """Answer every line of standard input until it ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the lines
    run = RunDir(Path(sys.argv[1]).resolve().parent)
    quiet_libraries(run.path / "logs" / "chat.log")
    models: Models | None = None
    for line in sys.stdin:
        try:
            models = models or Models(open_model.local_spec(run.spec), run)
            answer(models, json.loads(line), out)
        except RunnerError as error:
            tell(out, {"error": "; ".join(problem.what for problem in error.problems)})
        except Exception as error:  # a chat template that wants another order of turns, memory, a kernel
            tell(out, {"error": (str(error).strip() or type(error).__name__).splitlines()[0]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
