"""Kernels with one defect each, to show that cases catch it (``--mutate``).

A defect is put under the binding: the C functions that every operation goes through are replaced in
the case's own process, so cases, helpers and subjects all see the broken kernel and none knows.
"""

import ctypes
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.validate import raw
from uffd._native import ffi, lib

Call = Callable[..., Any]
_MESSAGE = 32
_PATIENCE_S = 1.0
#: A case on a broken kernel gets no longer than this.
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Mutant:
    """``breaks`` maps the name of a C function (or of one in :mod:`raw`, ``raw.place``) to what
    makes the broken one out of the real one.
    """

    summary: str
    families: tuple[str, ...]
    breaks: dict[str, Callable[[Call], Call]]


class _BrokenLib:
    """The real C module but for some functions."""

    def __init__(self, broken: dict[str, Call]) -> None:
        self.__dict__.update(broken)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)


def apply(name: str) -> None:
    """Break this process's kernel for good."""
    mutant = MUTANTS[name]
    broken: dict[str, Call] = {}
    for target, make in mutant.breaks.items():
        if target.startswith("raw."):
            attribute = target.removeprefix("raw.")
            setattr(raw, attribute, make(getattr(raw, attribute)))
        else:
            broken[target] = make(getattr(lib, target))
    proxy = _BrokenLib(broken)
    for module in list(sys.modules.values()):
        name_of = getattr(module, "__name__", "")
        if not name_of.startswith(("uffd.", "scripts.")) or name_of in ("uffd._native", __name__):
            continue
        if getattr(module, "lib", None) is lib:
            vars(module)["lib"] = proxy
        if hasattr(module, "PATIENCE_S"):
            vars(module)["PATIENCE_S"] = _PATIENCE_S  # what hangs will not come


# -- ways to be broken -----------------------------------------------------------------------------


def _says(value: int) -> Callable[[Call], Call]:
    """Does nothing and answers ``value``."""
    return lambda real: lambda *arguments: value


def _wrong_bytes(real: Call) -> Call:
    """COPY that places other bytes than it was given: the last one of each request is off."""

    def call(fd: int, target: int, source: int, length: int, mode: int) -> Any:
        wrong = bytearray(ctypes.string_at(source, length))
        wrong[-1] ^= 0xFF
        wrong[0] ^= 0x01
        return real(fd, target, raw.buffer_address(wrong), length, mode)

    return call


def _sleepy(real: Call) -> Call:
    """Places, and wakes nobody (bit 0 of the mode is DONTWAKE)."""
    return lambda *arguments: real(*arguments[:-1], arguments[-1] | 1)


def _without_bit(bit: int) -> Callable[[Call], Call]:
    """Loses a bit of the mode, the last argument."""
    return lambda real: lambda *arguments: real(*arguments[:-1], arguments[-1] & ~bit)


def _messages(change: Callable[[bytearray], bool]) -> Callable[[Call], Call]:
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


def _no_flags(message: bytearray) -> bool:
    if message[0] == 0x12:
        message[8:16] = bytes(8)
    return True


def _next_page(message: bytearray) -> bool:
    """Every address one page further."""
    if message[0] == 0x12:
        (address,) = struct.unpack_from("<Q", message, 16)
        struct.pack_into("<Q", message, 16, address + raw_page())
    return True


def raw_page() -> int:
    import os

    return int(os.sysconf("SC_PAGESIZE"))


def _events_lost(message: bytearray) -> bool:
    return message[0] == 0x12


def _placed_without_output(real: Call) -> Call:
    """The output field stays as it was."""

    def call(fd: int, operation: int, words: tuple[int, ...], preset: int = raw.PRESET) -> Any:
        return raw.Placed(real(fd, operation, words, preset).error, preset)

    return call


def _scan_short(real: Call) -> Call:
    """PAGEMAP_SCAN that forgets the last region it found."""
    return lambda fd, arguments, regions, count, end: max(
        0, real(fd, arguments, regions, count, end) - 1
    )


def _scan_unprotecting(real: Call) -> Call:
    """PAGEMAP_SCAN that never protects."""

    def call(fd: int, arguments: Any, regions: Any, count: int, end: Any) -> Any:
        if arguments.flags & 1 and count == 0:
            end[0] = arguments.end
            return 0
        arguments.flags &= ~1
        return real(fd, arguments, regions, count, end)

    return call


