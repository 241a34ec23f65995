"""Looks for secrets all the time while something runs: in arguments, in variables, in files."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

MUST_HAVE = {
    "runner": "the launcher: it has the API key and the tokens that it tells the pod",
    "runner.launcher.on_pod": "the training in a pod: the Hub's and wandb's tokens",
    "runner.train": "its worker: the same",
    "runner.train.fork_server": "what forks workers: the same",
    "torch.distributed.run": "what starts its workers: the same",
    "runner.hub.upload": "the upload: the token of where it goes",
}
"""Modules after `python -m` of the only processes that may have a secret among their variables, and why."""
CHILDREN = re.compile(r"from multiprocessing\.\w+ import \w+")
"""What `python -c` has in children of those, which have the variables of their parents."""
COMPILE_WORKER = "/torch/_inductor/compile_worker/"
LIBRARIES_OWN = {"fc-list": "matplotlib's, for a worker's first picture on a machine: it asks for the fonts, and ends"}
"""Programs that a library starts in one of those, with its variables, and which hand them on to nobody."""
PROC = Path("/proc")


class Watch:
    """Used as a context manager. `found` is where a secret was seen, and `arguments` every command line.

    Arguments and variables are those of all processes: pods' too, for a namespace hides nothing from outside. `private`
    is a folder whose keys appear in no other file.
    """

    def __init__(self, secrets: Sequence[str], folders: Sequence[Path], private: Path) -> None:
        self.secrets, self.folders, self.private = secrets, folders, private
        self.found, self.arguments, self.looks = set[str](), set[str](), 0
        self._over, self._seen = threading.Event(), dict[Path, tuple[int, int]]()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.files()

    def hidden(self) -> list[str]:
        """The secrets, and the private keys that there are by now: the lines that no other key has."""
        keys = [file.read_text("utf-8") for file in _files(self.private) if file.suffix != ".pub"]
        return [*self.secrets, *(line for key in keys for line in key.splitlines()[2:-1] if len(line) > 40)]

    def look(self, where: str, text: str) -> None:
        """Note a secret that a text has."""
        self.found |= {f"{where}: {secret[:8]}…" for secret in self.hidden() if secret in text}

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.looks += 1
            self.processes()
            if self.looks % 10 == 0:
                self.files()

    def processes(self) -> None:
        """Of all command lines, and of the variables of all that need no secret: ssh, rsync, sshd, the pod's shell,
        agent and tail, pip, uv, and whatever else there is."""
        for folder in PROC.glob("[0-9]*"):
            try:
                argv = (folder / "cmdline").read_text("utf-8", errors="replace").split("\0")
                variables = (folder / "environ").read_text("utf-8", errors="replace")
            except OSError:
                continue
            words = " ".join(argv)
            if words not in self.arguments:
                self.arguments.add(words)
                self.look("arguments", words)
            if words and not may_have(argv):
                self.look(f"variables of {words}", variables)

    def files(self) -> None:
        """All that have changed since they were last looked at."""
        for file in (file for folder in self.folders for file in _files(folder)):
            try:
                facts = file.stat()
                if self._seen.get(file) == (facts.st_size, facts.st_mtime_ns) or file.parent == self.private:
                    continue
                self._seen[file] = (facts.st_size, facts.st_mtime_ns)
                self.look(str(file), file.read_bytes().decode(errors="replace"))
            except OSError:
                continue


def may_have(argv: Sequence[str]) -> bool:
    """Whether the process of such a command line may have a secret among its variables: by the program or
    the module that Python runs, not by words that stand somewhere in it, as in what ssh is to run there."""
    if not re.fullmatch(r"python[\d.]*", Path(argv[0]).name):
        return Path(argv[0]).name in LIBRARIES_OWN
    for number, word in enumerate(argv[1:-1], 1):
        if word == "-m":
            return argv[number + 1] in MUST_HAVE
        if word == "-c":
            return bool(CHILDREN.match(argv[number + 1]))
        if not word.startswith("-"):
            return COMPILE_WORKER in word
    return False


def _files(folder: Path) -> Iterable[Path]:
    """Plain ones; not what an emulated pod has of its host."""
    return [
        file for file in folder.rglob("*") if ".host" not in file.parts and not file.is_symlink() and file.is_file()
    ]
