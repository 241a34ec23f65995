"""Verbs for a finished run: chat, eval, merge, export, push, deploy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from runner.cli.options import as_json_option, reports_errors
from runner.report.text import counted, dump


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--prompt", help="Answer this one prompt and stop.")
@click.option("--base", is_flag=True, help="Talk to the model as it was before training.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer, in tokens."
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output (with --prompt).")
@reports_errors
def chat(run_dir: Path, prompt: str | None, base: bool, max_new_tokens: int, as_json: bool) -> None:
    """Talk to the tuned model of a run.

    \b
    Examples:
      python -m runner chat runs/<id>
      python -m runner chat runs/<id> --prompt "Fine-tune Mistral on three H100s" --json
      python -m runner chat runs/<id> --base
    """
    from runner.runs.worker_tasks import chat as talk

    sys.exit(talk(run_dir, prompt, base, max_new_tokens, as_json))


@click.command(name="eval")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="FILE", help="Rows to measure on, if not the held-out ones."
)
@click.option("--tasks", metavar="A,B", help="Benchmarks of lm-eval, by name (needs the extra `eval`).")
@click.option("--tasks-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder with task files of your own.")
@click.option("--limit", type=int, help="Take only the first n rows, and n of each benchmark.")
@click.option("--base", is_flag=True, help="Measure the model as it was before training.")
@as_json_option
@reports_errors
def eval_(run_dir: Path, as_json: bool, **options: Any) -> None:
    """Measure the model of a run: held-out loss and perplexity, and benchmarks.

    The loss is the mean over all tokens that are learned, row by row, without packing. What was measured is also in
    eval.json in the run's folder. Task files of lm-eval with data of their own (dataset_path: json) need no network.

    \b
    Examples:
      python -m runner eval runs/<id>
      python -m runner eval runs/<id> --data more.jsonl --json
      python -m runner eval runs/<id> --tasks hellaswag,arc_easy --limit 200
      python -m runner eval runs/<id> --tasks my_task --tasks-dir ./tasks
    """
    from runner.runs.worker_tasks import EvaluateOptions, evaluate

    sys.exit(evaluate(run_dir, EvaluateOptions(**options), as_json))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write, if not runs/<id>/merged.")
@as_json_option
@reports_errors
def merge(run_dir: Path, out: Path | None, as_json: bool) -> None:
    """Fold the adapter of a finished run into its base: a plain 16-bit Hugging Face folder, and the proof of it.

    A quantised base is unpacked first, so that the adapter meets the weights it was trained against. Then the folder is
    read back and must say what base + adapter said, or it is deleted (exit code 1).

    \b
    Examples:
      python -m runner merge runs/<id>
      python -m runner merge runs/<id> --out ./my-model --json
    """
    from runner.runs.worker_tasks import merge as fold

    sys.exit(fold(run_dir, out, as_json))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Which checkpoint; the newest complete one if left out.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write, if not export-<step>.")
@as_json_option
@reports_errors
def export(run_dir: Path, step: int | None, out: Path | None, as_json: bool) -> None:
    """Write a checkpoint as what the run would have saved at its end: a plain model, or an adapter.

    DeepSpeed's shards are put together, without a GPU. A checkpoint counts only if it was finished and is whole.

    \b
    Examples:
      python -m runner export runs/<id>
      python -m runner export runs/<id> --step 200 --out ./after-200
    """
    from runner.runs.worker_tasks import export as write

    sys.exit(write(run_dir, step, out, as_json))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("repo", metavar="[ORG/NAME|s3://BUCKET/PREFIX]", required=False)
@click.option("--public", is_flag=True, help="Everybody may see a repository that is made; else it is private.")
@click.option("--merged", is_flag=True, help="What `merge` has written, instead of the adapter.")
@as_json_option
@reports_errors
def push(run_dir: Path, repo: str | None, public: bool, merged: bool, as_json: bool) -> None:
    """Upload a run's model to the Hugging Face Hub, with a card and the spec that makes it again: one commit.

    Without a name it goes to the run's push.to, where a run with that key has put it at its end.

    \b
    Examples:
      python -m runner push runs/<id> org/name
      python -m runner merge runs/<id> && python -m runner push runs/<id> org/name --merged --public
    """
    from runner.hub.upload import push_run as upload

    done = upload(run_dir, repo, public=public, merged=merged)
    click.echo(dump(done) if as_json else f"{counted(len(done['files']), 'file')}: {done['url']}")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--repo", metavar="ORG/NAME", help="Where the model is on the Hub, if `push` did not put it there.")
@click.option("--volume", metavar="ID", help="The network volume with runs/<id>/ on it, instead of the Hub.")
@click.option("--merged", is_flag=True, help="Serve what `merge` has written, instead of base and adapter.")
@click.option("--gpu", "pools", multiple=True, metavar="POOL", help="ADA_24, AMPERE_80, …; else the smallest.")
@click.option("--max-workers", default=1, show_default=True, type=click.IntRange(1), help="Most at once.")
@click.option("--idle-seconds", default=10, show_default=True, type=click.IntRange(1, 3600), help="Idle, one ends.")
@click.option("--secret", metavar="NAME", help="The secret in RunPod's console with an HF_TOKEN for private models.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--delete", "remove", is_flag=True, help="Delete endpoint and template.")
@as_json_option
@reports_errors
def deploy(run_dir: Path, remove: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Serve a run's model from RunPod: a serverless endpoint with OpenAI's API, which costs nothing while nobody asks.

    \b
    Examples:
      python -m runner push runs/<id> org/name && python -m runner deploy runs/<id>
      python -m runner deploy runs/<id> --volume vol_abc --max-workers 3
      python -m runner deploy --delete runs/<id>
    """
    from runner.cloud.runpod import serverless as serving

    if remove:
        gone = serving.delete(run_dir)
        said = f"Deleted: {', '.join(gone)}" if gone else f"Nothing to delete: RunPod has no endpoint of {run_dir}"
        click.echo(dump({"deleted": gone}) if as_json else said)
        return
    wanted = serving.DeployOptions(**options)
    done = serving.deploy(run_dir, wanted, lambda what: yes or click.confirm(f"Deploy {what}?", err=True))
    if as_json:
        click.echo(dump(done))
        return
    click.echo(f"Endpoint {done['endpoint']}: {done['console']}")
    click.echo(f"OpenAI's API: base_url={done['openai_base_url']} model={done['served_model']}, key RUNPOD_API_KEY")
    click.echo(f"Delete it: python -m runner deploy --delete {run_dir}")