def _scan_wrong_categories(real: Call) -> Call:
    """PAGEMAP_SCAN that shows the opposite categories."""

    def call(fd: int, arguments: Any, regions: Any, count: int, end: Any) -> Any:
        got = real(fd, arguments, regions, count, end)
        for i in range(max(0, got)):
            regions[i].categories ^= arguments.return_mask
        return got

    return call


def _scan_never_refuses(real: Call) -> Call:
    def call(*arguments: Any) -> Any:
        got = real(*arguments)
        return max(0, got)

    return call


def _entries(change: int) -> Callable[[Call], Call]:
    """pagemap with some bits the other way round."""

    def make(real: Call) -> Call:
        def call(fd: int, address: int, page: int, entries: Any, count: int) -> Any:
            got = real(fd, address, page, entries, count)
            for i in range(max(0, got)):
                entries[i] ^= change
            return got

        return call

    return make


def _load_off(real: Call) -> Call:
    return lambda address: real(address) ^ 1


def _read_off(real: Call) -> Call:
    """Reading that sees another first byte than is there."""

    def call(address: int, into: Any, length: int) -> Any:
        real(address, into, length)
        if length:
            into[0] ^= 0x01

    return call


def _errors_become(code: int) -> Callable[[Call], Call]:
    """Refusals with another error."""

    def make(real: Call) -> Call:
        def call(*arguments: Any) -> Any:
            got = real(*arguments)
            return -code if isinstance(got, int) and got < 0 else got

        return call

    return make


def _placed_success(real: Call) -> Call:
    """Refusals of the operations with an output field that look like success."""

    def call(fd: int, operation: int, words: tuple[int, ...], preset: int = raw.PRESET) -> Any:
        got = real(fd, operation, words, preset)
        return raw.Placed(0, words[-2]) if got.error else got

    return call


def _accepting(real: Call) -> Call:
    """Never refuses."""
    return lambda *arguments: max(0, real(*arguments))


def _register_shows_all(real: Call) -> Call:
    def call(fd: int, start: int, length: int, mode: int, ioctls: Any) -> Any:
        got = real(fd, start, length, mode, ioctls)
        ioctls[0] ^= 0xFC
        return max(0, got)

    return call


def _copy_if_missing(real: Call) -> Call:
    """Guarded accesses that take no signal: the access is answered with a plain zero."""
    return lambda address, *rest: 0


def _advice_lost(numbers: tuple[int, ...]) -> Callable[[Call], Call]:
    """Some advice is taken and nothing done."""

    def make(real: Call) -> Call:
        def call(start: int, length: int, advice: int) -> Any:
            return 0 if advice in numbers else real(start, length, advice)

        return call

    return make


_DESTRUCTIVE = (4, 8, 9)
_GUARDS = (102,)
_POPULATES = (22, 23)

