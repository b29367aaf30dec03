"""The typed door to ``_native``: one function a measurement, plain numbers in, samples out.

Every call makes its own threads, runs without the interpreter lock and returns when they have
ended (at most a few seconds with the sizes ``limits`` asks for). Errors are ``OSError`` with the
errno and the operation; a userfaultfd that may not be opened is ``PermissionError``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from guestmem.geometry import TARGET_PAGE_BYTES

from ._native import ffi, lib

UNPINNED = -1


class Backing(IntEnum):
    """What the measured memory is made of."""

    ANON = 0
    SHMEM = 1
    HUGETLB = 2  # 2 MiB pages of a memfd

    @property
    def page_bytes(self) -> int:
        """The host page: what one COPY places."""
        return 2 << 20 if self is Backing.HUGETLB else TARGET_PAGE_BYTES


class PlaceOp(IntEnum):
    """How bulk memory is made to appear."""

    COPY = 0
    ZEROPAGE = 1
    MEMCPY = 2  # to present memory: the yardstick


class Transport(IntEnum):
    """Which stream socket."""

    UNIX = 0
    TCP = 1  # loopback, TCP_NODELAY


@dataclass(frozen=True, slots=True)
class FaultConfig:
    """One fault measurement; cpus are processor numbers or ``UNPINNED``."""

    backing: Backing = Backing.ANON
    region_pages: int = 1024
    warmup: int = 200
    touches: int = 4000
    toucher_cpu: int = UNPINNED
    handler_cpu: int = UNPINNED
    handler_spins: bool = False
    transport: Transport = Transport.UNIX
    listen_cpu: int = UNPINNED
    peer_cpu: int = UNPINNED

    def to_c(self) -> Any:
        """The C struct, owned by the returned object."""
        return ffi.new(
            "struct bench_fault_config *",
            {name: int(getattr(self, name)) for name in self.__slots__},
        )


@dataclass(frozen=True, slots=True)
class FaultRun:
    """Samples in nanoseconds, as the toucher felt them, and the counts that prove the path.

    In a sound run ``touches == messages == placed`` and ``wrong == 0``.
    """

    samples_ns: list[int]
    touches: int
    messages: int
    reads: int
    placed: int
    wrong: int

    @property
    def counts(self) -> dict[str, int]:
        """All counts by name."""
        return {
            "touches": self.touches,
            "messages": self.messages,
            "reads": self.reads,
            "placed": self.placed,
            "wrong": self.wrong,
        }


@dataclass(frozen=True, slots=True)
class ScanRun:
    """One PAGEMAP_SCAN measurement: durations in nanoseconds, pages as the scans reported them."""

    clean_ns: int
    dirty_get_ns: int
    dirty_protect_ns: int
    write_ns: int
    dirty_pages: int
    clean_pages: int


def _check(result: int, operation: str) -> int:
    if result < 0:
        raise OSError(-result, f"{operation}: {os.strerror(-result)}")
    return result


def clock_cost_ns(rounds: int = 100_000) -> float:
    """What one reading of the clock costs: the resolution of everything here."""
    return lib.bench_clock_cost_ps(rounds) / 1000


def wake_round_trip(
    cpu_a: int, cpu_b: int, *, rounds: int, warmup: int = 10, budget_ns: int = 0
) -> list[int]:
    """Two threads on the given processors hand a turn to and fro; two wake-ups a sample.

    :param rounds: at most this many samples.
    :param budget_ns: stop after this long; 0 = no bound. At least one sample comes back.
    :raises OSError: a thread could not be put on its processor (``EINVAL``).
    """
    samples = ffi.new("uint64_t[]", rounds)
    count = lib.bench_wake_rtt(cpu_a, cpu_b, warmup, rounds, budget_ns, samples)
    _check(count, f"wake-up between cpu {cpu_a} and {cpu_b}")
    return ffi.unpack(samples, count)


def _fault_run(config: FaultConfig, samples: Any, counts: Any) -> FaultRun:
    return FaultRun(
        samples_ns=ffi.unpack(samples, config.touches),
        touches=counts.touches,
        messages=counts.messages,
        reads=counts.reads,
        placed=counts.placed,
        wrong=counts.wrong,
    )


def fault_round_trip(config: FaultConfig) -> FaultRun:
    """Local faults answered by UFFDIO_COPY on another thread.

    :raises OSError: no userfaultfd (``EPERM``), too few hugepages (``ENOMEM``), or what the kernel
        answered to COPY.
    """
    samples = ffi.new("uint64_t[]", config.touches)
    counts = ffi.new("struct bench_fault_counts *")
    _check(lib.bench_fault_rtt(config.to_c(), samples, counts), "local fault round trip")
    return _fault_run(config, samples, counts)


def remote_fault(config: FaultConfig, peer_fd: int = -1) -> FaultRun:
    """Faults answered over a socket; see :mod:`migration.bench.peer` for a peer process.

    :param peer_fd: connected stream socket to a peer that serves ``config.region_pages`` pages, or
        -1 for a peer thread over ``config.transport``. The socket stays open and usable.
    """
    samples = ffi.new("uint64_t[]", config.touches)
    counts = ffi.new("struct bench_fault_counts *")
    _check(lib.bench_remote_fault(config.to_c(), peer_fd, samples, counts), "remote fault")
    return _fault_run(config, samples, counts)


def remote_serve(fd: int, *, page_bytes: int, pages: int, cpu: int = UNPINNED) -> int:
    """Be the peer of :func:`remote_fault` until the socket's end; returns requests answered."""
    return _check(lib.bench_remote_serve(fd, page_bytes, pages, cpu), "page server")


