"""File systems of huge pages (hugetlbfs): found, made where there is none, unmounted again.

Those we make carry our name as their source, so the kernel itself remembers which are ours, also
after a crash.

Source: kernel ``Documentation/admin-guide/mm/hugetlbpage.rst``; mount(8).
"""

import errno
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from guestmem.errors import GuestMemoryError
from guestmem.geometry import parse_size, size_option
from guestmem.pools import why_no_pool

OUR_NAME = "postcopy-hugepages"
_DEFAULT = Path("/dev")
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class HugeMount:
    """One mounted hugetlbfs.

    :ivar page_size: bytes of a page of its files.
    """

    directory: Path
    page_size: int
    is_ours: bool


def mounts() -> list[HugeMount]:
    """Every hugetlbfs this process can see, in the order in which they were mounted."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, source, options = after.split(" ", 2)
        if kind != "hugetlbfs":
            continue
        size = re.search(r"\bpagesize=(\w+)", options)
        directory = Path(_unescaped(before.split()[4]))
        page_size = parse_size(size[1]) if size else _statfs_page_size(directory)
        found.append(HugeMount(directory, page_size, source == OUR_NAME))
    return found


def find_mount(page_size: int) -> HugeMount | None:
    """One with pages of this size in which we may make files; ``None``: there is none."""
    for mount in mounts():
        if mount.page_size == page_size and os.access(mount.directory, os.W_OK | os.X_OK):
            return mount
    return None


def make_mount(page_size: int, directory: Path | None = None) -> HugeMount:
    """Mount one, for root only to use (the mode is 0700).

    :param directory: made if missing; ``/dev/hugepages-SIZE`` unless told.
    :raises GuestMemoryError: no pool of that size (``ENODEV``), or mount(8) refused (``EPERM``).
    """
    if (reason := why_no_pool(page_size)) is not None:
        raise GuestMemoryError(errno.ENODEV, reason)
    size = size_option(page_size)
    where = (directory or _DEFAULT / f"hugepages-{size}").resolve()
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestMemoryError(error.errno or errno.EIO, f"{where}", remedy="run as root") from None
    command: list[str | Path] = [
        "mount",
        "-t",
        "hugetlbfs",
        "-o",
        f"pagesize={size},mode=0700",
        OUR_NAME,
        where,
    ]
    _run(command, f"mounting huge pages on {where}")
    return HugeMount(where, page_size, is_ours=True)


def unmount(directory: Path | None = None) -> list[HugeMount]:
    """Unmount what :func:`make_mount` made, and remove the directory if it is empty.

    :param directory: this one only; ``None``: all of ours.
    :raises GuestMemoryError: it is in use (``EBUSY``), or not one of ours (``EINVAL``); those
        before it are unmounted.
    """
    wanted = None if directory is None else directory.resolve()
    ours = [mount for mount in mounts() if mount.is_ours and wanted in (None, mount.directory)]
    if directory is not None and not ours:
        raise GuestMemoryError(errno.EINVAL, f"{directory} was not mounted by 'mount' here")
    for mount in reversed(ours):
        _run(["umount", mount.directory], f"unmounting {mount.directory}")
        try:
            mount.directory.rmdir()
        except OSError:
            continue  # it was there before, with something in it
    return ours


def _run(command: list[str | Path], doing: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise GuestMemoryError(error.errno or errno.ENOENT, doing) from None
    if done.returncode:
        busy = "busy" in done.stderr
        raise GuestMemoryError(
            errno.EBUSY if busy else errno.EPERM,
            f"{doing}: {done.stderr.strip()}",
            remedy="end who uses it" if busy else "run as root",
        )


def _unescaped(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)


def _statfs_page_size(directory: Path) -> int:
    return os.statvfs(directory).f_bsize
