"""`objective=pretrain`: next-token loss on plain text, and the stages before it: folders, shards, tokenizer.

A finished stage is skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import AutoTokenizer

from runner import spec as schema
from runner.data.pretraining import sharder, tokenizer
from runner.data.pretraining.corpus_checks import check_size, check_tokenizer, check_trained
from runner.data.pretraining.workspace import Workspace, is_ready, manifest_of, workspace_of
from runner.errors import Problem, RequestError
from runner.spec import ModelSpec, RunSpec
from runner.train import model_loading
from runner.train.distributed import Ranks
from runner.train.objectives.objective import Examples
from runner.train.objectives.sft import NextToken
from runner.train.tokens import text_dataset
from runner.train.tokens.text_dataset import Shards
from runner.train.tokens.token_cache import OnProgress, Tokenised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.data.examples import Example, Learnable


class Pretrain(NextToken[schema.Pretrain]):
    """Plain text, of `data` or of shards."""

    def prepare(self, say: Callable[[str], None], beat: Callable[[], None], ranks: Ranks) -> None:
        """Write shards and train a tokenizer, where that is asked for; the main process works, the others wait."""
        spec, place = self.spec, workspace_of(self.objective_spec)
        if place is not None:
            with ranks.main_first(beat) as working:
                if ranks.main:
                    _work(spec, self.objective_spec, place, say, working)
            if not is_ready(place.train, self.objective_spec.shards):
                what = f"{place.train} is not there on this machine"
                raise RequestError(Problem(what, "objective.root", "name a folder that all machines share"))
        if spec.model.from_scratch:
            # Of random weights `model.id` is the folder of their tokenizer (or its Hub id) from here on.
            folder = _tokenizer(spec, self.objective_spec, place)
            self.spec = spec.model_copy(update={"model": spec.model.model_copy(update={"id": folder})})

    def read(self) -> Examples:
        """Streams of shards, or the rows of `data`."""
        place = workspace_of(self.objective_spec)
        if place is None:
            return super().read()
        train, val = Shards(place.train), Shards(place.val)
        return Examples(train, val if len(val) else None, f"{train.fingerprint}{val.fingerprint}", [])

    def reading(self, path: Path) -> RunSpec:
        """The spec with all rows of a file, and no shards."""
        objective = self.objective_spec.model_copy(update={"experiment": None})
        return super().reading(path).model_copy(update={"objective": objective})

    def tokenise(
        self, rows: Shards | Sequence[Learnable], tokenizer: PreTrainedTokenizerBase,
        on_progress: OnProgress | None = None, *, held: bool = False,
    ) -> Tokenised:  # fmt: skip
        """Sequences of equal length."""
        documents = cast("Shards | Sequence[Example]", rows)
        return text_dataset.tokenise(documents, tokenizer, self.spec, on_progress, held=held)


def _tokenizer(spec: RunSpec, objective: schema.Pretrain, place: Workspace | None) -> str:
    """The folder of the tokenizer for random weights, or its Hub id; RequestError where it does not go with them."""
    name = objective.tokenizer
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
    spec: RunSpec, objective: schema.Pretrain, place: Workspace, say: Callable[[str], None], beat: Callable[[], None]
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
        size = tokenizer.vocabulary_size(place.tokenizer)
        say(f"Tokens  {size:,} in the tokenizer that is there ({place.tokenizer})")
        return
    beat()
    facts = tokenizer.train_tokenizer(place.train, place.tokenizer, int(spec.model.vocab_size or 0))
    say(f"Tokens  {facts['vocab_size']:,} learned from the shards ({place.tokenizer})")


def _is_of_others(spec: RunSpec, place: Workspace) -> bool:
    """True if the tokenizer was not trained on these shards with these settings."""
    known, shards = tokenizer.facts_of(place.tokenizer), manifest_of(place.train)["settings"]
    return known.get("wanted") != spec.model.vocab_size or known.get("settings") != shards
