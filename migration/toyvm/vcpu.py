"""vCPUs that are native threads: the Python side of ``csrc/vcpu.c``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guestmem import Bitmap, RAMBlock
from uffd.threads import NamedThread

from ._native import ffi, lib
from .auxmem import AuxMemory
from .histogram import Latency

_STATUS = {
    lib.VCPU_READY: "ready",
    lib.VCPU_LOST_PAGE: "lost page",
    lib.VCPU_FAILED: "failed",
}
JOIN_TIMEOUT_S = 30
"""A parked thread that was told to quit is gone at once; this only bounds a bug."""


@dataclass(frozen=True)
class VCpuStatistics:
    """What one vCPU did since the guest was born, migrations included.

    :ivar status: ``ready``, ``lost page`` (parked on a poisoned one at ``lost_address``) or
        ``failed``.
    :ivar hits: touches of pages already received; ``misses`` were timed, see ``latency``. Both only
        count while a received bitmap is attached.
    :ivar errors: touches that found the page damaged.
    :ivar first_op_ns: CLOCK_MONOTONIC after the first operation since the latest start; 0 = none
        yet.
    """

    index: int
    status: str
    is_running: bool
    ops: int
    writes: int
    hits: int
    misses: int
    errors: int
    first_op_ns: int
    lost_address: int
    latency: Latency


class VCpu(Protocol):
    """One vCPU, whoever it is. ``go``, ``ask_halt``, ``halt`` and ``close`` under the machine's
    lock."""

    index: int

    @property
    def last_op_ns(self) -> int: ...
    @property
    def last_op_realtime_ns(self) -> int: ...
    @property
    def thread_id(self) -> int: ...
    def go(self) -> None: ...
    def ask_halt(self) -> None: ...
    def halt(self) -> None: ...
    def forget_first_op(self) -> None: ...
    def set_received(self, received: Mapping[str, Bitmap]) -> None: ...
    def statistics(self) -> VCpuStatistics: ...
    def close(self) -> None: ...


class ThreadVCpu:
    """A vCPU thread, asleep at its gate until :meth:`go`. It takes the GIL only to be born and to
    end."""

    def __init__(self, index: int, aux: AuxMemory, blocks: Sequence[RAMBlock]) -> None:
        """:raises ValueError: the vCPU has no page of its own."""
        self.index = index
        self._blocks = tuple(blocks)
        self._state = aux.state(index)
        self._native: Any = ffi.new("struct vcpu *")
        if lib.vcpu_init(self._native, index, aux.view(index, blocks)) < 0:
            raise ValueError(f"vCPU {index} has no page in the working set")
        self._thread = NamedThread(
            target=lib.vcpu_serve, args=(self._native,), name=f"vcpu {index}", daemon=True
        )
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """Kernel id of the thread, as userfaultfd reports it and CPU affinity wants it."""
        return self._thread.native_id or 0

    @property
    def last_op_ns(self) -> int:
        """CLOCK_MONOTONIC of the last operation before the latest park."""
        return int(self._native.last_op_ns)

    @property
    def last_op_realtime_ns(self) -> int:
        """The same moment on CLOCK_REALTIME, for comparison across hosts."""
        return int(self._native.last_op_realtime_ns)

    def go(self) -> None:
        """Let it run. One futex wake."""
        lib.vcpu_go(self._native)

    def ask_halt(self) -> None:
        """Ask it to park, kick it out of a sleep on a missing page; does not wait."""
        lib.vcpu_ask_halt(self._native)

    def halt(self) -> None:
        """Returns when it is parked. Never waits for a missing page; the GIL is released."""
        lib.vcpu_halt(self._native)

    def forget_first_op(self) -> None:
        """The next operation is the first one. Only while parked."""
        self._state.first_clock = 0

    def set_received(self, received: Mapping[str, Bitmap]) -> None:
        """Bitmaps to look at before each touch. Only while parked; they must outlive their use."""
        lib.vcpu_set_received(self._native, received_addresses(self._blocks, received))

    def statistics(self) -> VCpuStatistics:
        """A snapshot; may be taken while it runs."""
        return read_statistics(
            self.index,
            self._state,
            status=int(self._native.status),
            is_running=lib.vcpu_is_running(self._native),
            lost_address=int(self._native.lost_address),
            first_op_ns=int(self._state.first_clock),
        )

    def close(self) -> None:
        """End the thread and join it. Harmless the second time."""
        if self._thread.is_alive():
            lib.vcpu_halt(self._native)
            lib.vcpu_quit(self._native)
            self._thread.join(JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                raise RuntimeError(f"vCPU {self.index} does not end")


def received_addresses(blocks: Sequence[RAMBlock], received: Mapping[str, Bitmap]) -> Any:
    """``uint64_t[]`` of bitmap addresses in block order; 0 where there is none.

    :raises ValueError: a bitmap has another size than its block.
    """
    maps = ffi.new("uint64_t[]", lib.TOY_MAX_BLOCKS)
    for number, block in enumerate(blocks):
        bitmap = received.get(block.idstr)
        if bitmap is None:
            continue
        if bitmap.nbits < block.page_count:
            raise ValueError(f"{bitmap.nbits} bits for the {block.page_count} pages of {block!r}")
        maps[number] = bitmap.address
    return maps


def read_statistics(
    index: int, state: Any, *, status: int, is_running: bool, lost_address: int, first_op_ns: int
) -> VCpuStatistics:
    """Statistics out of a ``struct toy_state``."""
    return VCpuStatistics(
        index=index,
        status=_STATUS[status],
        is_running=is_running,
        ops=int(state.ops),
        writes=int(state.writes),
        hits=int(state.hits),
        misses=int(state.misses),
        errors=int(state.errors),
        first_op_ns=first_op_ns,
        lost_address=lost_address,
        latency=Latency.read(state.latency),
    )
