"""Memory of the toy VM outside guest RAM: page layout, vCPU states, logs and histograms.

It is ordinary memory that nobody watches, so Python may look at it with the GIL held. The KVM
backend maps it into its guest as a memory slot of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from guestmem import TARGET_PAGE_BYTES, RAMBlock

from ._native import ffi, lib
from .options import ToyOptions, Workload

_WORKLOAD_OFFSET = TARGET_PAGE_BYTES // 2
_KINDS = {
    Workload.SEQUENTIAL: lib.TOY_SEQUENTIAL,
    Workload.RANDOM: lib.TOY_RANDOM,
    Workload.ZIPF: lib.TOY_ZIPF,
    Workload.CHASE: lib.TOY_CHASE,
}
_SHARE_ONE = 1 << 16


def _whole_pages(length: int) -> int:
    return -(-length // TARGET_PAGE_BYTES) * TARGET_PAGE_BYTES


def plan_layout(options: ToyOptions) -> Any:
    """A ``struct toy_layout`` for these options (on the cffi heap).

    :raises ValueError: the working set has fewer pages than there are vCPUs.
    """
    layout = ffi.new("struct toy_layout *")
    layout.seed = options.seed
    layout.smp = options.smp
    layout.block_count = len(options.blocks)
    first = 0
    for index, (_, length) in enumerate(options.blocks):
        pages = length // TARGET_PAGE_BYTES
        is_last = index == len(options.blocks) - 1
        free = pages - (options.ring_pages if is_last and options.has_ring else 0)
        layout.page_count[index] = pages
        layout.filled[index] = int(free * options.fill_share)
        layout.first[index] = first
        first += layout.filled[index]
    layout.first[len(options.blocks)] = first
    wanted = options.working_set_bytes
    reachable = first if wanted is None else min(first, wanted // TARGET_PAGE_BYTES)
    layout.working_set = reachable if options.smp else 0
    if layout.working_set < options.smp:
        raise ValueError(
            f"a working set of {layout.working_set} pages for {options.smp} vCPUs: each needs one"
        )
    return layout


class AuxMemory:
    """One mapping: a page of layout and workload, then each vCPU's state and log, page aligned.

    :ivar address: its first byte. :ivar length: bytes.
    :ivar workload: the C struct, in place. :ivar layout: ours, of which the guest has a copy there.
    """

    def __init__(self, options: ToyOptions) -> None:
        plan = plan_layout(options)
        state_bytes = _whole_pages(ffi.sizeof("struct toy_state"))
        self._log_entries = [lib.toy_slots_of(plan, i) for i in range(options.smp)]
        self._state_offsets: list[int] = []
        self._log_offsets: list[int] = []
        at = TARGET_PAGE_BYTES
        for entries in self._log_entries:
            self._state_offsets.append(at)
            self._log_offsets.append(at + state_bytes)
            at += state_bytes + _whole_pages(4 * entries)
        self.length = at
        self.address = lib.aux_map(at)
        if self.address < 0:
            raise OSError(-self.address, os.strerror(-self.address))
        # A KVM guest can write to its own copy: nobody here believes that one.
        self.layout = plan
        self.workload = ffi.cast("struct toy_workload *", self.address + _WORKLOAD_OFFSET)
        ffi.memmove(ffi.cast("void *", self.address), plan, ffi.sizeof("struct toy_layout"))
        self.set_workload(options.workload, options.write_share)
        self.set_rate(options.rate)
        for index in range(options.smp):
            # Neighbouring seeds must not give neighbouring sequences; the C generator mixes.
            self.state(index).rng = (
                options.seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03
            ) % (1 << 64)

    def set_workload(self, workload: Workload, write_share: float) -> None:
        """Change what the vCPUs do; takes effect with their next operation."""
        self.workload.kind = _KINDS[workload]
        self.workload.write_share = round(write_share * _SHARE_ONE)

    def set_rate(self, rate: int) -> None:
        """Operations per second of all vCPUs together; 0 = unlimited."""
        smp = max(1, self.layout.smp)
        self.workload.rate = 0 if rate == 0 else max(1, rate // smp)

    def set_stop_at(self, operations: int) -> None:
        """Each vCPU parks itself once it has done so many operations in its life; 0 = never."""
        self.workload.stop_at = operations

    def state(self, index: int) -> Any:
        """vCPU ``index``'s ``struct toy_state``, in place."""
        return ffi.cast("struct toy_state *", self.address + self._state_offsets[index])

    def log_address(self, index: int) -> int:
        """Where vCPU ``index``'s log starts."""
        return self.address + self._log_offsets[index]

    def log_bytes(self, index: int) -> int:
        """Bytes of vCPU ``index``'s log: a u32 for each page it owns."""
        return 4 * self._log_entries[index]

    def log(self, index: int) -> Any:
        """vCPU ``index``'s log as a writable buffer, little-endian u32s."""
        return ffi.buffer(ffi.cast("char *", self.log_address(index)), self.log_bytes(index))

    def view(self, index: int, blocks: Sequence[RAMBlock]) -> Any:
        """A ``struct toy_view`` with host addresses, for a vCPU that is a thread of ours."""
        view = ffi.new("struct toy_view *")
        for number, block in enumerate(blocks):
            view.base[number] = block.host
        view.log = self.log_address(index)
        view.state = self.address + self._state_offsets[index]
        view.layout = self.address
        view.workload = self.address + _WORKLOAD_OFFSET
        return view

    def close(self) -> None:
        """Unmap. Every vCPU must have been joined. Harmless the second time."""
        if self.address:
            lib.aux_unmap(self.address, self.length)
            self.address = 0
