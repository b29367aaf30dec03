"""Making a stopped thread of another process do system calls.

The thread is borrowed: its registers are set to a call, it runs to the end of it, and gets the next
one. Before the first one a signal frame is laid on its stack (see :mod:`.sigframe`), so that the
thread finds back by itself if we die at any moment: then it does at most the call it was given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from . import ptracing, sigframe
from .errors import TraceeError
from .mappings import ProcessMapping, mappings
from .memory import read_memory, write_memory

_SYSCALL_RETURN = b"\x0f\x05\xc3"  # syscall; ret
_SIGNAL_RETURN = b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05"  # mov $15, %rax; syscall
_USER_CODE_64 = 0x33
_ALL_SIGNALS = b"\xff" * 8
_STACK_ROOM = 16 << 10
_RSEQ_CS_OFFSET = 8
_RSEQ_CS = struct.Struct("<IIQQQ")  # version, flags, start, length, abort


class BorrowedThread:
    """A ``with`` block in which :meth:`call` works. The other threads should stand still as well:
    what they do meanwhile is the caller's concern.

    :param tid: a stopped thread (:class:`~.threads.StoppedThreads`) of process ``pid``.
    """

    def __init__(self, pid: int, tid: int) -> None:
        self._pid = pid
        self._tid = tid

    def __enter__(self) -> Self:
        """:raises TraceeError: the thread cannot be borrowed safely; it is as it was."""
        _refuse_what_calls_would_kill(self._pid)
        tid = self._tid
        self._before = registers = ptracing.registers(tid)
        _check_registers(registers)
        maps = mappings(self._pid)
        _check_stack(maps, registers.rsp, tid)
        code = _Code(self._pid, maps)
        registers = _out_of_sequence(self._pid, tid, registers)
        self._back = sigframe.going_on(registers, afresh=False)
        self._mask = ptracing.signal_mask(tid)
        frame = sigframe.build(
            registers, self._mask, ptracing.floating_point(tid), code.signal_return
        )
        write_memory(self._pid, frame.address, frame.contents)
        self._call = ptracing.Registers.from_buffer_copy(registers)
        self._call.rip, self._call.rsp = code.syscall_return, frame.address
        self._call.orig_rax = (1 << 64) - 1
        self._is_masked = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_masked:
            return
        # In this order: without us, the frame puts the mask back as well as the registers.
        ptracing.set_signal_mask(self._tid, self._mask)
        ptracing.set_registers(self._tid, self._back)

    def call(self, number: int, *arguments: int) -> int:
        """One system call there; its result, ``-errno`` for an error. Blocks while it does.

        :raises TraceeGone: the process was killed meanwhile.
        """
        tid, regs = self._tid, ptracing.Registers.from_buffer_copy(self._call)
        regs.rax = number
        names = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
        for name, value in zip(names, (*arguments, 0, 0, 0, 0, 0, 0), strict=False):
            setattr(regs, name, value & (1 << 64) - 1)
        ptracing.set_registers(tid, regs)
        if not self._is_masked:
            # Only now: should we die before, the frame is in force and restores the mask.
            ptracing.set_signal_mask(tid, _ALL_SIGNALS)
            self._is_masked = True
        self._to_syscall_stop()
        self._to_syscall_stop()
        result = int(ptracing.registers(tid).rax)
        return result - (1 << 64) if result >> 63 else result

    def _to_syscall_stop(self) -> None:
        while True:
            ptracing.resume_to_syscall(self._tid)
            if ptracing.wait(self._tid).is_syscall:
                return


def borrow(pid: int, tids: list[int]) -> BorrowedThread:
    """The thread best borrowed: the first one, whose stack is a process's own and has room."""
    return BorrowedThread(pid, pid if pid in tids else tids[0])


def stub_addresses(pid: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a borrowed thread can be, outside the kernel, before it has found back."""
    code = _Code(pid, mappings(pid))
    return (
        (code.syscall_return, code.syscall_return + len(_SYSCALL_RETURN)),
        (code.signal_return, code.signal_return + len(_SIGNAL_RETURN)),
    )


class _Code:
    """Where the process has the two pieces of code that are needed; both are in its C library."""

    def __init__(self, pid: int, maps: list[ProcessMapping]) -> None:
        self.syscall_return = self.signal_return = 0
        for start, text in _texts(pid, maps):
            if not self.syscall_return and (at := text.find(_SYSCALL_RETURN)) >= 0:
                self.syscall_return = start + at
            if not self.signal_return and (at := text.find(_SIGNAL_RETURN)) >= 0:
                self.signal_return = start + at
            if self.syscall_return and self.signal_return:
                return
        raise TraceeError(
            f"process {pid} has no code for a system call and a signal return that could be used",
            hint="it is not built with glibc or musl; such programs cannot be changed from outside",
        )


def _texts(pid: int, maps: list[ProcessMapping]) -> Iterator[tuple[int, bytes]]:
    for mapping in maps:
        if "x" in mapping.permissions and mapping.name != "[vsyscall]":
            yield mapping.start, read_memory(pid, mapping.start, mapping.length)


def _refuse_what_calls_would_kill(pid: int) -> None:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    if status.get("Seccomp", "0").strip() != "0":
        raise TraceeError(f"process {pid} has a system call filter (seccomp), which may kill it")
    if "shstk" in status.get("x86_Thread_features", ""):
        raise TraceeError(f"process {pid} has a shadow stack: it would not find back by itself")


def _check_registers(registers: ptracing.Registers) -> None:
    if registers.cs != _USER_CODE_64:
        raise TraceeError("the thread does not run 64-bit code")


def _check_stack(maps: list[ProcessMapping], pointer: int, tid: int) -> None:
    """Below a stack pointer there may be somebody else's memory: programs with stacks of their own
    making (Go) keep them among other data."""
    for mapping in maps:
        if mapping.start <= pointer < mapping.end and mapping.name == "[stack]":
            # Room that is not mapped yet would not grow for a write from outside.
            if pointer - mapping.start >= _STACK_ROOM:
                return
            raise TraceeError(f"thread {tid} has less than {_STACK_ROOM >> 10} KiB of stack left")
    raise TraceeError(
        f"thread {tid} does not stand on the stack of its process",
        hint="try again at another moment; programs that make their own stacks cannot be changed",
    )


def _out_of_sequence(pid: int, tid: int, registers: ptracing.Registers) -> ptracing.Registers:
    """A thread stopped inside a restartable sequence must begin it again (rseq(2)): the kernel
    would see to that, but for our having put the thread elsewhere meanwhile."""
    area = ptracing.restartable_sequence(tid)
    if not area:
        return registers
    (at,) = struct.unpack("<Q", read_memory(pid, area + _RSEQ_CS_OFFSET, 8))
    if not at:
        return registers
    _, _, start, length, abort = _RSEQ_CS.unpack(read_memory(pid, at, _RSEQ_CS.size))
    if not start <= registers.rip < start + length:
        return registers
    result = ptracing.Registers.from_buffer_copy(registers)
    result.rip = abort
    return result
