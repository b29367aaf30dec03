"""Pinning pages from user space: io_uring fixed buffers, and direct writes to a file.

Both are ordinary interfaces that pin as drivers do, so no test-only kernel option is needed.
"""

import contextlib
import os
import struct
import tempfile
from pathlib import Path

from scripts.validate import raw
from scripts.validate.check import Skipped
from scripts.validate.kinds import PAGE
from uffd import Mapping

_PARAMETERS_BYTES = 120
_REGISTER_BUFFERS = 0
_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def why_not() -> Skipped | None:
    """Why io_uring cannot pin here; ``None`` when it can."""
    with Mapping.anonymous(PAGE) as probe:
        probe.store(0, 1)
        try:
            os.close(pin(probe.address, PAGE))
        except OSError as error:
            fixable = _DISABLED.exists() and _DISABLED.read_text().strip() != "0"
            remedy = f"echo 0 > {_DISABLED}" if fixable else None
            return Skipped(f"io_uring cannot pin pages here: {error}", remedy)
    return None


def pin(address: int, length: int) -> int:
    """Pin a range for long, for writing (which faults it in). Closing the result unpins.

    :raises OSError: no io_uring, or more than the locked-memory limit.
    """
    parameters = bytes(_PARAMETERS_BYTES)
    buffer = bytearray(parameters)
    ring = raw.syscall(raw.SYS_IO_URING_SETUP, 1, raw.buffer_address(buffer))
    if ring < 0:
        raise OSError(-ring, "io_uring_setup")
    vector = struct.pack("<QQ", address, length)
    result = raw.syscall(raw.SYS_IO_URING_REGISTER, ring, _REGISTER_BUFFERS, vector, 1)
    if result < 0:
        os.close(ring)
        raise OSError(-result, "io_uring_register")
    return ring


def direct_write(address: int, length: int) -> int:
    """Write a range to a file past the page cache; bytes written or minus the error."""
    fd, name = tempfile.mkstemp(prefix="validate-kernel-")
    try:
        os.unlink(name)
        with contextlib.closing(open(f"/proc/self/fd/{fd}", "rb")):
            direct = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            return raw.write(direct, address, length)
        finally:
            os.close(direct)
    except OSError as error:
        return -(error.errno or 22)
    finally:
        os.close(fd)
