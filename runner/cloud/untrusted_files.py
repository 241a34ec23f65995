"""Files received from a pod: plain files below the run directory, within a limit; everything else is refused.

A pod is a stranger's machine. No link is followed on the way to a file, and none is kept: folders are opened one by
one, without following links (openat(2), O_NOFOLLOW), so that what is checked is what is written, even if the pod
changes it meanwhile. One that sends without end would fill the disk of whoever rents it: a run holds no more than its
plan says, and the last of the disk stays free.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.errors import Problem, RunFailedError
from runner.rundir import plain_files
from runner.rundir.directory import RunDir

LONGEST_NAME = 200
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""A file system that has no fsync(2), such as some in user space."""
RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 20
"""What stays free: a GiB, or a twentieth of a small disk."""
TIMES_PLANNED = 4
MORE_BYTES = 20 << 30
"""Logs, profiles, what packages leave: on top of so many times what the plan says of disks."""
FOLLOWED_BYTES = 4 << 30
"""Logs and measurements while a run is followed: 15 million steps of 300 bytes."""
FOLLOWED_FILES = 5_000
MOST_FILES = 200_000


class TooMuchError(RunFailedError):
    """The pod has, or sends, more than there is room for here, or than a run can hold."""


class NotPlainError(OSError):
    """A name that leads out of the folder, or to something that is no plain file."""


def parts_of(name: str) -> list[str]:
    """The parts of a relative name; NotPlainError for `..`, absolute, overlong and unprintable ones."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        raise NotPlainError(f"{name[:LONGEST_NAME]!r} is no name of a file in a run")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise NotPlainError(f"{name[:LONGEST_NAME]!r} has letters that cannot be shown")
    return parts


@contextmanager
def folder_of(root: Path, name: str) -> Iterator[tuple[int, str]]:
    """The open folder below `root` that a file is in, made where it is missing, and the file's own name in it.

    OSError where a link, or a file, is in the way.
    """
    *folders, last = parts_of(name)
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folders:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=handle)
            inner = os.open(part, FOLDER, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle, last
    finally:
        os.close(handle)


def write_at(root: Path, name: str, at: int, content: bytes) -> None:
    """Let a file end with `content`, which begins at byte `at`. OSError for what is no plain file, or leaves a gap."""
    with folder_of(root, name) as (folder, last):
        handle = os.open(last, FILE, 0o644, dir_fd=folder)
        with os.fdopen(handle, "r+b") as stream:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode) or not 0 <= at <= facts.st_size:
                raise NotPlainError(f"{name} cannot be continued at byte {at}")
            stream.seek(at)
            stream.write(content)
            stream.truncate()


def write_whole(root: Path, name: str, content: bytes) -> None:
    """Put `content` in a file's place, whole or not at all."""
    with folder_of(root, name) as (folder, last):
        temporary = f".{last}.tmp"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        with os.fdopen(os.open(temporary, FILE | os.O_EXCL, 0o644, dir_fd=folder), "wb") as stream:
            stream.write(content)
        os.replace(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)


def delete_special_files(folder: Path) -> list[str]:
    """Delete what is neither a folder nor a plain file with a plain name below `folder`; what it was, a line each."""
    found = []
    for path, folders, files, handle in os.fwalk(folder, topdown=False, follow_symlinks=False):
        for name in (*folders, *files):
            shown = str(Path(path, name).relative_to(folder))
            facts = os.stat(name, dir_fd=handle, follow_symlinks=False)
            what = plain_files.special_kind(facts.st_mode) or _wrong(name)
            if what and not stat.S_ISDIR(facts.st_mode):
                os.unlink(name, dir_fd=handle)
                found.append(f"{shown!a} is {what}")
    return found


def _wrong(name: str) -> str:
    try:
        parts_of(name)
    except NotPlainError:
        return "no name that can be shown"
    return ""


def move(source: Path, target: Path, name: str) -> None:
    """A plain file `name` from below one folder to below the other, over what was there."""
    with folder_of(source, name) as (here, last), folder_of(target, name) as (there, _):
        os.replace(last, last, src_dir_fd=here, dst_dir_fd=there)


def flush_folder(folder: Path) -> None:
    """Have everything below a folder on the disk (fsync(2)). OSError where the disk does not take it: a full one, or a
    quota, is told on some file systems by this alone."""
    for _, _, files, handle in os.fwalk(folder, follow_symlinks=False):
        for name in files:
            if stat.S_ISREG(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
                try:
                    _sync(file)
                finally:
                    os.close(file)
        _sync(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def free_bytes(folder: Path) -> int:
    """Bytes that may be written below a folder; 0 where only the reserve is left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    disk = shutil.disk_usage(place)
    return max(0, disk.free - min(RESERVE_BYTES, disk.total // RESERVE_SHARE))


def max_bytes(run: RunDir) -> int:
    """Bytes that a run can hold by its plan, or that there is room for, whichever is less."""
    planned = run.read("plan.json").get("disk_gib")
    if not isinstance(planned, (int, float)) or not 0 < planned < 1e9:
        return free_bytes(run.path)
    return min(free_bytes(run.path), int(TIMES_PLANNED * planned * (1 << 30)) + MORE_BYTES)


def check_size(size: int, files: int, most: int, folder: Path) -> None:
    """TooMuchError for what a pod says it has."""
    if size > most:
        raise too_much_error(f"the pod has {shown_size(size)} to send", most, folder)
    if files > MOST_FILES:
        raise TooMuchError(Problem(f"the pod has {files:,} files to send: no run has so many", None, _look(folder)))


def too_much_error(what: str, most: int, folder: Path) -> TooMuchError:
    """TooMuchError with the limit, and what to do about it."""
    if most >= free_bytes(folder):
        remedy = f"make room at {os.fspath(folder.parent)}, then fetch the run; what stays in the pod is kept there"
        return TooMuchError(Problem(f"{what}, and there is room for {shown_size(most)} here", None, remedy))
    return TooMuchError(
        Problem(f"{what}, more than a run of this plan can hold ({shown_size(most)})", None, _look(folder))
    )


def _look(folder: Path) -> str:
    """What to do about a pod that has more to send than a run of this plan, for a folder of the run's directory."""
    run = next((place.name for place in (folder, *folder.parents) if (place / "spec.json").is_file()), "RUN")
    return (
        f"python -m runner pods ssh {run}, delete what does not belong to the run, then python -m runner fetch {run}; "
        f"or python -m runner pods terminate {run} gives the pod up, with all it has"
    )


def shown_size(size: int) -> str:
    """A size such as `1.2 GB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
