"""Another process's memory and descriptors, from outside and without stopping it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from .errors import TraceeError, TraceeGone

_PRESENT_OR_SWAPPED = 3 << 62
_ENTRY_BYTES = 8
_USERFAULTFD = "anon_inode:[userfaultfd]"


def read_memory(pid: int, address: int, length: int) -> bytes:
    """:raises TraceeError: not all of it is there to be read."""
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            data = os.pread(memory.fileno(), length, address)
    except OSError as error:
        raise TraceeError(f"reading {address:#x} of process {pid}: {error.strerror}") from None
    if len(data) != length:
        raise TraceeError(f"reading {address:#x}+{length:#x} of process {pid}: cut short")
    return data


def write_memory(pid: int, address: int, data: bytes) -> None:
    """:raises TraceeError: not all of it could be written."""
    try:
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            written = os.pwrite(memory.fileno(), data, address)
    except OSError as error:
        raise TraceeError(f"writing {address:#x} of process {pid}: {error.strerror}") from None
    if written != len(data):
        raise TraceeError(f"writing {address:#x}+{len(data):#x} of process {pid}: cut short")


def populated(
    pid: int, address: int, length: int, *, unit: int | None = None
) -> Iterator[tuple[int, int]]:
    """Offset and length, bytes, of the units of a range in which a page is in memory or in swap.

    :param unit: a multiple of the base page, which it is unless told.
    :raises TraceeGone: no such process.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    unit = unit or page
    try:
        pagemap = open(f"/proc/{pid}/pagemap", "rb", buffering=0)  # noqa: SIM115
    except (FileNotFoundError, ProcessLookupError):
        raise TraceeGone(f"there is no process {pid}") from None
    with pagemap:
        for offset in range(0, length, unit):
            where = (address + offset) // page * _ENTRY_BYTES
            entries = os.pread(pagemap.fileno(), unit // page * _ENTRY_BYTES, where)
            if any(e & _PRESENT_OR_SWAPPED for (e,) in struct.iter_unpack("<Q", entries)):
                yield offset, unit


def descriptors(pid: int) -> dict[int, str]:
    """What each descriptor of a process points at.

    :raises TraceeGone: no such process. :raises TraceeError: not allowed.
    """
    folder = Path(f"/proc/{pid}/fd")
    found = {}
    try:
        for name in os.listdir(folder):
            try:
                found[int(name)] = os.readlink(folder / name)
            except FileNotFoundError:
                continue
    except FileNotFoundError:
        raise TraceeGone(f"there is no process {pid}") from None
    except PermissionError:
        raise TraceeError(f"process {pid} is somebody else's", hint="run as root") from None
    return found


def userfaultfds(pid: int) -> list[int]:
    """Its descriptors of userfaultfds."""
    return [fd for fd, target in descriptors(pid).items() if target == _USERFAULTFD]
