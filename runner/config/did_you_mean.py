"""Unknown keys and choices as problems: "did you mean" with the nearest one, or with what the word means."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from runner.config import conf_files
from runner.config.other_trainers_keys import CHOICES, NONE, PEERS
from runner.config.schema_keys import choices_with, known_keys
from runner.errors import Problem
from runner.spec import RunSpec


def unknown_key(key: str, chosen: str | None, source: str | None) -> Problem:
    """A key that is nowhere, or only in other choices than the one `chosen` for its group."""
    group, _, leaf = key.partition(".")
    others = [f"{group}={name}" for name in choices_with(key)]
    if key == "method.peft_type" and source != "command line":
        remedy = f"peft_type goes with a name of its own: write name: {chosen}_mine in its place, or take {others[0]}"
        return Problem(f"name: {chosen} is a method of another kind, without peft_type", source, remedy)
    if others:
        listed = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
        remedy = f"{listed} {'has' if len(others) == 1 else 'have'} it"
        return Problem(f"{group}={chosen} has no {leaf}", source, remedy)
    if key in known_keys() and group in RunSpec.model_fields and source != "command line" and leaf:
        steps = key.split(".")
        nested = ": {".join(steps) + ": …" + "}" * (len(steps) - 1)
        return Problem(f"unknown key {key}: a dot has no meaning in YAML", source, f"write {nested}")
    if (word := key.rpartition(".")[2]) in NONE and key not in known_keys():
        return Problem(f"unknown key {key}", source, f"leave it out: {NONE[word]}")
    near = nearest_key(key) if key not in known_keys() else None
    every = f"docs/reference.md has every key of {group}" if group in RunSpec.model_fields and leaf else None
    remedy = f"did you mean {near}?" if near else every or "see docs/reference.md for every key"
    return Problem(f"unknown key {key}", source, remedy)


def unknown_choice(group: str, name: str, names: tuple[str, ...], place: str) -> Problem:
    """`group=name` where `names` are all there are."""
    if meant := _meant(group, name):
        remedy = f"write {meant}" if place == "command line" else remedy_for_file(f"write {meant}")
    else:
        near = nearest_choice(group, name, names)
        remedy = f"did you mean {group}={near}?" if near else f"python -m runner list {group} shows all"
    return Problem(f"there is no {group} {name!r}", place, remedy)


def _of_id(hub_id: str) -> str | None:
    """The choice of the catalogue whose model has this Hub id."""
    ids = ((name, conf_files.load_choice("model", name).get("id")) for name in conf_files.options("model"))
    return next((name for name, known in ids if str(known).lower() == hub_id.lower()), None)


def _meant(group: str, name: str) -> str | None:
    """The meaning of a word that names no choice: a Hub id, a file, a stage, a peer's name."""
    if found := CHOICES.get((group, name.lower())):
        return found
    path = re.search(r"[/.]", name) is not None and not name.endswith((".yaml", ".yml"))
    if group == "model" and "/" in name and (known := _of_id(name)):
        return f"model={known}"
    if group == "model" and (path or os.path.isdir(Path(name))):
        return f"model=hub model.id={name}"
    if group == "data" and path:
        of_hub = re.fullmatch(r"[\w-]+/[\w-]+", name) and not os.path.exists(name)
        return f"data=hub data.id={name}" if of_hub else f"data=file data.path={name}"
    if group == "deepspeed" and name.endswith(".json"):
        return f"deepspeed=auto deepspeed.config={name}"
    if group == "deepspeed" and (stage := re.fullmatch(r"(?:stage[_-]?|z)?([0-3])", name)):
        return f"deepspeed=zero{stage[1]}" if stage[1] != "0" else "deepspeed=none"
    if group == "hw" and name.isdigit() and len(name) < 3:
        return f"hw.num_gpus={name}"
    if group == "hw" and name.lower() in ("gpu", "cuda", "auto", "nvidia"):
        return "hw=local"
    several = re.fullmatch(
        r"(?:(\d+)\s*[x×*]\s*)?([a-z]+\d+\w*?)(?:\s*[x×*:]\s*(\d+)\s*(?:[x×*]|gpus?)?)?", name.lower()
    )
    if group == "hw" and several and several[2] in conf_files.options("hw") and (several[1] or several[3]):
        number = several[1] or several[3]
        ready = f"{several[2]}x{number}"
        return f"hw={ready}" if ready in conf_files.options("hw") else f"hw={several[2]} hw.num_gpus={number}"
    return None


