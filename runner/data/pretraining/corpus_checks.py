"""Checks of a pretraining run's corpus, shards and tokenizer before it starts; sizes for the plan."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from runner.data.inspect.lengths import DataLengths, stated_sizes
from runner.data.inspect.token_counts import CHARS_PER_TOKEN, tokenizer_file
from runner.data.pretraining import tokenizer
from runner.data.pretraining.sharder import (
    Settings,
    check_same,
    documents_to_read,
    missing_shards_problem,
    other_documents,
    settings_of,
)
from runner.data.pretraining.workspace import Workspace, is_ready, manifest_of, workspace_of
from runner.data.readers.sources import files_of
from runner.data.row_store import num_bytes
from runner.errors import Problem, RequestError
from runner.spec import DataSpec, ModelSpec, Pretrain, RunSpec
from runner.spec.input_paths import is_url


def check_pretraining(spec: RunSpec) -> None:
    """RequestError where shards, corpus or tokenizer are missing. On a rented machine they lie on its own volume."""
    objective = spec.objective
    if not isinstance(objective, Pretrain):
        return
    if objective.tokenizer is not None and spec.model.from_scratch:
        check_named(spec, objective.tokenizer)
    if spec.where.name != "local":
        return
    place = workspace_of(objective)
    if place is not None and (objective.shards == "anew" or not is_ready(place.train, objective.shards)):
        if objective.shards == "reuse":
            raise RequestError(missing_shards_problem(place))
        if spec.data.source == "file":
            _check_corpus(spec.data)
    elif place is not None and objective.shards == "auto":
        settings = settings_of(objective, spec.data, spec.train.seed)
        check_same(place, settings)
        if spec.model.from_scratch and not objective.tokenizer:
            check_trained(place, settings)
    own = place.tokenizer if place and spec.model.from_scratch and not objective.tokenizer else None
    if own is not None and (own / "tokenizer.json").is_file():
        check_tokenizer(spec, own)


def _check_corpus(data: DataSpec) -> None:
    for path in filter(None, (data.path, data.eval_path, *(source.path for source in data.sources))):
        for file in files_of(path):
            if not is_url(file) and not Path(file).expanduser().is_file():
                raise RequestError(Problem(f"there is no {file}", "data.path", "name a file, a folder or a pattern"))


def check_named(spec: RunSpec, name: str) -> None:
    """RequestError for a file or folder that is no tokenizer, or one with too many tokens; so for a cached Hub id."""
    path = Path(name).expanduser()
    if tokenizer.is_hub_id(name):
        if (kept := tokenizer_file(ModelSpec(id=name))) is not None:
            check_tokenizer(spec, kept)
        return
    if spec.where.name != "local" and not path.exists():
        return  # a pod's: inputs.py
    check_tokenizer(spec, path)
    tokenizer.end_token(path)


def check_trained(place: Workspace, settings: Settings) -> None:
    """RequestError for a tokenizer of the experiment that was trained on other documents."""
    known = tokenizer.facts_of(place.tokenizer).get("settings", {})
    if changed := settings.differ(known):
        what = f"{place.tokenizer} was trained on shards with another {changed}"
        raise RequestError(other_documents(what, known, settings))


def check_tokenizer(spec: RunSpec, folder: Path) -> None:
    """RequestError where there is none, or one with more tokens than the model has rows for."""
    if not (file := tokenizer.file_of(folder)).is_file():
        remedy = "name a tokenizer.json, a folder with one, or a Hub id (org/name); or leave it out"
        raise RequestError(Problem(f"there is no {file}", "objective.tokenizer", remedy))
    check_size(spec, folder, tokenizer.vocabulary_size(folder))


def check_size(spec: RunSpec, folder: Path | str, size: int) -> None:
    """RequestError for more tokens than the model has rows for."""
    if spec.model.vocab_size and size > spec.model.vocab_size:
        what = f"{folder} has {size:,} tokens, more than model.vocab_size={spec.model.vocab_size}"
        remedy = f"write model.vocab_size={-(-size // 64) * 64}, or name another objective.experiment"
        raise RequestError(Problem(what, "model.vocab_size", remedy))


def documents_of(spec: RunSpec) -> DataSpec:
    """The data with the limits that the sharder will set, where shards are still to be made: `objective.take`
    documents, `objective.val_ratio` of them held out."""
    objective, data = spec.objective, spec.data
    if not isinstance(objective, Pretrain) or objective.experiment is None:
        return data
    own = data.eval_path or data.eval_split
    share = objective.val_ratio if objective.mode == "split" and not own else 0.0
    limits: dict[str, float | int | None] = {"eval_fraction": share}
    if (take := documents_to_read(objective)) is not None:
        held = round(take * share)
        limits["max_examples"] = min(take - held, data.max_examples or take)
        limits |= {} if own else {"max_eval_examples": min(max(1, held), data.max_eval_examples or take)}
    return data.model_copy(update=limits)


def lengths_of(spec: RunSpec) -> DataLengths | None:
    """Return counts from the manifests; None without shards, or with packed ones."""
    objective = spec.objective
    place = workspace_of(objective)
    if place is None or not isinstance(objective, Pretrain) or not is_ready(place.train, objective.shards):
        return None
    train, val = manifest_of(place.train), manifest_of(place.val)
    if train["settings"]["gzip"]:
        return None
    how = f"{CHARS_PER_TOKEN:g} bytes a token assumed, sizes from {place.train / 'manifest.json'}"
    per_line = train["bytes"] / train["lines"] / CHARS_PER_TOKEN
    held = int(val.get("lines", 0))
    return DataLengths(train["lines"], per_line, False, how, (), held, per_line if held else None, 0)


def stored_bytes(spec: RunSpec, found: DataLengths) -> tuple[float, float, list[str]]:
    """Bytes of the shards that a run makes, and of data that it downloads or sends to a pod; a note where they are not
    known.

    Shards hold the text, a byte a character (with `objective.gzip` they are smaller). A data set of
    the Hub lies there twice, as Parquet, at most as large as its rows, and as Arrow; one that is streamed does not.
    """
    objective, data = spec.objective, stated_sizes(spec.data)
    place = workspace_of(objective)
    files = sent_bytes(spec) if spec.is_rented else 0.0
    if isinstance(objective, Pretrain) and place is not None:
        if objective.shards != "anew" and spec.where.name == "local" and is_ready(place.train, objective.shards):
            return 0.0, files, []
        if objective.shards == "reuse":
            return 0.0, 0.0, []
        if found.num_examples is None or found.tokens_per_example is None:
            name = data.id if data.source == "hub" else data.path or "the corpus"
            what = f"disk: how much text {name} holds is not known: its shards and their tokens (3 times as much)"
            remedy = "; make room for them with where.volume_gb=…" if spec.is_rented else ""
            return 0.0, files, [f"{what} are not counted{remedy}"]
        per_row = data.bytes_per_row or found.tokens_per_example * CHARS_PER_TOKEN
        held_row = data.bytes_per_row or (found.held_out_tokens_per_row or 0.0) * CHARS_PER_TOKEN
        return found.num_examples * per_row + (found.held_out_rows or 0) * held_row, files, []
    if data.source != "hub" or data.streaming:
        return 0.0, files, []
    row = data.bytes_per_row or (data.tokens_per_row or 0.0) * CHARS_PER_TOKEN
    if not data.num_rows or not row:
        return 0.0, 0.0, [f"disk: the size of {data.id} is not known, and not counted"]
    return 0.0, 2 * (data.num_rows + (data.num_eval_rows or 0)) * row, []


def sent_bytes(spec: RunSpec) -> float:
    """Bytes of the data files of this machine that a pod gets."""
    if spec.data.source != "file":
        return 0.0
    paths = (spec.data.path, spec.data.eval_path, *(source.path for source in spec.data.sources))
    with suppress(RequestError):
        return float(num_bytes(file for path in paths if path for file in ([] if is_url(path) else files_of(path))))
    return 0.0
