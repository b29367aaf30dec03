"""Run ``postcopy probe`` under a seccomp filter: ``python -m tests.support.probe_filters HOW ...``.

HOW is ``CALL=ACTION``: a system call of :data:`NUMBERS`, and ``kill`` or an errno's name.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

NUMBERS = {"x86_64": {"memfd_create": 319, "userfaultfd": 323, "process_madvise": 440}}
_SECCOMP = {"x86_64": 317}
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_KILL_PROCESS, _RETURN_ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000


def is_supported() -> bool:
    """Whether the numbers of this machine are known here."""
    return platform.machine() in NUMBERS


def install(call: str, action: str) -> None:
    """For this process and its children, for good. :raises OSError: the kernel refused."""
    machine = platform.machine()
    what = _KILL_PROCESS if action == "kill" else _RETURN_ERRNO | getattr(errno, action)
    program = [
        (0x20, 0, 0, 0),  # load the number
        (0x15, 0, 1, NUMBERS[machine][call]),  # equal: go on; else skip one
        (0x06, 0, 0, what),
        (0x06, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    fprog = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_char_p]
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        _SECCOMP[machine], _SET_MODE_FILTER, 0, fprog
    ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    from migration.commands.main import main

    install(*sys.argv[1].split("="))
    sys.exit(main(["probe", *sys.argv[2:]]))