MUTANTS: dict[str, Mutant] = {
    "copy-wrong-bytes": Mutant(
        "COPY places other bytes", ("unit", "stress", "gaps"), {"uffd_copy": _wrong_bytes}
    ),
    "copy-no-wake": Mutant("COPY wakes nobody", ("unit", "stress", "gaps"), {"uffd_copy": _sleepy}),
    "zeropage-lost": Mutant(
        "ZEROPAGE says 4 KiB and does nothing", ("unit",), {"raw.place": _placed_success}
    ),
    "move-copies-nothing": Mutant(
        "MOVE succeeds and moves nothing", ("unit",), {"uffd_move": _says(raw_page())}
    ),
    "continue-unprotected": Mutant(
        "CONTINUE forgets the WP mode", ("unit",), {"uffd_continue": _without_bit(2)}
    ),
    "continue-no-wake": Mutant("CONTINUE wakes nobody", ("unit",), {"uffd_continue": _sleepy}),
    "copy-unprotected": Mutant(
        "COPY forgets the WP mode", ("unit",), {"uffd_copy": _without_bit(2)}
    ),
    "poison-lost": Mutant(
        "POISON succeeds, no poison", ("unit",), {"uffd_poison": _says(raw_page())}
    ),
    "protect-lost": Mutant(
        "WRITEPROTECT succeeds and does nothing",
        ("unit", "mremap-wp", "guard", "scan", "stress"),
        {"uffd_writeprotect": _says(0)},
    ),
    "output-untouched": Mutant(
        "the output field keeps what it held",
        ("unit", "gaps"),
        {"raw.place": _placed_without_output},
    ),
    "flags-lost": Mutant(
        "messages without flags", ("unit", "gaps", "traps"), {"uffd_read": _messages(_no_flags)}
    ),
    "address-off": Mutant(
        "messages name the next page",
        ("unit", "stress", "gaps"),
        {"uffd_read": _messages(_next_page)},
    ),
    "events-lost": Mutant(
        "fork, remap, remove, unmap are not reported",
        ("unit",),
        {"uffd_read": _messages(_events_lost)},
    ),
    "register-shows-all": Mutant(
        "REGISTER never refuses and answers the wrong operations",
        ("unit", "errors"),
        {"uffd_register": _register_shows_all},
    ),
    "api-zero": Mutant(
        "the raw handshake and reads never refuse", ("unit",), {"raw.ioctl": _accepting}
    ),
    "wrong-errno": Mutant(
        "every refusal is EIO",
        ("errors", "traps", "gaps"),
        {
            name: _errors_become(5)
            for name in (
                "uffd_register",
                "uffd_unregister",
                "uffd_copy",
                "uffd_zeropage",
                "uffd_continue",
                "uffd_poison",
                "uffd_move",
                "uffd_writeprotect",
                "uffd_wake",
                "uffd_api",
                "mem_madvise",
                "mem_process_madvise",
                "mem_map",
                "raw.ioctl",
                "raw.syscall",
                "pagemap_scan",
            )
        },
    ),
    "marks-flipped": Mutant(
        "pagemap shows write protection the other way",
        ("unit", "mremap-wp"),
        {"pagemap_read": _entries(1 << 57)},
    ),
    "presence-flipped": Mutant(
        "pagemap shows presence the other way",
        ("unit", "populate", "dontunmap", "advice", "pmadvise"),
        {"pagemap_read": _entries(1 << 63)},
    ),
    "guard-bit-flipped": Mutant(
        "pagemap shows guards the other way", ("guard",), {"pagemap_read": _entries(1 << 58)}
    ),
    "no-signals": Mutant(
        "accesses that should be stopped go through",
        ("unit", "guard", "mkdirty"),
        {"sigbus_load_u8": _copy_if_missing, "sigbus_store_u8": _copy_if_missing},
    ),
    "scan-forgets": Mutant("the scan loses a region", ("scan",), {"pagemap_scan": _scan_short}),
    "scan-no-protect": Mutant(
        "the scan never protects", ("scan",), {"pagemap_scan": _scan_unprotecting}
    ),
    "scan-wrong-category": Mutant(
        "the scan shows the opposite", ("scan", "rwp"), {"pagemap_scan": _scan_wrong_categories}
    ),
    "scan-accepts-all": Mutant(
        "the scan refuses nothing",
        ("scan",),
        {"pagemap_scan": _scan_never_refuses, "raw.ioctl": _accepting},
    ),
    "advice-lost": Mutant(
        "DONTNEED, FREE and REMOVE do nothing",
        ("unit", "advice", "guard", "pmadvise", "stress"),
        {"mem_madvise": _advice_lost(_DESTRUCTIVE)},
    ),
    "guards-lost": Mutant(
        "guards are not installed", ("guard",), {"mem_madvise": _advice_lost(_GUARDS)}
    ),
    "populate-lost": Mutant(
        "populating does nothing", ("populate",), {"mem_madvise": _advice_lost(_POPULATES)}
    ),
    "process-advice-lost": Mutant(
        "process_madvise never refuses",
        ("pmadvise",),
        {"mem_process_madvise": _accepting, "raw.syscall": _accepting},
    ),
    "reads-off": Mutant(
        "loads see another byte than is there",
        ("unit", "stress", "populate", "guard", "advice", "dontunmap", "merge", "mkdirty", "scan"),
        {"touch_load_u8": _load_off, "touch_read": _read_off},
    ),
}
