"""Real disks that are full or broken: small ext4 file systems in files, mounted where this process alone sees them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import suppress
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID = 0x20000, 0x4000000, 0x20000000


def unshare(flags: int = CLONE_NEWNS) -> None:
    """unshare(2): mounts of this process and its children are nobody else's, and gone with them. OSError without the
    right to do that, which only root has."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "unshare")
    if flags & CLONE_NEWNS:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


class Disk:
    """One file system, mounted at a folder."""

    def __init__(self, place: Path, mib: int = 8) -> None:
        self.place, self.image, self.broken = place, place.with_name(f"{place.name}.img"), False
        place.mkdir(parents=True)
        with self.image.open("wb") as stream:
            stream.truncate(mib << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(self.image)], check=True)
        self._mount()
        (place / "lost+found").rmdir()

    def fill(self, spare: int = 0) -> None:
        """To the last block, or up to `spare` bytes."""
        with (self.place / ".filler").open("ab", buffering=0) as filler:
            for size in (1 << 16, 4096, 1024, 1):
                with suppress(OSError):
                    while os.statvfs(self.place).f_bfree * 4096 > spare:
                        filler.write(bytes(size))

    def free(self) -> None:
        """Make room again."""
        (self.place / ".filler").unlink(missing_ok=True)

    def break_down(self) -> None:
        """As the kernel does at an error of the device: read-only at once, under open files too."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.place)], check=True)
        self.broken = True

    def mend(self) -> None:
        """As after a reboot, with room. What was broken is mounted from a copy: whoever has a mount namespace that was
        made meanwhile, as an emulated pod has, keeps the old file system, and one image is one file system."""
        if self.broken:
            self.close()
            copy = self.image.with_name(f"{self.image.name}.mended")
            subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
            copy.replace(self.image)
            self._mount()
            self.broken = False
        self.free()

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", str(self.place)], check=False)

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.place)], check=True)
