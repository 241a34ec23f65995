"""The command line: no verb means `run`; each verb is a click command in a module of `runner.cli`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from runner import __version__
from runner.cli.options import VERBS
from runner.config.credentials import export_hub_token
from runner.errors import Problem, RequestError
from runner.report import terminal
from runner.report.invocation import remember

EPILOG = """
\b
Examples:
  python -m runner                                         train the demo model here; a CPU is enough
  python -m runner model=mistral7b method=qlora4 hw=h100x3
  python -m runner recipes/mistral7b_qlora4_h100x3.yaml train.learning_rate=1e-4
  python -m runner -m method=full,freeze,lora,qlora4,qlora8 train.max_steps=5
  python -m runner show model=phi2                         the resolved run as YAML
  python -m runner explain train.learning_rate recipe=phi2_lora_rtx6000adax5
  python -m runner plan model=llama3_8b hw=rtx4090         memory, time and cost of a run
  python -m runner fit model=llama2_70b method=lora        hardware that fits, cheapest first
  python -m runner list models
  python -m runner data preview data.path=my.jsonl         the format, the learned tokens, mistakes in rows
  python -m runner runs --best eval.after.loss             past runs, filtered and sorted; also runs delete, restore
  python -m runner watch runs/<id>                         live curves and state in the terminal
  python -m runner compare runs/<id> runs/<id>             what differs, and how it came out
  python -m runner ui                                      a web page: compose, watch and compare runs
  python -m runner report runs/<id>                        curves, answers and settings as one HTML file
  python -m runner resume runs/<id>                        continue from the newest checkpoint
  python -m runner join runs/<id>                          on every other machine of a multi-node run
  python -m runner model=mistral7b method=qlora4 hw=h100x3 where=runpod where.max_usd=20 --detach
  python -m runner attach <id>                             follow a rented run again; also logs -f, status, fetch
  python -m runner chat runs/<id>                          talk to the trained model
  python -m runner eval runs/<id> --tasks arc_easy         held-out loss, perplexity, benchmarks
  python -m runner merge runs/<id>                         merge an adapter into its base model
  python -m runner export runs/<id> --step 200             a checkpoint as a plain model or adapter
  python -m runner push runs/<id> org/name                 upload the model and its card to the Hub
  python -m runner gpus --min-memory 48                    GPUs that RunPod offers now, with prices
  python -m runner pods                                    rented pods; `pods reap` ends those that no run uses
  python -m runner doctor hw=h100x3                        check this machine for a run
  python -m runner emulate                                 an emulated RunPod, to try pods without an account

A choice is written group=name (model, method, hw, deepspeed, objective, data, where, track),
a value key=value; docs/reference.md lists every key. Exit codes: 0 done, 1 the run failed,
2 the request was wrong, 3 it cannot run on this hardware or within the limits, 130 interrupted.
"""


class Verbs(click.Group):
    """A group in which anything that is not a verb belongs to `run`; a verb's module is read when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = import_module(f"runner.cli.{VERBS[cmd_name]}")
        verb: click.Command = getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_")
        return verb

    def invoke(self, ctx: click.Context) -> object:
        """A verb's usage errors also in JSON, and an option that is a key with the word to write."""
        words = ctx.meta[WORDS]
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if isinstance(error, click.NoSuchOption) and (instead := _meant(error, words)):
                error = click.NoSuchOption(error.option_name, f"{error.message} {instead}", ctx=error.ctx)
            if "--json" in words:
                from runner.report.text import dump, problems_as_json

                click.echo(dump(problems_as_json(RequestError(Problem(error.format_message(), "command line")))))
            raise error from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS] = tuple(args)
        own = {"--help", "-h", "--version"}
        if not args or (args[0] not in VERBS and args[0] not in own):
            args = ["run", *args]
        return super().parse_args(ctx, args)


WORDS = f"{__name__}.words"
"""Where click keeps the words of the command line for an error."""


def _meant(error: click.NoSuchOption, words: tuple[str, ...]) -> str:
    """`--learning_rate 1e-4`, as other trainers take it, in this runner's way; the verbs that have such an option where
    no key is called so; empty where neither is known."""
    if not (error.ctx and any(p.name == "words" for p in error.ctx.command.params)):
        return ""
    from runner.cli.completion import all_verbs
    from runner.config import conf_files
    from runner.config.did_you_mean import nearest_key
    from runner.config.other_trainers_keys import NONE, PEERS
    from runner.config.schema_keys import known_keys
    from runner.spec import RunSpec

    place = next((n for n, word in enumerate(words) if word.startswith(error.option_name)), None)
    option = error.option_name if place is None else words[place]
    option, _, value = option.partition("=")
    word = option.lstrip("-").replace("-", "_")
    if word in NONE:
        return f"Leave it out: {NONE[word]}."
    key = word if word in conf_files.GROUPS else nearest_key(word)
    if key in RunSpec.model_fields and key not in conf_files.GROUPS:  # `run=…` says nothing
        key = None
    exact = key is not None and word in {*conf_files.GROUPS, *PEERS, *known_keys()}
    if not exact and (key is None or key.rpartition(".")[2] != word):
        having = [name for name, verb in all_verbs(error.ctx.find_root()) if option in verb.options]
        if having:
            return f"It is an option of {' and '.join(having)}."
    if len(word) < 2 or key is None or (error.possibilities and not exact):
        return ""
    following = words[place + 1] if place is not None and place + 1 < len(words) else ""
    value = value or ("…" if not following or following.startswith("-") or "=" in following else following)
    return f"Keys have no dashes: {key}={value}"


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="runner")
def cli() -> None:
    """Fine-tune a language model: choose model, method, hardware and ZeRO stage, then plan, run or rent."""


def main() -> None:
    """Run the command line; the process ends with its exit code."""
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the look for some reads all packages: 15 ms
    try:
        os.getcwd()
    except FileNotFoundError:
        print("The working directory has been deleted: cd to another one.", file=sys.stderr)
        sys.exit(2)
    remember()
    export_hub_token()
    terminal.guard()
    try:
        cli(prog_name="python -m runner" if sys.argv[0].endswith("__main__.py") else None)
    except SystemExit as end:
        sys.exit(terminal.exit_code(end.code) if isinstance(end.code, int | None) else end.code)


if __name__ == "__main__":  # `python -m runner.cli.main`: otherwise it would say nothing, and look like success
    main()
