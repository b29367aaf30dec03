"""Take userfaultfd(2) away from this process, as container runtimes do by default."""

from __future__ import annotations

import errno
import os
import platform
import struct
from typing import Any

from cffi import FFI

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_NUMBERS = {"x86_64": (317, 323)}  # seccomp(2), userfaultfd(2)


# Made at import: who drops privileges first may not be able to read cffi's modules any more.
ffi = FFI()
ffi.cdef("int prctl(int, ...); long syscall(long, ...);")
libc: Any = ffi.dlopen(None)


def deny_userfaultfd() -> None:
    """For every thread, for good. Source: seccomp(2).

    :raises OSError: this kernel refuses filters. :raises KeyError: another architecture.
    """
    seccomp, userfaultfd = _NUMBERS[platform.machine()]
    # Classic BPF over struct seccomp_data, whose first word is the system call's number.
    program = (
        (0x20, 0, 0, 0),  # load it
        (0x15, 0, 1, userfaultfd),  # equal: go on; else skip one
        (0x06, 0, 0, 0x00050000 | errno.EPERM),  # return this errno
        (0x06, 0, 0, 0x7FFF0000),  # allow
    )
    code = ffi.from_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    address = int(ffi.cast("uintptr_t", code))
    fprog = ffi.from_buffer(struct.pack("HxxxxxxP", len(program), address))
    zero = ffi.cast("long", 0)
    words = (_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC)
    refused = libc.prctl(_PR_SET_NO_NEW_PRIVS, ffi.cast("long", 1), zero, zero, zero)
    refused = refused or libc.syscall(seccomp, *(ffi.cast("long", word) for word in words), fprog)
    if refused:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
