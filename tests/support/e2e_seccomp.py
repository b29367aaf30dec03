"""Take userfaultfd(2) away from this process, as container runtimes do by default."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_NUMBERS = {"x86_64": (317, 323)}  # seccomp(2), userfaultfd(2)

# A classic BPF program over struct seccomp_data, whose first word is the system call's number.
_LOAD_NUMBER = (0x20, 0, 0, 0)
_RET_ALLOW = (0x06, 0, 0, 0x7FFF0000)


def deny_userfaultfd() -> None:
    """For every thread, for good. Source: seccomp(2).

    :raises OSError: this kernel refuses filters. :raises KeyError: another architecture.
    """
    seccomp, userfaultfd = _NUMBERS[platform.machine()]
    program = [
        _LOAD_NUMBER,
        (0x15, 0, 1, userfaultfd),  # equal: go on; else skip one
        (0x06, 0, 0, 0x00050000 | errno.EPERM),  # return this errno
        _RET_ALLOW,
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_char_p]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, fprog
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
