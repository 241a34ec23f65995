"""Python files of the user, named as `FILE.py:NAME`: reward functions, objectives, trackers, row formats.

They are loaded where they are used. Before that, a file is parsed and not run: it may import what only the machine that
trains has.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.config.did_you_mean import nearest
from runner.errors import Problem, RequestError
from runner.paths import PACKAGE
from runner.spec import DataSpec, Grpo
from runner.spec.part import is_own

_LOADED: dict[str, str] = {}
"""Keys by the files that they named."""


def load(name: str, key: str, kind: str = "class") -> Any:
    """Class or function that `FILE.py:NAME` names; RequestError from `key` for a file that fails or lacks the name."""
    file, _, wanted = name.rpartition(":")
    path, source = Path(file).expanduser(), f"{key}={name}"
    if not path.is_file():
        raise RequestError(Problem(f"there is no {file}", source, "name a Python file"))
    made = importlib.util.spec_from_file_location(f"user_code_{path.stem}", path)
    assert made is not None and made.loader is not None
    _LOADED[str(made.origin)] = key
    module = importlib.util.module_from_spec(made)
    sys.path.insert(0, str(path.absolute().parent))  # as `python FILE` does: what lies beside it can be imported
    try:
        made.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        what = f"{file} cannot be read: {type(error).__name__}: {error}"
        raise RequestError(Problem(what, source, "run it by itself to see where")) from error
    found = getattr(module, wanted, None)
    if not callable(found):
        raise RequestError(Problem(f"{file} has no {kind} {wanted}", source, "define it"))
    return found


def user_line_of(error: BaseException) -> str | None:
    """The innermost line of a user's file that an error came through, with the key that named the file; None where it
    came through none."""
    for step in reversed(traceback.extract_tb(error.__traceback__)):
        if key := _LOADED.get(step.filename):
            return f"{key}: {step.filename}, line {step.lineno}, in {step.name}"
    return None


# ── checked before a run ───────────────────────────────────────────────────────────────────────


ALWAYS = ("prompts", "completions", "completion_ids")
"""What every reward function is given, besides the columns of the rows; TRL adds `trainer_state` and others."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def reward_problems(objective: Grpo, columns: Iterable[str] | None, *, here: bool) -> list[Problem]:
    """Everything that is wrong; `columns` are those of all rows (None: not known), `here`: this machine trains."""
    found = [] if objective.reward_regex is None or (bad := regex_problem(objective.reward_regex)) is None else [bad]
    given = None if columns is None else {*ALWAYS, *columns} - {"prompt"}
    for name in filter(is_own, objective.rewards):
        source = f"objective.rewards={name}"
        node, wrong = _defined(name, source, "function", here)
        found += wrong + (_signature(node, given, source) if isinstance(node, _Function) else [])
    return found


_ANSWERS = ("solution", "ground_truth", "final_answer", "expected_answer", "correct_answer", "gold", "target", "label")


def nothing_right(columns: Iterable[str]) -> Problem:
    """Return the problem of rows without an answer: every reward would be zero."""
    named = next((name for name in _ANSWERS if name in set(columns)), None)
    remedy = f"write data.answer_field={named or '…'}, or objective.rewards=[./my.py:score] for a function of your own"
    return Problem("exact_match compares with the row's answer, and no row has one", "objective.rewards", remedy)


def regex_problem(regex: str) -> Problem | None:
    """Return the problem of `objective.reward_regex`, or None."""
    try:
        re.compile(regex, re.DOTALL)
    except re.error as error:
        return Problem(f"objective.reward_regex={regex!r}: {error}", None, "correct it")
    return None


def class_problems(name: str, key: str, base: str, *, here: bool) -> list[Problem]:
    """Everything that is wrong with a class of the user's, `FILE.py:CLASS`, which has to be derived from `base`."""
    source = f"{key}={name}"
    node, found = _defined(name, source, "class", here)
    if isinstance(node, _Function) or (isinstance(node, ast.ClassDef) and not _may_derive(node, name)):
        what = f"{name} is no class" if isinstance(node, _Function) else f"{name} is derived from no other class"
        found.append(Problem(what, source, f"derive it from {base}"))
    elif isinstance(node, ast.ClassDef) and not found:
        wanted = base.partition(" of ")[0].rpartition(".")[2]
        file = Path(name.rpartition(":")[0]).expanduser()
        if _derives(node, file, wanted) is False:
            what = f"{name} is derived from {', '.join(map(ast.unparse, node.bases))}, and not from {wanted}"
            found.append(Problem(what, source, f"derive it from {base}"))
    return found


