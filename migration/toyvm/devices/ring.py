"""A descriptor ring in guest RAM, rewritten by the device's thread until the guest stops.

On load the device walks all of its descriptors **through guest RAM**: at a postcopy destination
most of these pages are still missing then, so device load takes real page faults, every time.
"""

from __future__ import annotations

from typing import Any

from guestmem import TARGET_PAGE_BYTES, Bitmap, RAMBlock
from migration.wire.io import Reader
from migration.wire.vmstate import U64, U32Equal, U64Equal, Unused, Validate, VMStateDescription
from uffd.threads import NamedThread

from .._native import ffi, lib
from ..oracle import BAD_PAGES_KEPT, OwnedRange, SweepReport, bad_pages
from ..vcpu import JOIN_TIMEOUT_S

_HEAD_MAX = 1 << 62


class RingDevice:
    """The ring and its thread.

    :ivar block: where it lies. :ivar pages: how many target pages, the last ones of the block.
    :ivar owned: the same, for the oracle's sweep.
    :ivar slots: descriptors in the ring. :ivar seed: of their payloads; the same on both sides.
    :ivar written: pages its thread wrote, for trackers that do not see writes of the VMM (KVM's
        log).
    """

    def __init__(self, block: RAMBlock, number: int, pages: int, *, seed: int, rate: int) -> None:
        """:param number: of the block within the machine."""
        self.block = block
        self.pages = pages
        first = block.page_count - pages
        self.owned = OwnedRange(number, first, pages)
        self.written = Bitmap(block.page_count)
        self.slots = pages * lib.RING_PER_PAGE
        self.seed = seed
        self._native: Any = ffi.new("struct ring *")
        lib.ring_init(
            self._native,
            block.host + first * TARGET_PAGE_BYTES,
            pages,
            seed,
            rate,
            self.written.address,
            first,
        )
        self._thread = NamedThread(
            target=lib.ring_serve, args=(self._native,), name="ring", daemon=True
        )
        self._thread.start()

    @property
    def head(self) -> int:
        """Descriptors written since the guest was born."""
        return int(self._native.head)

    @head.setter
    def head(self, value: int) -> None:
        self._native.head = value

    @property
    def is_lost(self) -> bool:
        """Its thread parked on a poisoned page."""
        return bool(self._native.status == lib.VCPU_LOST_PAGE)

    def fill(self) -> None:
        """Write generation 0 everywhere. Only while parked; not before an incoming migration."""
        lib.ring_fill(self._native)

    def go(self) -> None:
        """Rewrite descriptors from now on."""
        lib.ring_go(self._native)

    def halt(self) -> None:
        """Returns when it does not; never waits for a missing page."""
        lib.ring_halt(self._native)

    def verify_through_ram(self) -> None:
        """Read every page through the block and check its descriptors against the head.

        Sleeps on missing pages, without the GIL. :raises ValueError: naming the first wrong
        descriptor.
        """
        per_page = lib.RING_PER_PAGE
        for page in range(self.pages):
            offset = (self.owned.first + page) * TARGET_PAGE_BYTES
            data = ffi.from_buffer(self.block.read(offset, TARGET_PAGE_BYTES))
            good = lib.ring_verify(self._native, data, page * per_page, per_page)
            if good < per_page:
                raise ValueError(
                    f"descriptor {page * per_page + good} at {self.block.idstr} "
                    f"+{offset:#x} does not fit head {self.head}"
                )

    def sweep(self, blocks: list[RAMBlock]) -> SweepReport:
        """Judge every page of the ring in place. Only while parked."""
        bad = ffi.new("struct toy_bad[]", BAD_PAGES_KEPT)
        errors = lib.ring_sweep(self._native, self.owned.block, bad, BAD_PAGES_KEPT)
        return SweepReport(self.pages, errors, bad_pages(bad, errors, blocks))

    def close(self) -> None:
        """End the thread and join it. Harmless the second time."""
        if self._thread.is_alive():
            lib.ring_halt(self._native)
            lib.ring_quit(self._native)
            self._thread.join(JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                raise RuntimeError("the ring thread does not end")


def _load_version_1(reader: Reader, ring: RingDevice, version_id: int) -> None:
    """Version 1 had a 32-bit head and no seed of its own."""
    ring.head = int.from_bytes(reader.read(4), "big")
    ring.verify_through_ram()


def _post_load(ring: RingDevice, version_id: int) -> None:
    ring.verify_through_ram()


RING = VMStateDescription(
    name="toy-ring",
    version_id=2,
    minimum_version_id=2,
    minimum_version_id_old=1,
    load_state_old=_load_version_1,
    post_load=_post_load,
    fields=(
        U32Equal.with_hint("--ring-pages must be the same on both sides")("slots"),
        Unused(4),
        U64Equal("seed"),
        U64("head"),
        Validate("head in range", lambda ring, version_id: ring.head < _HEAD_MAX),
    ),
)
