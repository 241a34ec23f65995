"""Stages before pretraining: folders, shards, tokenizer. A finished stage is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from runner.data.pretraining import sharder, tokenizer
from runner.data.pretraining.corpus_checks import check_size, check_tokenizer, check_trained
from runner.data.pretraining.workspace import Workspace, is_ready, manifest_of, workspace_of
from runner.errors import Problem, RequestError
from runner.spec import ModelSpec, Pretrain, RunSpec
from runner.train import model_loading
from runner.train.distributed import Ranks


def prepare(spec: RunSpec, say: Callable[[str], None], beat: Callable[[], None], ranks: Ranks) -> RunSpec:
    """The run with its tokenizer in place; the main process does the work, the others wait for it."""
    if not isinstance(spec.objective, Pretrain):
        return spec
    place = workspace_of(spec.objective)
    if place is not None:
        with ranks.main_first(beat) as working:
            if ranks.main:
                _work(spec, spec.objective, place, say, working)
        if not is_ready(place.train, spec.objective.shards):
            what = f"{place.train} is not there on this machine"
            raise RequestError(Problem(what, "objective.root", "name a folder that all machines share"))
    if not spec.model.from_scratch:
        return spec
    # Of random weights `model.id` is the folder of their tokenizer (or its Hub id) from here on.
    return spec.model_copy(update={"model": spec.model.model_copy(update={"id": _tokenizer(spec, place)})})


def _tokenizer(spec: RunSpec, place: Workspace | None) -> str:
    """The folder of the tokenizer for random weights, or its Hub id; RequestError where it does not go with them."""
    assert isinstance(spec.objective, Pretrain)
    name = spec.objective.tokenizer
    if name is not None and tokenizer.is_hub_id(name):
        try:
            with model_loading.explained(ModelSpec(id=name)):
                size = len(AutoTokenizer.from_pretrained(name))
        except RequestError as error:
            remedy = "name a tokenizer.json or a folder that is here, or a Hub id: org/name"
            raise RequestError(*(Problem(p.what, "objective.tokenizer", remedy) for p in error.problems)) from error
        check_size(spec, name, size)
        return name
    assert name is not None or place is not None  # a rule across parts: without an experiment a tokenizer is named
    folder = Path(name).expanduser() if name is not None else place.tokenizer  # type: ignore[union-attr]  # as asserted
    check_tokenizer(spec, folder)
    return str(tokenizer.bundle_folder(folder))


def _work(
    spec: RunSpec, objective: Pretrain, place: Workspace, say: Callable[[str], None], beat: Callable[[], None]
) -> None:
    for folder in (place.train.parent, place.val.parent, place.tokenizer.parent, place.hf_cache):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HOME", str(place.hf_cache))
    os.environ.setdefault("HF_DATASETS_CACHE", str(place.hf_cache / "datasets"))
    found = sharder.make_shards(place, objective, spec.data, spec.train.seed, say, beat)
    held = f", {found.val['lines']:,} held out" if found.val else ""
    count = f"{found.train['lines']:,} documents in {found.train['num_shards']} shards{held}"
    say(f"Shards  {count}: {'written' if found.made else 'there already'} ({place.train})")
    if not spec.model.from_scratch or objective.tokenizer:
        return
    if objective.shards == "anew" and _is_of_others(spec, place):
        shutil.rmtree(place.tokenizer, ignore_errors=True)
    if (place.tokenizer / "tokenizer.json").is_file():
        if objective.shards == "auto":
            check_trained(place, sharder.settings_of(objective, spec.data, spec.train.seed))
        say(
            f"Tokens  {tokenizer.vocabulary_size(place.tokenizer):,} in the tokenizer that is there ({place.tokenizer})"
        )
        return
    beat()
    facts = tokenizer.train_tokenizer(place.train, place.tokenizer, int(spec.model.vocab_size or 0))
    say(f"Tokens  {facts['vocab_size']:,} learned from the shards ({place.tokenizer})")


def _is_of_others(spec: RunSpec, place: Workspace) -> bool:
    """The tokenizer there is not what its training on the shards there would give."""
    known, shards = tokenizer.facts_of(place.tokenizer), manifest_of(place.train)["settings"]
    return known.get("wanted") != spec.model.vocab_size or known.get("settings") != shards
