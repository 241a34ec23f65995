"""`python -m runner.train.chat spec.json`: answers with a run's model, one-shot or in a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from runner.data.examples import Turn
from runner.errors import Problem, RunFailedError, RunnerError
from runner.report import terminal
from runner.report.text import print_problems
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train.__main__ import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main() -> int:
    """Load once, then answer `--prompt`, or every line that is typed."""
    options = _options()
    run = RunDir(options.spec.resolve().parent)
    spec = run.spec
    terminal.guard()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between a script and its JSON
    quiet_libraries(run.path / "logs" / "rank0.log")
    console = Console(stderr=True)
    try:
        from runner.train import open_model

        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        spec = open_model.local_spec(spec, say)
        with console.status("Loading the model …"):
            model, tokenizer = open_model.load_finished(spec, run, base=options.base)
    except RunnerError as error:
        print_problems(console, error)
        return error.exit_code
    system: list[Turn] = [{"role": "system", "content": spec.data.system_prompt}] if spec.data.system_prompt else []
    if options.prompt is not None:
        try:
            text = answer(spec, model, tokenizer, [*system, _user(options.prompt)], options.max_new_tokens)
        except RunnerError as error:
            print_problems(console, error)
            return error.exit_code
        reply = {"prompt": options.prompt, "answer": text}
        print(json.dumps(reply, ensure_ascii=False) if options.json else text, file=out)
        return 0
    console.print("Type a prompt; [bold]/new[/bold] starts over, Ctrl-D ends.", highlight=False)
    turns = list(system)
    while True:
        try:
            line = input("» ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if line == "/new":
            turns = list(system)
        elif line:
            turns.append(_user(line))
            try:
                text = answer(spec, model, tokenizer, turns, options.max_new_tokens)
            except RunnerError as error:
                print_problems(console, error)
                turns.pop()
                continue
            turns.append({"role": "assistant", "content": text})
            print(text, file=out, flush=True)


def answer(
    spec: RunSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: list[Turn], max_new_tokens: int
) -> str:
    """One greedy answer; RunFailedError with one line for any error of the model."""
    from runner.train.evaluation.generation import generate
    from runner.train.trainers.trainer_settings import autocast

    try:
        (found,) = generate(
            model, tokenizer, [turns], max_new_tokens=max_new_tokens, batch_size=1, autocast=autocast(spec)
        )
        return found.text
    except Exception as error:  # a chat template that wants another order of turns, memory, a kernel
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "ask something shorter, or write a smaller --max-new-tokens"
        raise RunFailedError(Problem(f"the model cannot answer: {reason}", None, remedy)) from error


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runner.train.chat")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--prompt")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