def _derives(node: ast.ClassDef, file: Path, wanted: str) -> bool | None:
    """Whether a class has the base of that name which is this project's; None where reading alone does not tell."""
    if file.resolve().is_relative_to(PACKAGE) and node.name == wanted:
        return True
    answers = [_base_derives(base, file, wanted) for base in node.bases]
    if any(answers):
        return True
    return None if None in answers or node.keywords or node.decorator_list else False


def _base_derives(base: ast.expr, file: Path, wanted: str) -> bool | None:
    ours = file.resolve().is_relative_to(PACKAGE)
    if isinstance(base, ast.Subscript):  # Generic[T]
        base = base.value
    if not isinstance(base, ast.Name):
        return False if ours else None  # of a library: none of its classes is derived from ours
    tree = ast.parse(file.read_bytes())
    defined = dict(_bound(tree.body)).get(base.id)
    if isinstance(defined, ast.ClassDef):
        return _derives(defined, file, wanted)
    for node in ast.walk(tree):
        for one in node.names if isinstance(node, ast.ImportFrom) and node.module and not node.level else ():
            if (one.asname or one.name) == base.id and isinstance(node, ast.ImportFrom):
                return _imported_derives(str(node.module).split("."), one.name, wanted, ours)
    return False if ours or hasattr(builtins, base.id) else None


