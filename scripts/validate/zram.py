"""Swap in compressed memory: a zram device of our own, for as long as it is needed.

It makes MADV_PAGEOUT really swap, without a disk. Swapping is on only while a case that needs it
runs; other processes may swap to it too then (under memory pressure only).
"""

import contextlib
import errno
import os
import signal
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.validate import raw
from scripts.validate.kinds import PAGE

_CONTROL = Path("/sys/class/zram-control")
_BYTES = 256 << 20
_BUSY_S = 10.0
_ENDING = (signal.SIGTERM, signal.SIGINT)


def _write_header(device: str) -> None:
    """What mkswap writes: version 1, the last page's number, and the magic at the page's end."""
    page = bytearray(PAGE)
    struct.pack_into("<III", page, 1 << 10, 1, _BYTES // PAGE - 1, 0)
    page[-10:] = b"SWAPSPACE2"
    fd = os.open(device, os.O_WRONLY)
    try:
        os.pwrite(fd, page, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _node(number: int) -> str:
    """The device file; made where nothing (devtmpfs, udev) makes it."""
    path = f"/dev/zram{number}"
    if not os.path.exists(path):
        major, minor = map(int, Path(f"/sys/block/zram{number}/dev").read_text().split(":"))
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(major, minor))
    return path


@contextlib.contextmanager
def device() -> Iterator[str]:
    """A new zram device, ready to be swapped to.

    :raises OSError: no zram, or not allowed.
    """
    number = None
    # A signal whose handler raises must not come between the making of a device and the note of it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        number = int((_CONTROL / "hot_add").read_text())
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        (Path(f"/sys/block/zram{number}") / "disksize").write_text(str(_BYTES))
        path = _node(number)
        _write_header(path)
        yield path
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if number is not None:
            _reset(Path(f"/sys/block/zram{number}") / "reset")
            (_CONTROL / "hot_remove").write_text(str(number))


def _reset(file: Path) -> None:
    """Whoever looks at new block devices (udev, blkid) may have it open for a moment: EBUSY."""
    until = time.monotonic() + _BUSY_S
    while True:
        try:
            file.write_text("1")
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def swapping_to(path: str) -> Iterator[None]:
    """:raises OSError: swapon or swapoff refuses."""
    name = path.encode() + b"\0"
    try:
        _check(raw.syscall(raw.SYS_SWAPON, name, 0), f"swapon {path}")
        yield
    finally:  # also when a signal's handler raised as soon as swapon was done
        result = raw.syscall(raw.SYS_SWAPOFF, name)
        if result != -errno.EINVAL:  # which says that it was not on
            _check(result, f"swapoff {path}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, what)
