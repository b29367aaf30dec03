"""Windows onto RAM in the guest's address space: mapped, aliased, read-only, moved.

A window is a range of guest addresses that shows a range of a RAM block; several may show the same
one. Like everywhere, the layout is the device's state and the contents are RAM's: on load the
layout is made again from what came in, and each window is looked through once, which at a postcopy
destination is a page fault during device load, at whatever place the source left the window.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guestmem import TARGET_PAGE_BYTES, RAMBlock
from migration.wire.vmstate import (
    U32,
    U64,
    Bool,
    GTree,
    MigrationPriority,
    Tmp,
    VMStateDescription,
)

WINDOWS_MAX = 64
_ADDRESS_MAX = 1 << 48


class WindowError(ValueError):
    """No window there, it is read-only, or it would lie where another one is."""


@dataclass
class Window:
    """What one window shows. :ivar block: number of the RAM block. :ivar offset, length: bytes."""

    block: int = 0
    offset: int = 0
    length: int = 0
    is_readonly: bool = False
    moves: int = 0


class WindowDevice:
    """The layout, by guest address. Change and save it while the guest stands still."""

    def __init__(
        self, blocks: Sequence[RAMBlock], look: Callable[[int, int, bytes], str | None]
    ) -> None:
        """:param look: judges a page (block number, page, bytes): what is wrong with it, or
        None."""
        self._blocks = tuple(blocks)
        self._look = look
        self.windows: dict[int, Window] = {}

    def map(self, address: int, window: Window) -> None:
        """Show part of a block at a guest address. :raises WindowError: it does not fit there."""
        self._check(address, window, {})
        others = {at: other for at, other in self.windows.items() if at != address}
        self._check(address, window, others)
        self.windows[address] = window

    def move(self, address: int, offset: int) -> None:
        """Let a window show another part of its block. :raises WindowError: there is none, or the
        block ends before."""
        window = self._at(address)
        moved = Window(window.block, offset, window.length, window.is_readonly, window.moves + 1)
        self.map(address, moved)

    def unmap(self, address: int) -> None:
        """Take a window away. :raises WindowError: there is none."""
        self._at(address)
        del self.windows[address]

    def read(self, address: int, length: int) -> bytes:
        """What the guest sees. May sleep on a missing page, without the GIL."""
        block, offset, _ = self.resolve(address, length)
        return block.read(offset, length)

    def write(self, address: int, data: bytes) -> None:
        """The guest stores. :raises WindowError: read-only. May sleep on a missing page."""
        block, offset, window = self.resolve(address, len(data))
        if window.is_readonly:
            raise WindowError(f"the window at {address:#x} is read-only")
        block.write(offset, data)

    def resolve(self, address: int, length: int) -> tuple[RAMBlock, int, Window]:
        """Block and offset behind a guest address. :raises WindowError: not within one window."""
        for start, window in self.windows.items():
            if start <= address and address + length <= start + window.length:
                return self._blocks[window.block], window.offset + address - start, window
        raise WindowError(f"no window shows [{address:#x}, {address + length:#x})")

    def look_through(self) -> None:
        """Judge the first page of every window. Sleeps on missing pages, without the GIL.

        :raises WindowError: naming the first that does not show what it should.
        """
        for address, window in self.windows.items():
            page = window.offset // TARGET_PAGE_BYTES
            wrong = self._look(window.block, page, self.read(address, TARGET_PAGE_BYTES))
            if wrong:
                raise WindowError(f"the page behind the window at {address:#x} {wrong}")

    def check_layout(self) -> None:
        """:raises WindowError: some window leaves its block or covers another."""
        for address, window in self.windows.items():
            others = {at: other for at, other in self.windows.items() if at != address}
            self._check(address, window, others)

    def _at(self, address: int) -> Window:
        if address not in self.windows:
            raise WindowError(f"no window begins at {address:#x}")
        return self.windows[address]

    def _check(self, address: int, window: Window, others: dict[int, Window]) -> None:
        if window.block >= len(self._blocks) or len(others) >= WINDOWS_MAX:
            raise WindowError(f"window at {address:#x}: block {window.block}, too many or unknown")
        block = self._blocks[window.block]
        whole = (address | window.offset | window.length) % TARGET_PAGE_BYTES == 0
        if not whole or not window.length or address + window.length > _ADDRESS_MAX:
            raise WindowError(f"window at {address:#x}: not whole pages")
        if window.offset + window.length > block.used_length:
            raise WindowError(f"window at {address:#x} leaves block {block.idstr!r}")
        for at, other in others.items():
            if address < at + other.length and at < address + window.length:
                raise WindowError(f"windows at {address:#x} and {at:#x} overlap")


class _LayoutSum:
    """A helper that lives for one save or load: the layout's checksum."""

    def __init__(self, device: WindowDevice) -> None:
        self.device = device
        self.value = 0

    def compute(self) -> int:
        """CRC of the layout in address order."""
        text = repr(sorted(self.device.windows.items()))
        return zlib.crc32(text.encode())

    def fill(self) -> None:
        """Before a save."""
        self.value = self.compute()


def _check_sum(helper: _LayoutSum, version_id: int) -> None:
    if helper.value != helper.compute():
        raise WindowError("the layout does not match its checksum")


def _make_layout_again(device: WindowDevice, version_id: int) -> None:
    device.check_layout()
    device.look_through()


WINDOW = VMStateDescription(
    name="toy-window",
    version_id=1,
    minimum_version_id=1,
    fields=(
        U32("block"),
        U64("offset"),
        U64("length"),
        Bool("is_readonly"),
        U64("moves"),
    ),
)

LAYOUT_SUM = VMStateDescription(
    name="toy-windows-sum",
    version_id=1,
    minimum_version_id=1,
    pre_save=_LayoutSum.fill,
    post_load=_check_sum,
    fields=(U32("value"),),
)

WINDOWS = VMStateDescription(
    name="toy-windows",
    version_id=1,
    minimum_version_id=1,
    # Who translates addresses goes before the devices that use them.
    priority=MigrationPriority.IOMMU,
    post_load=_make_layout_again,
    fields=(
        GTree("windows", WINDOW, new=Window, limit=WINDOWS_MAX),
        Tmp(LAYOUT_SUM, new=_LayoutSum, name="sum"),
    ),
)
