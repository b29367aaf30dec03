"""A parked VM as a machine of the runtime: RAM mapped from its files, devices as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from guestmem import Backing, Bitmap, RAMBlock, RAMList, TrackerKind
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from migration.native import crc32c
from migration.wire.io import Reader, Writer
from migration.wire.registry import StateRegistry

from .manifest import DEVICES, Manifest, ParkedDevice, ParkError
from .store import data_extents


class NothingWritten:
    """A dirty tracker for a guest that does not run."""

    kind = TrackerKind.NONE

    def start(self) -> None:
        """Nobody writes."""

    def sync(self, into: dict[str, Bitmap]) -> int:
        return 0

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        raise ParkError("a parked VM's RAM was written")

    def stop(self) -> None:
        """Nothing to stop."""


class ParkedMachine:
    """A parked VM as the runtime's :class:`~migration.runtime.machine.Machine`."""

    needs_kernel_faults = False
    incoming_run_state: str | None = None

    def __init__(self, directory: Path, manifest: Manifest, page_sizes: Mapping[str, int]) -> None:
        self.manifest = manifest
        self.machine_type = manifest.machine
        self.run_state = manifest.run_state if manifest.run_state != "running" else "paused"
        self.registry = StateRegistry()
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.ram = RAMList(self._map(stack, directory, page_sizes))
            devices = (directory / DEVICES).read_bytes()
            if crc32c(devices) != manifest.devices_crc32c:
                raise ParkError(f"{directory / DEVICES} is damaged: its checksum is wrong")
            for device in manifest.devices:
                self._register(device, devices[device.offset : device.offset + device.length])
            self._stack = stack.pop_all()

    def _map(
        self, stack: ExitStack, directory: Path, page_sizes: Mapping[str, int]
    ) -> list[RAMBlock]:
        blocks = []
        for each in self.manifest.blocks:
            length = align_up(each.used_length, TARGET_PAGE_BYTES)
            block = RAMBlock.allocate(
                each.idstr, length, backing=Backing.FILE, path=str(directory / each.file)
            )
            stack.callback(block.close)
            page_size = page_sizes.get(each.idstr, TARGET_PAGE_BYTES)
            if length % page_size:
                raise ParkError(
                    f"RAM block {each.idstr!r} of {length} bytes is not whole pages of {page_size}"
                )
            # What the destination has; the file's own pages do not matter for reading.
            block.page_size = page_size
            blocks.append(block)
        return blocks

    def _register(self, device: ParkedDevice, payload: bytes) -> None:
        def save(writer: Writer) -> None:
            writer.write(payload)

        def load_(reader: Reader, version_id: int) -> None:
            raise ParkError("a parked VM takes nothing in")

        self.registry.register_legacy(
            device.idstr, device.instance_id, device.version_id, save=save, load=load_
        )

    def populated(self) -> dict[str, Bitmap]:
        """A bit per target page that the files really hold; the rest is zero."""
        bitmaps = {}
        for block in self.ram:
            bitmap = Bitmap(block.placed_length >> TARGET_PAGE_BITS)
            assert block.fd is not None
            for start, end in data_extents(block.fd, block.used_length):
                first = start >> TARGET_PAGE_BITS
                bitmap.set(first, (align_up(end, TARGET_PAGE_BYTES) >> TARGET_PAGE_BITS) - first)
            bitmaps[block.idstr] = bitmap
        return bitmaps

    def dirty_tracker(self) -> NothingWritten:
        return NothingWritten()

    def note_run_state(self, state: str) -> None:
        """``globalstate`` was parked with the devices; it says what the guest was in."""

    def start(self) -> None:
        """Given back to rest: there is nothing to start."""

    def stop(self) -> None:
        """Nothing runs."""

    def attach_received(self, received: Mapping[str, Bitmap] | None) -> None:
        """Nobody touches anything here."""

    def vcpu_thread_ids(self) -> list[int]:
        return []

    def hold(self, seconds: float) -> None:
        """Nothing runs."""

    def statistics(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        """Unmap and close the files."""
        self._stack.close()
