"""A way back that needs nobody: the signal frame of a thread that was made to do something else.

Before a thread's registers are changed, what it would look like had a signal interrupted it is
written onto its stack, and its new stack pointer points there. Whatever it does next ends in a
``ret`` to the C library's own signal return, which has the kernel put everything back: registers,
signal mask, extended state. So a tracer that dies at any moment leaves a thread that goes on.

Source: the x86-64 ABI's signal frame as in the kernel's ``arch/x86/include/uapi/asm/sigcontext.h``
and ``ucontext.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .errors import TraceeError
from .ptracing import Registers

RED_ZONE = 128
_UCONTEXT_HEAD = struct.Struct("<QQ QiiQ")  # flags, link, stack: pointer, flags, padding, size
_SIGCONTEXT = struct.Struct("<8Q 8Q Q Q 4H 4Q")
_RESERVED = struct.Struct("<8Q")
_UC_FP_XSTATE, _UC_SIGCONTEXT_SS, _UC_STRICT_RESTORE_SS = 1, 2, 4
_SS_DISABLE = 2
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_SW_RESERVED = 464
_XSTATE_ALIGNMENT = 64
_XFEATURES = 512
# ptrace(2) shows room for AMX tiles, which the kernel takes from no frame of a thread without them.
_TILES, _WITHOUT_TILES = 1 << 18, 2816
_MASK_BYTES = 8
_SIGINFO_BYTES = 128

RESTARTS = {-512, -513, -514}  # ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND
RESTART_BLOCK = -516
_RESTART_SYSCALL = 219
_SYSCALL_BYTES = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """:ivar address: where it goes; the stack pointer of the borrowed thread.
    :ivar contents: its bytes; the first eight are the address of the signal return.
    """

    address: int
    contents: bytes


def going_on(registers: Registers, *, afresh: bool) -> Registers:
    """What the thread's registers must be for it to go on by itself.

    A thread that was stopped inside a system call would have had the kernel repeat the call; the
    kernel does that only for a thread that comes out of the very stop.

    :param afresh: repeat a call with a time limit from its beginning; otherwise by
        restart_syscall(2), which goes on with the time that is left, and which a signal return
        would make fail with EINTR.
    """
    result = Registers.from_buffer_copy(registers)
    in_call = _signed(registers.orig_rax) >= 0
    outcome = _signed(registers.rax)
    if in_call and outcome in RESTARTS:
        result.rax = registers.orig_rax
        result.rip -= _SYSCALL_BYTES
    elif in_call and outcome == RESTART_BLOCK:
        result.rax = registers.orig_rax if afresh else _RESTART_SYSCALL
        result.rip -= _SYSCALL_BYTES
    result.orig_rax = (1 << 64) - 1
    return result


def build(registers: Registers, mask: bytes, xstate: bytes, signal_return: int) -> Frame:
    """A frame below the stack of a thread stopped with ``registers``.

    :param mask: its signal mask. :param xstate: its extended state.
    :param signal_return: address of ``mov $15, %rax; syscall``.
    """
    back = going_on(registers, afresh=True)
    state = _sealed(xstate)
    top = (registers.rsp - RED_ZONE - len(state)) & -_XSTATE_ALIGNMENT
    body = _UCONTEXT_HEAD.size + _SIGCONTEXT.size + 8 + _RESERVED.size + _MASK_BYTES
    # As for a handler: the stack pointer is 8 short of 16 when its first instruction runs.
    address = ((top - 8 - body - _SIGINFO_BYTES) & -16) - 8
    flags = _UC_FP_XSTATE | _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS
    context = _UCONTEXT_HEAD.pack(flags, 0, 0, _SS_DISABLE, 0, 0) + _sigcontext(back, mask, top)
    context += bytes(_RESERVED.size) + mask
    frame = struct.pack("<Q", signal_return) + context
    return Frame(address, frame.ljust(top - address, b"\0") + state)


def _sigcontext(r: Registers, mask: bytes, xstate_at: int) -> bytes:
    return _SIGCONTEXT.pack(
        *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15),
        *(r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp),
        *(r.rip, r.eflags, r.cs, 0, 0, r.ss),
        *(0, 0, int.from_bytes(mask, "little"), 0),  # err, trapno, oldmask, cr2
    ) + struct.pack("<Q", xstate_at)


def _sealed(xstate: bytes) -> bytes:
    """The state as a signal frame holds it: its own length and features inside, a magic behind."""
    (in_use,) = struct.unpack_from("<Q", xstate, _XFEATURES)
    if in_use & _TILES:
        raise TraceeError("the thread uses AMX tiles, whose state no signal frame of ours can hold")
    (known,) = struct.unpack_from("<Q", xstate, _SW_RESERVED)
    state = bytearray(xstate[:_WITHOUT_TILES])
    known &= ~_TILES
    struct.pack_into("<IIQI", state, _SW_RESERVED, _MAGIC1, len(state) + 4, known, len(state))
    return bytes(state) + struct.pack("<I", _MAGIC2)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
