"""ptrace(2) as far as we need it: python-ptrace's binding, and the newer requests it has no name
for.

All requests for one thread come from the thread of ours that seized it: the kernel insists.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from dataclasses import dataclass

from ptrace import PtraceError  # type: ignore[import-untyped]
from ptrace.binding import func, ptrace_registers_t  # type: ignore[import-untyped]

from .errors import TraceeError, TraceeGone

_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_RSEQ = 0x420F
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_NT_X86_XSTATE = 0x202
_SYSGOOD = 1
_EVENT_STOP = 128
_MASK_BYTES = 8
_XSTATE_MAX = 64 << 10
_WALL = 0x40000000


class Registers(ctypes.Structure):
    """``struct user_regs_struct``."""

    _fields_ = ptrace_registers_t._fields_
    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _RseqConfiguration(ctypes.Structure):
    _fields_ = (
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a thread stopped.

    :ivar signal: the signal about to be delivered, 0 for any other kind of stop.
    :ivar is_syscall: at the entry or exit of a system call.
    :ivar is_interrupt: because of :func:`interrupt`, or in a job-control stop.
    """

    signal: int = 0
    is_syscall: bool = False
    is_interrupt: bool = False


def seize(tid: int) -> None:
    """Trace without stopping. Should we die, the thread just runs on: no SIGSTOP is involved."""
    _request(_SEIZE, tid, 0, _SYSGOOD)


def interrupt(tid: int) -> None:
    """Ask for a stop; :func:`wait` tells when it is there."""
    _request(_INTERRUPT, tid)


def wait(tid: int) -> Stop:
    """The next stop. Blocks without the GIL.

    :raises TraceeGone: it ended instead.
    """
    try:
        _, status = os.waitpid(tid, _WALL)
    except ChildProcessError:
        raise TraceeGone(f"thread {tid} is gone") from None
    if not os.WIFSTOPPED(status):
        raise TraceeGone(f"thread {tid} has ended")
    number = os.WSTOPSIG(status)
    if status >> 16 == _EVENT_STOP:
        return Stop(is_interrupt=True)
    if number == signal.SIGTRAP | 0x80:
        return Stop(is_syscall=True)
    return Stop(signal=number)


def resume(tid: int, deliver: int = 0) -> None:
    """Run on, with a signal delivered."""
    _request(func.PTRACE_CONT, tid, 0, deliver)


def resume_to_syscall(tid: int) -> None:
    """Run on to the next entry or exit of a system call."""
    _request(func.PTRACE_SYSCALL, tid)


def detach(tid: int, deliver: int = 0) -> None:
    """Let go of a stopped thread; harmless if it is gone."""
    with contextlib.suppress(TraceeGone):
        _request(func.PTRACE_DETACH, tid, 0, deliver)


def registers(tid: int) -> Registers:
    """A copy."""
    result = Registers()
    _request(func.PTRACE_GETREGS, tid, 0, ctypes.addressof(result))
    return result


def set_registers(tid: int, values: Registers) -> None:
    """All at once."""
    _request(func.PTRACE_SETREGS, tid, 0, ctypes.addressof(values))


def signal_mask(tid: int) -> bytes:
    """Eight bytes, little-endian; what sigsuspend(2) and the like have put aside counts."""
    buffer = ctypes.create_string_buffer(_MASK_BYTES)
    _request(_GETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(buffer))
    return buffer.raw


def set_signal_mask(tid: int, mask: bytes) -> None:
    """What is blocked meanwhile stays pending."""
    buffer = ctypes.create_string_buffer(mask, _MASK_BYTES)
    _request(_SETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(buffer))


def floating_point(tid: int) -> bytes:
    """The extended state as XSAVE lays it out."""
    buffer = ctypes.create_string_buffer(_XSTATE_MAX)
    vector = _IoVec(ctypes.addressof(buffer), _XSTATE_MAX)
    _request(_GETREGSET, tid, _NT_X86_XSTATE, ctypes.addressof(vector))
    return buffer.raw[: vector.length]


def restartable_sequence(tid: int) -> int:
    """Address of the thread's ``struct rseq``; 0: it has none, or the kernel does not tell."""
    found = _RseqConfiguration()
    try:
        _request(_GET_RSEQ, tid, ctypes.sizeof(found), ctypes.addressof(found))
    except TraceeError:
        return 0
    return int(found.pointer)


def _request(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    try:
        func.ptrace(request, tid, address, data)
    except PtraceError as error:
        code = error.errno or 0
        if code == errno.ESRCH:
            raise TraceeGone(f"thread {tid} has ended, or is not stopped") from None
        hint = None
        if code == errno.EPERM:
            hint = "run as root or as its owner; another tracer (gdb, strace) must go first"
        raise TraceeError(f"ptrace of thread {tid}: {os.strerror(code)}", hint=hint) from None
