"""`ARCHITECTURE.md`: the rooms of `runner/`, from their docstrings, and which may import which, from the code."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from runner.paths import ASSETS

TEXT = Path(__file__).with_name("architecture.md")
PACKAGE = ASSETS / "runner"
COVERAGE = ASSETS / "benchmarks" / "results" / "coverage.json"

FLOORS = (
    ("errors", "paths"),
    ("spec",),
    ("config",),
    ("rundir", "plan"),
    ("report",),
    ("hub",),
    ("machine",),
    ("data",),
    ("cloud",),
    ("doctor",),
    ("resolve",),
    ("launcher",),
    ("runs",),
    ("cli",),
)
"""Rooms from the ground up: a module imports from its own room and from those on lower floors."""
WORKER = ("errors", "paths", "spec", "config", "rundir", "plan", "report", "hub", "machine", "data")
"""What `train` imports: it runs in processes of its own, here or in a pod, and knows nothing of who started it."""
FRONT = tuple(room for floor in FLOORS for room in floor if room != "cli")
"""What `ui` imports: all that the command line does, and no torch."""
ALONE = {"train": WORKER, "emulator": ("errors", "paths", "report"), "ui": FRONT}
"""Rooms beside the floors, with what they may import. Only `cli` starts the emulator and the page; nothing imports
`train`."""
LAZY = (
    "cli",
    "runs",
    "train.__main__",
    "train.chat",
    "train.tokens.fill_token_cache",
    "train.artifact_verbs",
    "emulator.server",
    "resolve.place",
    "doctor.system",
    "rundir.directory",
)
"""Rooms and modules that may import our own modules inside functions: a verb is imported when it is typed, an executor
when it is needed (a tenth of a second of the half that a typo takes); the worker's entry points say that they load
torch before they do (3 to 10 s); the emulator's S3 server needs moto, which only volumes need; `where.pod` is looked up
through the API, which nothing else of `resolve` needs, and `doctor` asks it about the key of a rented run;
`training.yaml` is written with OmegaConf, which a list of runs does not need."""


@cache
def modules() -> dict[str, Path]:
    """Every module of `runner`, by its dotted name without `runner.`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Our own modules that a file imports when it runs, and whether inside a function; for type checkers alone not."""
    tree = ast.parse(file.read_text("utf-8"))
    known = modules()
    for node, inside in _statements(tree, False):
        if isinstance(node, ast.Import):
            yield from ((a.name[7:], inside) for a in node.names if a.name.startswith("runner."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "runner":
            base = node.module[7:]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield (name if name in known else base), inside


def _statements(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield child, inside
        yield from _statements(child, deeper)


def room_of(module: str) -> str:
    """The first part of a module's name; "" for the package itself."""
    return module.partition(".")[0]


def allowed(importer: str, imported: str) -> bool:
    """Whether a module of room `importer` may import from room `imported`."""
    if importer == imported or imported == "":
        return True
    if importer in ALONE:
        return imported in ALONE[importer]
    if imported in ALONE:
        return importer == "cli" and imported in ("emulator", "ui")
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    return height[imported] < height[importer]


def wrong_imports() -> list[str]:
    """Imports that point the wrong way, each as a sentence."""
    found = []
    for module, file in modules().items():
        room = room_of(module)
        if room in ("", "__main__"):
            continue
        for target, inside in imports(file):
            if not allowed(room, room_of(target)):
                found.append(f"runner.{module} imports runner.{target}: {room} stands below {room_of(target)}")
            if inside and not {room, module} & set(LAZY):
                found.append(f"runner.{module} imports runner.{target} inside a function: only {', '.join(LAZY)} may")
    return found


def pages() -> dict[str, tuple[str, str]]:
    """The page as it is, and as it would be now."""
    page = ASSETS / "ARCHITECTURE.md"
    text = TEXT.read_text("utf-8").replace("<!-- rooms -->", _rooms()).replace("<!-- arrows -->", _arrows())
    return {"ARCHITECTURE.md": (page.read_text("utf-8") if page.is_file() else "", text)}


def _rooms() -> str:
    rows = ["| package | what it does | modules | lines that tests reach |", "|---|---|---:|---:|"]
    known = modules()
    reached = _reached()
    for room in [room for floor in reversed(FLOORS) for room in floor] + list(ALONE):
        own = [name for name in known if room_of(name) == room]
        sentence = (ast.get_docstring(ast.parse(known[room].read_text("utf-8"))) or "").split("\n\n")[0]
        place = f"`runner/{room}/`" if known[room].name == "__init__.py" else f"`runner/{room}.py`"
        rows.append(f"| {place} | {' '.join(sentence.split())} | {len(own)} | {reached.get(room, '–')} |")
    return "\n".join(rows)


def _reached() -> dict[str, str]:
    """Share of each room's statements, of the last `make coverage`."""
    if not COVERAGE.is_file():
        return {}
    sums: dict[str, list[int]] = {}
    for name, counts in json.loads(COVERAGE.read_text("utf-8"))["measured"]["files"].items():
        room = Path(name).parts[1].removesuffix(".py")
        sums[room] = [a + b for a, b in zip(sums.get(room, (0, 0)), counts, strict=True)]
    return {room: f"{1 - missing / of:.0%}" for room, (of, missing) in sums.items() if of}


def _arrows() -> str:
    """The imports between rooms as a Mermaid graph: of each room to the highest ones below it, the rest is implied."""
    direct: dict[str, set[str]] = {}
    for module, file in modules().items():
        room = room_of(module)
        if room not in ("", "__main__"):
            direct.setdefault(room, set()).update(room_of(target) for target, _ in imports(file))
    for room, targets in direct.items():
        targets -= {"", room, "errors", "paths"}
    lines = ["```mermaid", "graph TD"]
    for room in sorted(direct):
        implied = set().union(*(_reach(direct, target) for target in direct[room])) if direct[room] else set()
        lines += [f"  {room} --> {target}" for target in sorted(direct[room] - implied)]
    return "\n".join([*lines, "```"])


def _reach(direct: dict[str, set[str]], room: str) -> set[str]:
    found: set[str] = set()
    for target in direct.get(room, ()):
        found |= {target} | _reach(direct, target)
    return found
