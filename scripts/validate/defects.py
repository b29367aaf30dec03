"""Ways to be broken: each makes a defective function out of a real one.

What they replace is the C function that an operation goes through (:mod:`uffd._native`), or one of
:mod:`scripts.validate.raw`.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from typing import Any

from scripts.validate import raw
from uffd._native import ffi

Call = Callable[..., Any]
PAGE: int = os.sysconf("SC_PAGESIZE")
_MESSAGE = 32


def says(value: int) -> Callable[[Call], Call]:
    """Does nothing and answers ``value``."""
    return lambda real: lambda *arguments: value


def wrong_bytes(real: Call) -> Call:
    """COPY that places other bytes than it was given: the last one of each request is off."""

    def call(fd: int, target: int, source: int, length: int, mode: int) -> Any:
        wrong = bytearray(ctypes.string_at(source, length))
        wrong[-1] ^= 0xFF
        wrong[0] ^= 0x01
        return real(fd, target, raw.buffer_address(wrong), length, mode)

    return call


def sleepy(real: Call) -> Call:
    """Places, and wakes nobody (bit 0 of the mode is DONTWAKE)."""
    return lambda *arguments: real(*arguments[:-1], arguments[-1] | 1)


def without_bit(bit: int) -> Callable[[Call], Call]:
    """Loses a bit of the mode, the last argument."""
    return lambda real: lambda *arguments: real(*arguments[:-1], arguments[-1] & ~bit)


def messages(change: Callable[[bytearray], bool]) -> Callable[[Call], Call]:
    """read(2) whose messages pass through ``change``; False drops the message."""

    def make(real: Call) -> Call:
        def call(fd: int, into: Any, count: int) -> Any:
            got = real(fd, into, count)
            if got <= 0:
                return got
            all_bytes = bytes(ffi.buffer(into, got * _MESSAGE))
            kept = [bytearray(all_bytes[i : i + _MESSAGE]) for i in range(0, got * _MESSAGE, 32)]
            kept = [message for message in kept if change(message)]
            ffi.buffer(into, len(kept) * _MESSAGE)[:] = b"".join(bytes(m) for m in kept)
            return len(kept)

        return call

    return make


def no_flags(message: bytearray) -> bool:
    if message[0] == 0x12:
        message[8:16] = bytes(8)
    return True


def next_page(message: bytearray) -> bool:
    """Every address one page further."""
    if message[0] == 0x12:
        (address,) = struct.unpack_from("<Q", message, 16)
        struct.pack_into("<Q", message, 16, address + PAGE)
    return True


def events_lost(message: bytearray) -> bool:
    return message[0] == 0x12


def placed_without_output(real: Call) -> Call:
    """The output field stays as it was."""

    def call(fd: int, operation: int, words: tuple[int, ...], preset: int = raw.PRESET) -> Any:
        return raw.Placed(real(fd, operation, words, preset).error, preset)

    return call


def scan_short(real: Call) -> Call:
    """PAGEMAP_SCAN that forgets the last region it found."""
    return lambda fd, arguments, regions, count, end: max(
        0, real(fd, arguments, regions, count, end) - 1
    )


def scan_unprotecting(real: Call) -> Call:
    """PAGEMAP_SCAN that never protects."""

    def call(fd: int, arguments: Any, regions: Any, count: int, end: Any) -> Any:
        if arguments.flags & 1 and count == 0:
            end[0] = arguments.end
            return 0
        arguments.flags &= ~1
        return real(fd, arguments, regions, count, end)

    return call


def scan_wrong_categories(real: Call) -> Call:
    """PAGEMAP_SCAN that shows the opposite categories."""

    def call(fd: int, arguments: Any, regions: Any, count: int, end: Any) -> Any:
        got = real(fd, arguments, regions, count, end)
        for i in range(max(0, got)):
            regions[i].categories ^= arguments.return_mask
        return got

    return call


def scan_ignores_masks(real: Call) -> Call:
    """PAGEMAP_SCAN that selects everything."""

    def call(fd: int, arguments: Any, regions: Any, count: int, end: Any) -> Any:
        arguments.category_mask = arguments.category_anyof_mask = arguments.category_inverted = 0
        return real(fd, arguments, regions, count, end)

    return call


def stopped(real: Call) -> Call:
    """Guarded accesses that are stopped by a signal every time."""
    return lambda *arguments: -14


def scan_never_refuses(real: Call) -> Call:
    def call(*arguments: Any) -> Any:
        got = real(*arguments)
        return max(0, got)

    return call


def entries(change: int) -> Callable[[Call], Call]:
    """pagemap with some bits the other way round."""

    def make(real: Call) -> Call:
        def call(fd: int, address: int, page: int, entries: Any, count: int) -> Any:
            got = real(fd, address, page, entries, count)
            for i in range(max(0, got)):
                entries[i] ^= change
            return got

        return call

    return make


def load_off(real: Call) -> Call:
    return lambda address: real(address) ^ 1


def read_off(real: Call) -> Call:
    """Reading that sees another first byte than is there."""

    def call(address: int, into: Any, length: int) -> Any:
        real(address, into, length)
        if length:
            into[0] ^= 0x01

    return call


def errors_become(code: int) -> Callable[[Call], Call]:
    """Refusals with another error."""

    def make(real: Call) -> Call:
        def call(*arguments: Any) -> Any:
            got = real(*arguments)
            return -code if isinstance(got, int) and got < 0 else got

        return call

    return make


def placed_success(real: Call) -> Call:
    """Refusals of the operations with an output field that look like success."""

    def call(fd: int, operation: int, words: tuple[int, ...], preset: int = raw.PRESET) -> Any:
        got = real(fd, operation, words, preset)
        return raw.Placed(0, words[-2]) if got.error else got

    return call


def accepting(real: Call) -> Call:
    """Never refuses."""
    return lambda *arguments: max(0, real(*arguments))


def register_shows_all(real: Call) -> Call:
    def call(fd: int, start: int, length: int, mode: int, ioctls: Any) -> Any:
        got = real(fd, start, length, mode, ioctls)
        ioctls[0] ^= 0xFC
        return max(0, got)

    return call


def takes_any_flag(real: Call) -> Call:
    """Opening that ignores flags it does not know, and forgets to close on exec."""
    return lambda flags: real(flags & (os.O_NONBLOCK | 1))


def registers_nothing(real: Call) -> Call:
    """REGISTER that is happy, and nothing is registered."""

    def call(fd: int, start: int, length: int, mode: int, ioctls: Any) -> Any:
        ioctls[0] = 0x1FC
        return 0

    return call


def copy_if_missing(real: Call) -> Call:
    """Guarded accesses that take no signal: the access is answered with a plain zero."""
    return lambda address, *rest: 0


def advice_lost(numbers: tuple[int, ...]) -> Callable[[Call], Call]:
    """Some advice is taken and nothing done."""

    def make(real: Call) -> Call:
        def call(start: int, length: int, advice: int) -> Any:
            return 0 if advice in numbers else real(start, length, advice)

        return call

    return make
