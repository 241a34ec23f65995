"""Shell completion: `eval "$(python -m runner -sc install=bash)"`, then verbs, choices, keys and what they may be.

The shell asks with the line so far in `COMP_LINE`. Hydra's own completion knows neither verbs nor
`python -m` nor the values of a key; this one needs no composition, so an answer takes 0.2 s.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import click

from runner.config import conf_files
from runner.config.schema_keys import allowed_words, known_keys
from runner.errors import Problem, RequestError
from runner.spec import RunSpec

# Bash takes "=" for the end of a word, so what stands before it must not be part of the answer.
_BASH = """\
_runner() {
    local line=${COMP_LINE:0:COMP_POINT} word call=("${COMP_WORDS[0]}")
    if [[ ${call[0]##*/} == python* ]]; then
        [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == runner ]] || return 0
        call+=(-m runner)
    fi
    local IFS=$'\\n'
    COMPREPLY=($(COMP_LINE=$line "${call[@]}" -sc query=bash 2>/dev/null))
    word=${line##* }
    [[ $COMP_WORDBREAKS == *=* && $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    return 0
}
complete -o nospace -o default -F _runner runner python python3
"""
_ZSH = """\
_runner() {
    local -a found=("${(@f)$(COMP_LINE=$LBUFFER runner -sc query=zsh 2>/dev/null)}")
    compadd -S '' -a found || _files
}
compdef _runner runner
"""
_FISH = "complete -c runner -a '(COMP_LINE=(commandline -cp) runner -sc query=fish 2>/dev/null)'\n"
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


# Keys whose value is a file or a folder.
_PATHS = (
    "data.path", "data.eval_path", "data.chat_template", "deepspeed.config", "model.id", "objective.tokenizer",
    "recipe", "run.output_dir",
)  # fmt: skip
_STARTS = (".yaml", ".yml", ".json")
"""Start of a run: a recipe, or the spec of another run."""


_RUN_ARGUMENTS = ("run", "run_dir", "run_id", "runs")
"""Names of arguments that are completed with runs."""


@dataclass(frozen=True)
class Verb:
    """Completions of a verb."""

    options: tuple[str, ...]
    arguments: tuple[str, ...]
    """The names of its arguments on the command line; `words` takes any number of `key=value`, `runs` of runs."""

    def argument_at(self, place: int) -> str | None:
        """Name of the argument that a word is for; None where there is none left."""
        return next(iter((*self.arguments[place:], *(name for name in self.arguments[-1:] if name == "runs"))), None)


def all_verbs(ctx: click.Context, before: str = "") -> Iterator[tuple[str, Verb]]:
    """Every verb of the context's group with what may follow it; a verb of a group, `pods stop`, after the group."""
    group = ctx.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(ctx):
        if (verb := group.get_command(ctx, name)) is None:
            continue
        seen = [p for p in verb.params if not getattr(p, "hidden", False)]
        options = tuple(o for p in seen for o in p.opts if o[0] == "-")
        yield before + name, Verb(options, tuple(str(p.name) for p in seen if isinstance(p, click.Argument)))
        if isinstance(verb, click.Group):
            yield from all_verbs(click.Context(verb, ctx), f"{before}{name} ")


def answer(request: str, line: str, verbs: Mapping[str, Verb]) -> str:
    """Print the answer to `-sc install=SHELL` or `-sc query=SHELL`; `verbs` are the command line's, `pods stop` among
    them."""
    what, _, shell = request.partition("=")
    if what not in ("install", "query") or shell not in SCRIPTS:
        shells = ", ".join(f"install={name}" for name in SCRIPTS)
        raise RequestError(Problem(f"-sc {request} is not known", "command line", f"one of {shells}"))
    return SCRIPTS[shell] if what == "install" else "".join(f"{_escaped(word)}\n" for word in candidates(line, verbs))


def candidates(line: str, verbs: Mapping[str, Verb]) -> list[str]:
    """Completions of the last word of `line` (an empty one after a space): sorted, whole words."""
    typed = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|\S)+", line)]
    word = "" if line[-1:].isspace() or not typed else typed.pop()
    program = next((i for i, w in enumerate(typed) if Path(w).name == "runner"), -1)
    before = typed[program + 1 :]
    name = next((name for name in (" ".join(before[:2]), *before[:1]) if name in verbs), None)
    verb = verbs[name or "run"]
    given = [w for w in before[len(name.split()) if name else 0 :] if not w.startswith("-")]
    if word.startswith("-"):
        found = iter(verb.options)
    elif name == "list":
        found = iter((*conf_files.GROUPS, "recipes"))
    elif name == "explain" and not given:
        found = _keys(word, end="")
    elif verb.argument_at(len(given)) in _RUN_ARGUMENTS:
        found = _runs(word)
    elif "words" not in verb.arguments and name is not None:  # verbs of a group; else files, which the shell knows
        found = (one.partition(" ")[2] for one in verbs if one.startswith(f"{name} "))
    elif "=" in word:
        found = _values(word, before)
    else:
        found = chain(_keys(word, end="="), _files(word, _STARTS), () if before else (v for v in verbs if " " not in v))
    return sorted({candidate for candidate in found if candidate.startswith(word)})


def _keys(word: str, end: str) -> Iterator[str]:
    """Keys once a group is named, `train.…`: there are a hundred. Before that, groups and choices."""
    if "." in word:
        return (f"{key}{end}" for key in known_keys() if "." in key)
    choices = (f"{choice}=" for choice in (*conf_files.GROUPS, "recipe") if end)
    return chain(choices, (f"{group}." for group in RunSpec.model_fields))


def _values(word: str, before: list[str]) -> Iterator[str]:
    key, _, value = word.partition("=")
    own = tuple(Path(folder) for flag, folder in pairwise(before) if flag == "--config-dir")
    names = (
        conf_files.recipes() if key == "recipe" else conf_files.options(key, own) if key in conf_files.GROUPS else ()
    )
    files = _files(value, _STARTS[:2] if key == "recipe" else ("",)) if key in _PATHS and value else ()
    return (f"{key}={value}" for value in (*names, *allowed_words(key), *files))


def _runs(word: str) -> Iterator[str]:
    """Folders of runs below what is typed, else below `runs/`: `runs/<id>`, or the id alone where that was begun."""
    parent = os.path.dirname(word)
    for entry in _entries(parent or "."):
        if os.path.isfile(os.path.join(entry.path, "spec.json")):
            yield os.path.join(parent, entry.name)
        elif entry.is_dir() and word and parent:
            yield os.path.join(parent, entry.name) + "/"
    if not parent:
        ids = [e.name for e in _entries("runs") if os.path.isfile(os.path.join(e.path, "spec.json"))]
        yield from (name for name in ids if word and name.startswith(word))
        yield from (f"runs/{name}" for name in ids)


def _files(word: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Files with one of the endings, and folders, where a path has been begun."""
    parent = os.path.dirname(word)
    for entry in _entries(os.path.expanduser(parent) or ".") if word else ():
        if entry.name.startswith(".") and not os.path.basename(word).startswith("."):
            continue
        if entry.is_dir():
            yield os.path.join(parent, entry.name) + "/"
        elif entry.name.endswith(endings):
            yield os.path.join(parent, entry.name)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _escaped(word: str) -> str:
    """As a shell wants it typed: a blank or a quote of a path behind a backslash."""
    return re.sub(r"([ \t'\"\\$&()|;<>*?`#!])", r"\\\1", word)
