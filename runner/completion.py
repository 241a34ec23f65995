"""Shell completion: `eval "$(python -m runner -sc install=bash)"`, then verbs, choices, keys and what they may be.

The shell asks with the line so far in `COMP_LINE`. Hydra's own completion knows neither verbs nor
`python -m` nor the values of a key; this one needs no composition, so an answer takes 0.2 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path

from runner import catalogue
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.suggest import allowed_words, known_keys

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


def answer(request: str, line: str, verbs: Mapping[str, Iterable[str]]) -> str:
    """What `-sc install=SHELL` or `-sc query=SHELL` prints; `verbs` with their options are the command line's."""
    what, _, shell = request.partition("=")
    if what not in ("install", "query") or shell not in SCRIPTS:
        shells = ", ".join(f"install={name}" for name in SCRIPTS)
        raise RequestError(Problem(f"-sc {request} is not known", "command line", f"one of {shells}"))
    return SCRIPTS[shell] if what == "install" else "".join(f"{word}\n" for word in candidates(line, verbs))


def candidates(line: str, verbs: Mapping[str, Iterable[str]]) -> list[str]:
    """What the last word of `line` may become (an empty one after a space): sorted, whole words."""
    typed = line.split()
    word = "" if line[-1:].isspace() or not typed else typed.pop()
    program = next((i for i, w in enumerate(typed) if Path(w).name == "runner"), -1)
    before = typed[program + 1 :]
    verb = before[0] if before and before[0] in verbs else None
    if word.startswith("-"):
        found = iter(verbs[verb or "run"])
    elif verb == "list":
        found = iter((*catalogue.GROUPS, "recipes"))
    elif verb == "explain" and len(before) == 1:
        found = _keys(word, end="")
    elif verb in ("runs", "chat"):
        found = iter(())  # files: the shell knows them
    elif "=" in word:
        found = _values(word.partition("=")[0], before)
    else:
        found = iter((*_keys(word, end="="), *(() if before else verbs)))
    return sorted({candidate for candidate in found if candidate.startswith(word)})


def _keys(word: str, end: str) -> Iterator[str]:
    """Keys once a group is named, `train.…`: there are a hundred. Before that, groups and choices."""
    if "." in word:
        return (f"{key}{end}" for key in known_keys() if "." in key)
    choices = (f"{choice}=" for choice in (*catalogue.GROUPS, "recipe") if end)
    return chain(choices, (f"{group}." for group in RunSpec.model_fields))


def _values(key: str, before: list[str]) -> Iterator[str]:
    own = tuple(Path(folder) for flag, folder in pairwise(before) if flag == "--config-dir")
    names = catalogue.recipes() if key == "recipe" else catalogue.options(key, own) if key in catalogue.GROUPS else ()
    return (f"{key}={value}" for value in (*names, *allowed_words(key)))
