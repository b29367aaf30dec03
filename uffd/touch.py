"""Loads and stores by address, sleeping on a missing page *without* the interpreter lock.

The rule these exist for: while pages of a region can be missing, Python threads touch it through
these (or another accessor that releases the lock), never through ``memoryview``, ``mmap`` slices,
``ctypes`` or ``bytes(region)``. Such a thread would sleep in the kernel holding the lock, and no
Python thread, least of all the one that should bring the page, runs again. :mod:`uffd.watchdog`
finds the misuse.

No bounds are checked: an address that is not mapped ends the process, as in C. The ``guarded_*``
pair survives SIGBUS and SIGSEGV, for poisoned pages, guard regions and the SIGBUS feature.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uffd._native import ffi, lib
from uffd.errors import check

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def load(address: int) -> int:
    """One byte."""
    return lib.touch_load_u8(address)


def store(address: int, value: int) -> None:
    """One byte, 0-255."""
    lib.touch_store_u8(address, value)


def load_u64(address: int) -> int:
    """Eight bytes, atomically, acquire order. ``address`` is a multiple of 8."""
    return lib.touch_load_u64(address)


def store_u64(address: int, value: int) -> None:
    """Eight bytes, atomically, release order. ``address`` is a multiple of 8."""
    lib.touch_store_u64(address, value)


def read(address: int, length: int) -> bytes:
    """Copy bytes out; missing pages on the way are waited for."""
    into = bytearray(length)
    lib.touch_read(address, ffi.from_buffer("uint8_t[]", into), length)
    return bytes(into)


def write(address: int, data: "ReadableBuffer") -> None:
    """Copy bytes in; missing pages on the way are waited for."""
    source = ffi.from_buffer("uint8_t[]", data)
    lib.touch_write(address, source, len(source))


def fill(address: int, value: int, length: int) -> None:
    lib.touch_fill(address, value, length)


@dataclass(frozen=True, slots=True)
class AccessFault(Exception):
    """A guarded access was stopped by a signal.

    ``code`` is si_code: BUS_ADRERR 2, BUS_MCEERR_AR 4, SEGV_MAPERR 1, SEGV_ACCERR 2. ``hits``
    counts signals taken by this access; ``copy_errno`` is set when placing the page in the
    handler failed.
    """

    signal: int
    code: int
    address: int
    hits: int
    copy_errno: int


@dataclass(frozen=True, slots=True)
class Resolver:
    """Places the page inside the SIGBUS handler and lets the access go on: how Feature.SIGBUS is
    used.

    ``source`` is the address of ``page_size`` bytes.
    """

    uffd: int
    page_size: int
    source: int


@contextmanager
def guarded_accesses() -> Iterator[None]:
    """Take SIGBUS and SIGSEGV for the whole process while inside; signals elsewhere go on as
    before.
    """
    check(lib.sigbus_install(), "sigaction")
    try:
        yield
    finally:
        lib.sigbus_uninstall()


def guarded_load(address: int, resolver: Resolver | None = None) -> tuple[int, int]:
    """Load one byte inside :func:`guarded_accesses`: (value, signals taken on the way).

    :raises AccessFault: a signal came and no resolver could help.
    """
    report = ffi.new("struct sigbus_report *")
    value = lib.sigbus_load_u8(address, _fix(resolver), report)
    _raise_if_stopped(value, report)
    return value, report.hits


def guarded_store(address: int, value: int, resolver: Resolver | None = None) -> int:
    """Store one byte; returns the signals taken on the way. :raises AccessFault:"""
    report = ffi.new("struct sigbus_report *")
    result = lib.sigbus_store_u8(address, value, _fix(resolver), report)
    _raise_if_stopped(result, report)
    return int(report.hits)


def _fix(resolver: Resolver | None) -> Any:
    if resolver is None:
        return ffi.new("struct sigbus_fix *", {"uffd": -1})
    return ffi.new(
        "struct sigbus_fix *",
        {"uffd": resolver.uffd, "page_size": resolver.page_size, "source": resolver.source},
    )


def _raise_if_stopped(result: int, report: Any) -> None:
    if result < 0:
        raise AccessFault(report.signal, report.code, report.address, report.hits, -report.error)
