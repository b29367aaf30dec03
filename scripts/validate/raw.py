"""System calls as the kernel answers them: result, and output field whatever it holds.

The binding hides the output fields on purpose; validation looks at them. ``ctypes`` calls release
the interpreter lock. A negative result is ``-errno``.
"""

import ctypes
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]

UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
COPY, ZEROPAGE, MOVE = 0xC028AA03, 0xC020AA04, 0xC028AA05
CONTINUE, POISON = 0xC020AA07, 0xC020AA08
PAGEMAP_SCAN = 0xC0606610
PRESET = 0x5A5A5A5A

SYS_READ = 0
SYS_MREMAP, SYS_SHMGET, SYS_SHMAT, SYS_SHMCTL = 25, 29, 30, 31
SYS_SWAPON, SYS_SWAPOFF = 167, 168
SYS_PROCESS_VM_READV = 310
SYS_IO_URING_SETUP, SYS_IO_URING_REGISTER = 425, 427
SYS_PROCESS_MADVISE = 440
SYS_MEMFD_SECRET = 447


def _result(value: int) -> int:
    return -ctypes.get_errno() if value == -1 else value


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """The result, or minus the error."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _result(_libc.syscall(ctypes.c_long(number), *words))


def ioctl(fd: int, number: int, argument: bytearray | int = 0) -> int:
    """A bytearray is passed by address and holds the kernel's answer afterwards."""
    if isinstance(argument, int):
        return _result(_libc.ioctl(fd, number, argument))
    memory = (ctypes.c_char * len(argument)).from_buffer(argument)
    return _result(_libc.ioctl(fd, number, ctypes.addressof(memory)))


@dataclass(frozen=True)
class Placed:
    """``error`` is positive, 0 on success; ``output`` is what the kernel left in its field."""

    error: int
    output: int


def place(fd: int, operation: int, words: tuple[int, ...], preset: int = PRESET) -> Placed:
    """One of the operations with an output field: its input ``words``, field preset."""
    argument = bytearray(struct.pack(f"<{len(words)}Qq", *words, preset))
    result = ioctl(fd, operation, argument)
    (output,) = struct.unpack_from("<q", argument, 8 * len(words))
    return Placed(max(0, -result), output)


def map_memory(
    address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """mmap; the address. :raises OSError:"""
    got = _libc.mmap(address or None, length, protection, flags, fd, offset)
    if got == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(got)


def unmap(address: int, length: int) -> int:
    return _result(_libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length)))


def remap(address: int, old: int, new: int, flags: int, target: int = 0) -> int:
    """mremap; the new address or minus the error."""
    return syscall(SYS_MREMAP, address, old, new, flags, target)


def lock(address: int, length: int) -> int:
    return _result(_libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(length)))


def write(fd: int, address: int, length: int) -> int:
    """write(2) straight from an address."""
    return _result(_libc.write(fd, ctypes.c_void_p(address), ctypes.c_size_t(length)))


def mutex_lock(address: int) -> None:
    """pthread_mutex_lock of a mutex at ``address`` (all zeros is an unlocked one)."""
    _libc.pthread_mutex_lock(ctypes.c_void_p(address))


def mutex_unlock(address: int) -> None:
    _libc.pthread_mutex_unlock(ctypes.c_void_p(address))


def readv(pid: int, address: int, length: int) -> tuple[int, bytes]:
    """process_vm_readv of one range: result or minus the error, and the bytes."""
    into = ctypes.create_string_buffer(length)
    local = struct.pack("<QQ", ctypes.addressof(into), length)
    remote = struct.pack("<QQ", address, length)
    got = syscall(SYS_PROCESS_VM_READV, pid, local, 1, remote, 1, 0)
    return got, into.raw


def buffer_address(data: bytearray) -> int:
    """Where a bytearray's bytes are; keep it alive and do not resize it."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data))


def death_signal(number: int) -> None:
    """This process gets ``number`` when its parent ends (PR_SET_PDEATHSIG)."""
    _libc.prctl(1, ctypes.c_ulong(number), 0, 0, 0)