def socket_round_trip(
    transport: Transport,
    *,
    request_bytes: int,
    reply_bytes: int,
    client_cpu: int,
    server_cpu: int,
    rounds: int,
    warmup: int = 100,
) -> list[int]:
    """Request and reply over a connected pair; one sample a round, in nanoseconds."""
    samples = ffi.new("uint64_t[]", rounds)
    count = lib.bench_socket_rtt(
        transport, request_bytes, reply_bytes, client_cpu, server_cpu, warmup, rounds, samples
    )
    return ffi.unpack(samples, _check(count, f"{transport.name.lower()} round trip"))


def socket_bulk(
    transport: Transport,
    *,
    write_bytes: int,
    pass_bytes: int,
    passes: int,
    sender_cpu: int,
    receiver_cpu: int,
) -> list[int]:
    """One-way passes over a connected pair, until the last byte was read; nanoseconds a pass."""
    times = ffi.new("uint64_t[]", passes)
    result = lib.bench_socket_bulk(
        transport, write_bytes, pass_bytes, passes, sender_cpu, receiver_cpu, times
    )
    _check(result, f"{transport.name.lower()} bulk transfer")
    return ffi.unpack(times, passes)


def place(
    backing: Backing, op: PlaceOp, *, batch_bytes: int, length: int, passes: int, cpu: int
) -> list[int]:
    """Fill ``length`` bytes, ``batch_bytes`` a call; nanoseconds a pass (discards not counted)."""
    times = ffi.new("uint64_t[]", passes)
    result = lib.bench_place(backing, op, batch_bytes, length, passes, cpu, times)
    _check(result, f"{op.name} on {backing.name.lower()}")
    return ffi.unpack(times, passes)


def pagemap_scan(backing: Backing, *, length: int, cpu: int) -> ScanRun:
    """Asynchronous write tracking over ``length`` bytes: scan clean, write all, scan, scan."""
    out = ffi.new("struct bench_scan_times *")
    _check(lib.bench_pagemap_scan(backing, length, cpu, out), f"scan of {backing.name.lower()}")
    return ScanRun(
        clean_ns=out.clean_ns,
        dirty_get_ns=out.dirty_get_ns,
        dirty_protect_ns=out.dirty_protect_ns,
        write_ns=out.write_ns,
        dirty_pages=out.dirty_pages,
        clean_pages=out.clean_pages,
    )


def push(
    transport: Transport,
    backing: Backing,
    *,
    length: int,
    passes: int,
    sender_cpu: int,
    receiver_cpu: int,
) -> list[int]:
    """Records over a socket, each page placed as it comes (4 KiB backings); nanoseconds a pass."""
    times = ffi.new("uint64_t[]", passes)
    result = lib.bench_push(transport, backing, length, passes, sender_cpu, receiver_cpu, times)
    _check(result, f"push over {transport.name.lower()}")
    return ffi.unpack(times, passes)