def nearest_key(key: str) -> str | None:
    """The schema key (or group) a user most likely meant by `key`, or None."""
    group, _, leaf = key.rpartition(".")
    if leaf in PEERS and key not in known_keys():
        return PEERS[leaf]
    keys = known_keys()
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    if not group and same_leaf:  # `batch_size` alone: eval has one too, and train's is meant
        return min(same_leaf, key=lambda k: (_BARE.index(k.split(".")[0]), k))
    if same_leaf:
        return nearest(key, sorted(same_leaf), cutoff=0.0)
    leaves = {k.rpartition(".")[2]: k for k in sorted(keys)}
    # A group that is right says nothing of the rest: train.foo is not like train.tf32.
    beside = {k.rpartition(".")[2]: k for k in sorted(keys) if group and k.rpartition(".")[0] == group}
    found = nearest(leaf, beside) if beside else nearest(key, sorted(keys))
    found = found or nearest(leaf, leaves, cutoff=0.75)
    found = found or nearest(leaf, PEERS, cutoff=0.75)
    found = found or nearest(group, list(RunSpec.model_fields))
    return None if found == group else found  # `train` is right, and no answer to `train.foo`


# Whose key a bare name is: the first of these groups that has it.
_BARE = sorted(RunSpec.model_fields, key=lambda group: {"train": 0, "run": 1}.get(group, 2))


def nearest(word: str, candidates: Iterable[str] | dict[str, str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word` (for a mapping of texts: the value behind the nearest key)."""
    table = candidates if isinstance(candidates, dict) else {c: c for c in candidates}
    lowered = {name.lower(): target for name, target in table.items()}
    word = word.lower()
    starts = [name for name in lowered if name.startswith(word)] if len(word) > 2 else []
    starts.sort(key=lambda name: (name[len(word) : len(word) + 1].isalnum(), len(name)))  # llama3: not llama30b
    found = starts or difflib.get_close_matches(word, sorted(lowered), n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None


def nearest_choice(group: str, word: str, names: Iterable[str]) -> str | None:
    """The choice of a group most like `word`; models and hardware also by what people call them."""
    table: dict[str, str] = {}
    for name in conf_files.options(group) if group in ("model", "hw") else ():
        values = conf_files.load_choice(group, name)
        table |= dict.fromkeys([*values.get("aliases", []), values.get("title") or name], name)
    known = {name.lower(): name for name in names}
    pieces = [piece.lower() for piece in re.split(r"[^A-Za-z0-9]+", word)]
    counted = any(re.fullmatch(r"\d+x|x\d+", piece) for piece in pieces)  # `3x H100`
    whole = [word.lower(), *(() if counted else pieces)]
    exact = next((known[piece] for piece in whole if piece in known), None)  # `H100 80GB`: closer to `A100 80GB`
    inside = next((known[name] for name in sorted(known) if len(word) > 3 and word.lower() in name), None)
    return exact or nearest(word, {**table, **known}) or inside


def misplaced_choices(group: str, name: str, place: str | None, folders: tuple[Path, ...]) -> Problem:
    """`group: name` among the values of a file."""
    entry, rest = as_defaults_line(group, name, folders)
    remedy = f"write it into the defaults list: {entry}" + (f", and below it {rest}" if rest else "")
    return Problem(f"{group}: {name} chooses, and that is done in the defaults list", place, remedy)


def as_defaults_line(group: str, name: str, folders: tuple[Path, ...]) -> tuple[str, str | None]:
    """The line of a defaults list that chooses `name`, and the value it needs where it is no choice itself."""
    meant = None if name in conf_files.options(group, folders) else _meant(group, name)
    if meant is None:
        near = nearest_choice(group, name, conf_files.options(group, folders))
        return f"- override /{group}: {near or name}", None
    choice, value = as_yaml_lines(meant)
    return choice or f"- override /{group}: local", value  # `hw: 2` is `hw.num_gpus=2`


def as_yaml_lines(words: str) -> tuple[str | None, str | None]:
    """`model=hub model.id=org/name` as a line of the defaults list, and one of values."""
    choice = value = None
    for word in re.split(r" (?=\w+\.\w+=)", words):
        key, _, text = word.partition("=")
        if "." in key:
            value = f"{key.split('.')[0]}: {{{key.split('.')[1]}: {text}}}"
        else:
            choice = f"- override /{key}: {text}"
    return choice, value


def remedy_for_file(remedy: str) -> str:
    """A remedy for the command line as one for a file: `write model=hub model.id=x`."""
    if not re.fullmatch(r"write \w+(\.\w+)?=\S+( \w+\.\w+=\S+)*", remedy):
        return remedy
    choice, value = as_yaml_lines(remedy.removeprefix("write "))
    said = f"write it into the defaults list: {choice}" if choice else ""
    return said + (f"{', and below it ' if said else 'write '}{value}" if value else "")