def _imported_derives(module: list[str], name: str, wanted: str, ours: bool) -> bool | None:
    if module[0] != PACKAGE.name:
        return False if ours else None
    place = PACKAGE.joinpath(*module[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not file.is_file():
        return None
    found = dict(_bound(ast.parse(file.read_bytes()).body)).get(name)
    if isinstance(found, ast.ClassDef):
        return _derives(found, file, wanted)
    return _base_derives(ast.Name(name), file, wanted)  # which imports it itself


def _may_derive(node: ast.ClassDef, name: str) -> bool:
    """A base of the class comes from outside the file, as far as can be read; `object` and its like are no bases."""
    tree = ast.parse(Path(name.rpartition(":")[0]).expanduser().read_bytes())
    inside = dict(_bound(tree.body))
    open_classes, seen = [node], {node.name}
    while open_classes:
        one = open_classes.pop()
        if one.decorator_list or one.keywords:
            return True  # whatever those make of it
        for base in one.bases:
            defined = inside.get(base.id) if isinstance(base, ast.Name) else None
            if isinstance(defined, ast.ClassDef):
                open_classes += [defined] if defined.name not in seen else []
                seen.add(defined.name)
            elif not (isinstance(base, ast.Name) and base.id not in inside and hasattr(builtins, base.id)):
                return True
    return False


def _defined(name: str, source: str, kind: str, here: bool) -> tuple[ast.stmt | None, list[Problem]]:
    """The statement that defines a name in a file, where it is one, and what is wrong with the file."""
    file, _, wanted = name.rpartition(":")
    try:
        tree = ast.parse(Path(file).expanduser().read_bytes(), file)
    except OSError as error:
        return None, [Problem(f"{file} cannot be read: {error.strerror}", source, "name a Python file")]
    except (SyntaxError, ValueError) as error:  # a null byte is a ValueError
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        what = f"{file} cannot be read: {line}{type(error).__name__}: {getattr(error, 'msg', error)}"
        return None, [Problem(what, source, f"correct it: python {file} shows where")]
    bound: dict[str, ast.stmt | None] = dict(_bound(tree.body))
    if wanted not in bound and not _is_dynamic(tree):
        sort = _Function if kind == "function" else ast.ClassDef
        near = nearest(wanted, [key for key, node in bound.items() if isinstance(node, sort)])
        what = f"{file} has no {kind} {wanted}"
        return None, [Problem(what, source, f"did you mean {file}:{near}?" if near else "define it")]
    found = list(_absent(tree, file, source)) if here else list(_left_behind(file, source))
    return bound.get(wanted), found


def _signature(node: _Function, given: set[str] | None, source: str) -> list[Problem]:
    """Parameters that nobody fills, and no `**` for what else there is."""
    if node.decorator_list:
        return []
    said = f"{node.name}({ast.unparse(node.args)})"
    if isinstance(node, ast.AsyncFunctionDef):
        return [Problem(f"{said} is asynchronous", source, "write def instead of async def")]
    found = []
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    optional = positional[len(positional) - len(args.defaults) :]
    optional += [arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is not None]
    wanted = [arg.arg for arg in [*positional, *args.kwonlyargs] if arg not in optional]
    missing = [] if given is None else [name for name in wanted if name not in given]
    if missing:
        have = ", ".join(sorted((given or set()) - set(ALWAYS))) or "none"
        remedy = f"use {', '.join(ALWAYS)} or a column of the rows: {have}"
        found.append(Problem(f"{said} needs {' and '.join(missing)}, which the rows do not have", source, remedy))
    if args.kwarg is None:
        what = f"{said} does not accept its other arguments: the rows' other columns, and TRL's own"
        found.append(Problem(what, source, "end its parameters with **_"))
    return found


def _bound(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt | None]]:
    """Names that a module has once it was run, with their function where it is one."""
    for node in body:
        if isinstance(node, _Function | ast.ClassDef):
            yield node.name, node
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (((one.asname or one.name).partition(".")[0], None) for one in node.names)
        names = (inner for inner in ast.walk(node) if isinstance(inner, ast.Name))
        yield from ((name.id, None) for name in names if isinstance(name.ctx, ast.Store))
        for inner in ("body", "orelse", "finalbody"):
            yield from _bound(getattr(node, inner, ()))
        for handler in getattr(node, "handlers", ()):
            yield from _bound(handler.body)


def _is_dynamic(tree: ast.Module) -> bool:
    """Names may appear that are not written there."""
    stars = (isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in ast.walk(tree))
    names = (isinstance(node, ast.Name) and node.id in ("globals", "exec", "vars") for node in ast.walk(tree))
    return any(stars) or any(names)


def _absent(tree: ast.Module, file: str, source: str) -> Iterator[Problem]:
    """Packages that the file imports at once, and that are neither installed here nor beside it."""
    beside = [str(place.with_suffix("").relative_to(root)) for root, place in _local(tree, Path(file).expanduser())]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            what = f"{file} cannot be read: line {node.lineno}: it belongs to no package, so . names none"
            yield Problem(what, source, f"write from {node.module or '…'} import …: its own folder is looked in")
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in dict.fromkeys(name.partition(".")[0] for name in names):
            if importlib.util.find_spec(name) is None and not any(Path(found).parts[0] == name for found in beside):
                what = f"{file} cannot be read: ModuleNotFoundError: No module named '{name}'"
                yield Problem(what, source, f"pip install {name}, or put what it needs into {Path(file).name}")


def _left_behind(file: str, source: str) -> Iterator[Problem]:
    """The user's own modules that the file imports: a pod gets the file alone."""
    own, *others = source_files(file)
    if others:
        names = ", ".join(sorted({Path(other).name for other in others}))
        what = f"{file} imports modules of this machine ({names}), and a pod gets {Path(own).name} alone"
        yield Problem(what, source, f"put what it needs into {Path(own).name}")


# ── the user's own modules ─────────────────────────────────────────────────────────────────────


def source_files(file: str) -> list[str]:
    """The file and every module of the user's own that it imports, however far, also inside functions: what decides
    what it does. Packages that are installed are not among them, nor is this project's own, however it is installed."""
    found, open_files = [Path(file).expanduser()], [Path(file).expanduser()]
    while open_files:
        place = open_files.pop(0)
        with suppress(OSError, SyntaxError, ValueError):  # whoever imports it says so
            for _, other in _local(ast.parse(place.read_bytes()), place, found[0].parent):
                if other not in found:
                    found.append(other)
                    open_files.append(other)
    return list(map(str, found))


def sources_of_formats(data: DataSpec) -> list[str]:
    """The same of every row format of the user's that `data` names."""
    return [one for name in data.own_formats.values() for one in source_files(name.rpartition(":")[0])]


def _local(tree: ast.Module, file: Path, folder: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """What the imports of a module may name below `folder` or another of the user's own: that and the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, level = [one.name for one in node.names], 0
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            names, level = [prefix + one.name for one in node.names], node.level
        else:
            continue
        roots = [*file.parents[level - 1 : level]] if level else _roots(folder or file.parent)
        for name in names:
            parts = name.split(".")
            if not level and _is_own(parts):
                continue
            for root in roots:
                places = [root.joinpath(*parts[: number + 1]) for number in range(len(parts))]
                files = [one for p in places for one in (p / "__init__.py", p.with_name(f"{p.name}.py"))]
                if there := [one for one in files if one.is_file()]:
                    yield from ((root, one) for one in there if not one.resolve().is_relative_to(PACKAGE))
                    break


def _is_own(parts: list[str]) -> bool:
    """A dotted name is a module of this project's package, which is loaded already, whatever lies beside the file."""
    places = [PACKAGE.joinpath(*parts[1:2]), PACKAGE.joinpath(*parts[1:2]).with_suffix(".py")]
    return parts[0] == PACKAGE.name and any(place.exists() for place in places)


def _roots(folder: Path) -> list[Path]:
    """Where Python looks for modules that are not installed: beside the reward function, here, in PYTHONPATH."""
    library = Path(sysconfig.get_paths()["stdlib"])
    others = [Path(name).absolute() for name in sys.path]
    return [folder, *(
        place for place in others
        if not {"site-packages", "dist-packages"} & set(place.parts) and not place.is_relative_to(library)
    )]  # fmt: skip
