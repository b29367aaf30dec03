"""Guest RAM on the destination: what has come, what must go, and the native object that places
it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guestmem import Bitmap, RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from migration.native import ffi, lib
from migration.wire.commands import RamDiscard, RamZero
from migration.wire.errors import RemoteStreamError
from migration.wire.ram_setup import RamSetup, RamSetupBlock

from ..channel import Channel
from ..errors import MigrationError, native_error


class DestinationRam:
    """The RAM of one incoming migration.

    :ivar received: per block a bit per target page that is in place (or known to be zero).
    :ivar requested: per block a bit per target page asked for over the return path.
    :ivar hole_pages: target pages known to be zero without having come.
    :ivar native: ``struct dst *``; its loops are run by the listen and fault threads.
    """

    def __init__(self, ram: RAMList, channel: Channel) -> None:
        self.ram = ram
        self.received = {block.idstr: _bits(block) for block in ram}
        self.requested = {block.idstr: _bits(block) for block in ram}
        self._kept: set[str] = set()
        self._thp: dict[str, bool | None] = {}
        self.hole_pages = 0
        self.native = self._new_native(channel)
        self.vcpu_count = 0

    def _new_native(self, channel: Channel) -> object:
        largest = max((block.page_size for block in self.ram), default=TARGET_PAGE_BYTES)
        err = ffi.new("int *")
        native = lib.dst_new(channel.native, len(self.ram), largest, err)
        if not native:
            raise MemoryError(f"placing {len(self.ram)} RAM blocks (errno {-err[0]})")
        for index, block in enumerate(self.ram):
            result = lib.dst_set_block(
                native, index, block.idstr.encode(), block.host, block.placed_length,
                block.page_size, self.received[block.idstr].address,
                self.requested[block.idstr].address,
                -1 if block.fd is None else block.fd, block.is_shared, block.is_hugetlb,
            )  # fmt: skip
            if result < 0:
                lib.dst_free(native)
                raise ValueError(f"{block!r}: {result}")
        lib.dst_seal(native)
        return native

    @property
    def page_sizes_summary(self) -> int:
        """The host page sizes of all blocks or-ed together, bytes: what ADVISE compares."""
        summary = 0
        for block in self.ram:
            summary |= block.page_size
        return summary

    def empty(self) -> None:
        """Drop everything but what :meth:`keep` named, so that every page is missing. The guest
        must not run.

        :raises GuestMemoryError: a block's file is another process's guest RAM.
        """
        for block in self.ram:
            self.requested[block.idstr].clear_all()
            if block.idstr in self._kept:
                continue
            with block.alone():
                block.discard(0, block.placed_length)
            self.received[block.idstr].clear_all()

    def keep(self, blocks: Iterable[RAMBlock]) -> None:
        """These blocks are the source's own memory: nothing of them is sent, all is there."""
        for block in blocks:
            self._kept.add(block.idstr)
            self.received[block.idstr].fill()

    def accept_setup(self, setup: RamSetup, *, is_advised: bool, offset: int) -> None:
        """Compare the source's block list with ours.

        :raises RemoteStreamError: a block missing on either side, of another length or page size;
            the message names both.
        """
        announced = {block.idstr: block for block in setup.blocks}
        for ours, address in self.ram.with_guest_addresses():
            theirs = announced.pop(ours.idstr, None)
            if theirs is None:
                raise _bad(f"RAM block {ours.idstr!r} is here but not at the source", offset)
            if theirs.used_length != ours.used_length:
                raise _bad(
                    f"size mismatch: {ours.idstr}: {theirs.used_length:#x} at the source, "
                    f"{ours.used_length:#x} here",
                    offset,
                )
            _require_same_place(ours, theirs, address, offset)
            page_size = theirs.page_size or TARGET_PAGE_BYTES
            if is_advised and page_size != ours.page_size:
                raise _bad(
                    f"mismatched RAM page size of {ours.idstr}: {page_size} bytes at the source, "
                    f"{ours.page_size} here",
                    offset,
                )
        if announced:
            raise _bad(f"unknown RAM block {next(iter(announced))!r}: not on this machine", offset)

    def load_records(self) -> None:
        """One section's records, before LISTEN, up to and including their EOS."""
        if lib.dst_load_ram(self.native) < 0:
            raise native_error(self.native.main.error, fallback="loading RAM")  # type: ignore[attr-defined]

    def discard(self, command: RamDiscard, offset: int) -> None:
        """Drop the ranges of one RAM_DISCARD command and forget that they had come.

        :raises RemoteStreamError: unknown block, or a range that is not whole host pages inside it.
        """
        block = self._block_of(command, "discard", offset)
        for each in command.ranges:
            block.discard(each.start, each.length)
            first, count = each.start >> TARGET_PAGE_BITS, each.length >> TARGET_PAGE_BITS
            self.received[block.idstr].clear(first, count)

    def know_zero(self, command: RamZero, offset: int) -> None:
        """Take pages for received that read as zero at the source, as they do here: nothing of them
        has come. A fault on one is answered with zeros here.

        :raises RemoteStreamError: unknown block, a range that is not whole host pages inside it, or
            one of which something came already.
        """
        block = self._block_of(command, "zero range", offset)
        received = self.received[block.idstr]
        for each in command.ranges:
            first, count = each.start >> TARGET_PAGE_BITS, each.length >> TARGET_PAGE_BITS
            if received.count(first, count):
                raise _bad(f"zero range at {each.start:#x} of {block.idstr}: pages came", offset)
            received.set(first, count)
            self.hole_pages += count

    def _block_of(self, command: RamDiscard | RamZero, what: str, offset: int) -> RAMBlock:
        """The block a command names, if its ranges are whole host pages inside it."""
        try:
            block = self.ram.by_idstr(command.idstr)
        except KeyError:
            raise _bad(f"{what} in unknown RAM block {command.idstr!r}", offset) from None
        for each in command.ranges:
            end = each.start + each.length
            if (each.start | each.length) % block.page_size or end > block.placed_length:
                raise _bad(
                    f"{what} of [{each.start:#x}, {end:#x}) in {block.idstr}: not whole pages of "
                    f"{block.page_size} bytes inside {block.placed_length:#x}",
                    offset,
                )
        return block

    def forbid_thp(self) -> None:
        """No transparent huge pages, on every mapping of every block, until :meth:`restore_thp`."""
        for block in self.ram:
            self._thp.setdefault(block.idstr, block.thp)
            block.set_thp(False)

    def restore_thp(self) -> None:
        """What :meth:`forbid_thp` found; harmless without one. The kernel has no way back to "by
        default", so that becomes allowed."""
        for block in self.ram:
            if block.idstr in self._thp:
                block.set_thp(self._thp.pop(block.idstr) is not False)

    @property
    def missing_pages(self) -> int:
        """Target pages that have not come."""
        return int(lib.dst_missing_pages(self.native))

    def statistics(self) -> dict[str, object]:
        """Counters of ``struct dst_stats`` by name (``latency_dist`` as a list)."""
        out = ffi.new("struct dst_stats *")
        lib.dst_get_stats(self.native, out)
        names = (
            "pages_normal", "pages_zero", "precopy_pages", "host_pages_placed", "requests",
            "faults", "duplicate_faults", "resolved_locally", "minor_faults", "requests_by_main",
            "latency_ns_sum", "latency_count",
        )  # fmt: skip
        figures: dict[str, object] = {name: int(getattr(out, name)) for name in names}
        figures["latency_dist"] = [int(count) for count in out.latency_dist]
        return figures

    def blocktime(self) -> dict[str, object]:
        """QEMU's blocktime fields (query-migrate); ms and ns as there."""
        vcpus = self.vcpu_count
        out = ffi.new("uint64_t[3]")
        ns, faults = ffi.new("uint64_t[64]"), ffi.new("uint64_t[64]")
        lib.dst_get_blocktime(self.native, out, ns, faults, out + 1, out + 2)
        stats = self.statistics()
        total, count = int(str(stats["latency_ns_sum"])), int(str(stats["latency_count"]))
        return {
            "postcopy-blocktime": int(out[0]) // 1_000_000,
            "postcopy-vcpu-blocktime": [int(ns[i]) // 1_000_000 for i in range(vcpus)],
            "postcopy-latency": total // count if count else 0,
            "postcopy-latency-dist": stats["latency_dist"],
            "postcopy-vcpu-latency": [
                int(ns[i]) // int(faults[i]) if faults[i] else 0 for i in range(vcpus)
            ],
            "postcopy-non-vcpu-latency": int(out[1]) // int(out[2]) if out[2] else 0,
        }

    def watch_vcpus(self, thread_ids: Sequence[int]) -> None:
        """Whose waiting is blocktime; at most 64."""
        self.vcpu_count = min(len(thread_ids), 64)
        lib.dst_set_vcpus(self.native, ffi.new("int32_t[]", list(thread_ids)), len(thread_ids))

    def close(self) -> None:
        """Free the native object. No loop may be running."""
        if self.native is not None:
            native, self.native = self.native, None
            lib.dst_free(native)


def _require_same_place(ours: RAMBlock, theirs: RamSetupBlock, address: int, offset: int) -> None:
    if theirs.gpa is not None and ours.is_named_file and theirs.gpa != address:
        raise _bad(
            f"mismatched guest address of {ours.idstr}: {theirs.gpa:#x} at the source, "
            f"{address:#x} here",
            offset,
        )


def _bits(block: RAMBlock) -> Bitmap:
    return Bitmap(block.placed_length >> TARGET_PAGE_BITS)


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section="ram")


def require_matching_sizes(ram: DestinationRam, summary: int, target_page_bytes: int) -> None:
    """What ADVISE announced must be what we have.

    :raises MigrationError: naming both sides' sizes.
    """
    if summary != ram.page_sizes_summary:
        raise MigrationError(
            f"postcopy needs matching RAM page sizes: the source has {_sizes(summary)}, "
            f"this host {_sizes(ram.page_sizes_summary)}"
        )
    if target_page_bytes != TARGET_PAGE_BYTES:
        raise MigrationError(
            f"postcopy needs matching target page sizes: {target_page_bytes} bytes at the source, "
            f"{TARGET_PAGE_BYTES} here"
        )


def _sizes(summary: int) -> str:
    sizes = [1 << bit for bit in range(64) if summary >> bit & 1]
    return " and ".join(f"{size >> 10} KiB" for size in sizes) + " pages" if sizes else "none"
