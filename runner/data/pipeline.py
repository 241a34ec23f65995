"""What a run from a corpus needs to be there, judged before anything starts; and how much there is, for the plan."""

from __future__ import annotations

from pathlib import Path

from runner.data import tokenizer
from runner.data.files import is_url
from runner.data.lengths import DataLengths
from runner.data.sharder import Settings, check_same, missing, other, settings_of, taken
from runner.data.sources import files_of
from runner.data.tokens import CHARS_PER_TOKEN
from runner.data.workspace import Workspace, is_whole, manifest_of, workspace_of
from runner.errors import Problem, RequestError
from runner.spec import DataSpec, Pretrain, RunSpec


def check(spec: RunSpec) -> None:
    """RequestError where shards, corpus or tokenizer are missing. On a rented machine they lie on its own volume."""
    objective = spec.objective
    if not isinstance(objective, Pretrain) or spec.where.name != "local":
        return
    place = workspace_of(objective)
    if place is not None and (objective.shards == "anew" or not is_whole(place.train)):
        if objective.shards == "reuse":
            raise RequestError(missing(place))
        if spec.data.source == "file":
            _check_corpus(spec.data)
    elif place is not None and objective.shards == "auto":
        settings = settings_of(objective, spec.data, spec.train.seed)
        check_same(place, settings)
        if spec.model.from_scratch and not objective.tokenizer:
            check_trained(place, settings)
    folder = tokenizer_of(spec, objective, place)
    if folder is not None and (objective.tokenizer or (folder / "tokenizer.json").is_file()):
        check_tokenizer(spec, folder)


def _check_corpus(data: DataSpec) -> None:
    for path in filter(None, (data.path, data.eval_path, *(source.path for source in data.sources))):
        for file in files_of(path):
            if not is_url(file) and not Path(file).expanduser().is_file():
                raise RequestError(Problem(f"there is no {file}", "data.path", "name a file, a folder or a pattern"))


def tokenizer_of(spec: RunSpec, objective: Pretrain, place: Workspace | None) -> Path | None:
    """The folder of the tokenizer for random weights; None for a pretrained model, which has its own."""
    if not spec.model.from_scratch:
        return None
    if objective.tokenizer:
        return Path(objective.tokenizer).expanduser()
    assert place is not None  # a rule across parts: without an experiment a tokenizer is named
    return place.tokenizer


def check_trained(place: Workspace, settings: Settings) -> None:
    """RequestError for a tokenizer of the experiment that was trained on other documents."""
    known = tokenizer.facts_of(place.tokenizer).get("settings", {})
    if changed := settings.differ(known):
        raise RequestError(other(f"{place.tokenizer} was trained on shards with another {changed}", known, settings))


def check_tokenizer(spec: RunSpec, folder: Path) -> None:
    """RequestError where there is none, or one with more tokens than the model has rows for."""
    if not (folder / "tokenizer.json").is_file():
        what = f"there is no {folder / 'tokenizer.json'}"
        raise RequestError(Problem(what, "objective.tokenizer", "name a folder with one, or leave it out"))
    size = tokenizer.size_of(folder)
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
    if (take := taken(objective)) is not None:
        held = round(take * share)
        limits["max_examples"] = min(take - held, data.max_examples or take)
        limits |= {} if own else {"max_eval_examples": min(max(1, held), data.max_eval_examples or take)}
    return data.model_copy(update=limits)


def lengths_of(spec: RunSpec) -> DataLengths | None:
    """What the manifests say; None where there are no shards, or packed ones."""
    place = workspace_of(spec.objective) if isinstance(spec.objective, Pretrain) else None
    if place is None or not is_whole(place.train):
        return None
    train, val = manifest_of(place.train), manifest_of(place.val)
    if train["settings"]["gzip"]:
        return None
    how = f"{CHARS_PER_TOKEN:g} bytes a token assumed, sizes from {place.train / 'manifest.json'}"
    per_line = train["bytes"] / train["lines"] / CHARS_PER_TOKEN
    held = int(val.get("lines", 0))
    return DataLengths(train["lines"], per_line, False, how, (), held, per_line if held else None, 0)
