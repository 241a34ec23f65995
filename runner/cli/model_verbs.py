"""Verbs for a finished run: chat, eval, merge, export, push, deploy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from runner.cli.options import answer, as_json_option, reports_errors
from runner.report.text import counted


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
    """Talk to the trained model of a run.

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
    "--data", type=click.Path(path_type=Path), metavar="FILE", help="Rows to measure on, instead of the held-out ones."
)
@click.option("--tasks", metavar="A,B", help="Benchmarks of lm-eval, by name (needs the extra `eval`).")
@click.option("--tasks-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder with task files of your own.")
@click.option("--limit", type=int, help="Take only the first n rows, and n of each benchmark.")
@click.option("--base", is_flag=True, help="Measure the model as it was before training.")
@as_json_option
@reports_errors
def eval_(run_dir: Path, as_json: bool, **options: Any) -> None:
    """Measure the model of a run: held-out loss, benchmarks.

    The loss is the mean over all learned tokens, row by row, without packing. The results are also written to eval.json
    in the run directory. lm-eval task files whose data are local (dataset_path: json) need no network.

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
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write. Default: runs/<id>/merged."
)
@as_json_option
@reports_errors
def merge(run_dir: Path, out: Path | None, as_json: bool) -> None:
    """Merge the adapter of a finished run into its base model.

    Writes a plain 16-bit Hugging Face folder. A quantised base is dequantised first, so that the adapter is added to
    the weights it was trained on. The folder is then loaded and its logits are compared with those of base + adapter;
    if they differ, it is deleted (exit code 1).

    \b
    Examples:
      python -m runner merge runs/<id>
      python -m runner merge runs/<id> --out ./my-model --json
    """
    from runner.runs.worker_tasks import merge as fold

    sys.exit(fold(run_dir, out, as_json))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="Step of the checkpoint. Default: the newest complete one.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write. Default: runs/<id>/export-<step>."
)
@as_json_option
@reports_errors
def export(run_dir: Path, step: int | None, out: Path | None, as_json: bool) -> None:
    """Convert a checkpoint into a plain model or adapter.

    The result is what the run would have saved at this step. DeepSpeed shards are joined without a GPU. Incomplete or
    damaged checkpoints are refused.

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
@click.option("--public", is_flag=True, help="Create the repository as public. Default: private.")
@click.option("--merged", is_flag=True, help="Upload the result of `merge` instead of the adapter.")
@as_json_option
@reports_errors
def push(run_dir: Path, repo: str | None, public: bool, merged: bool, as_json: bool) -> None:
    """Upload the model of a run to the Hugging Face Hub or to S3.

    One commit holds the model, its card and the spec that repeats the run. Without a name, the target is the run's
    push.to.

    \b
    Examples:
      python -m runner push runs/<id> org/name
      python -m runner merge runs/<id> && python -m runner push runs/<id> org/name --merged --public
    """
    from runner.hub.upload import push_run as upload

    done = upload(run_dir, repo, public=public, merged=merged)
    answer(as_json, done, f"{counted(len(done['files']), 'file')}: {done['url']}")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--repo", metavar="ORG/NAME", help="Repository on the Hub. Default: where `push` uploaded the model.")
@click.option(
    "--volume", metavar="ID", help="Load the model from runs/<id>/ on this network volume instead of the Hub."
)
@click.option("--merged", is_flag=True, help="Serve the result of `merge` instead of base and adapter.")
@click.option(
    "--gpu",
    "pools",
    multiple=True,
    metavar="POOL",
    help="GPU pool: ADA_24, AMPERE_80, … Default: the smallest that fits.",
)
@click.option("--max-workers", default=1, show_default=True, type=click.IntRange(1), help="Most at once.")
@click.option("--idle-seconds", default=10, show_default=True, type=click.IntRange(1, 3600), help="Idle, one ends.")
@click.option("--secret", metavar="NAME", help="The secret in RunPod's console with an HF_TOKEN for private models.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--delete", "remove", is_flag=True, help="Delete endpoint and template.")
@as_json_option
@reports_errors
def deploy(run_dir: Path, remove: bool, yes: bool, as_json: bool, **options: Any) -> None:
    """Serve the model of a run from a RunPod serverless endpoint.

    The endpoint speaks OpenAI's API, and costs nothing while no request arrives.

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
        answer(as_json, {"deleted": gone}, said)
        return
    wanted = serving.DeployOptions(**options)
    done = serving.deploy(run_dir, wanted, lambda what: yes or click.confirm(f"Deploy {what}?", err=True))
    lines = [
        f"Endpoint {done['endpoint']}: {done['console']}",
        f"OpenAI's API: base_url={done['openai_base_url']} model={done['served_model']}, key RUNPOD_API_KEY",
        f"Delete it: python -m runner deploy --delete {run_dir}",
    ]
    answer(as_json, done, "\n".join(lines))
