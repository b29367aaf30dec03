"""``postcopy unpark``: a directory becomes a running guest again, at once, pages following on demand.

We are the source of a postcopy that begins with everything discarded: the device state goes out as
the package, RAM is mapped from the files, requested pages first, the rest behind. Zero pages are
neither on the disk nor on the wire, unless they are asked for.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guestmem import Backing, Bitmap, RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from migration.engine.states import StatusInput
from migration.native import crc32c
from migration.runtime.channel import Channel
from migration.runtime.outgoing import OutgoingMigration, OutgoingOptions
from migration.runtime.report import EventListener, Report
from migration.wire.extension import Feature
from migration.wire.headers import Configuration
from migration.wire.io import Reader, Writer
from migration.wire.registry import StateRegistry

from .manifest import DEVICES, Manifest, ParkedDevice, ParkedState, ParkError, change_state, load
from .store import checksum, data_extents
from .working_set import RequestLog, prefetch_list


class NothingWritten:
    """A dirty tracker for a guest that does not run."""

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


@dataclass(frozen=True, slots=True)
class GiveOptions:
    """What the user decides.

    :ivar page_sizes: host page size of the destination per block, bytes; others have target pages.
    :ivar is_clone: give a copy; the parked VM stays as it is.
    :ivar force: also from a state that is not certain, and clones with writable disks.
    :ivar on_demand_only_s: how long only requested pages are sent.
    :ivar record: file for the requests as they came. :ivar prefetch: such a file, pushed first.
    :ivar verify: check the checksums of RAM before anything is sent.
    """

    page_sizes: Mapping[str, int]
    is_clone: bool = False
    force: bool = False
    on_demand_only_s: float = 0.0
    record: Path | None = None
    prefetch: Path | None = None
    verify: bool = False
    in_flight_bytes: int = 192 << 10


class Giving:
    """One unpark. :meth:`run` returns when the destination has everything."""

    def __init__(self, directory: Path, options: GiveOptions, listener: EventListener) -> None:
        """:raises ParkError: the VM may not be given (any more), or is damaged."""
        self.directory = directory
        self.options = options
        self.manifest = load(directory)
        self._refuse()
        self.machine = ParkedMachine(directory, self.manifest, options.page_sizes)
        self.report = Report(listener)
        self.migration: OutgoingMigration | None = None
        self._log: RequestLog | None = None

    def _refuse(self) -> None:
        manifest, options = self.manifest, self.options
        if manifest.state is not ParkedState.PARKED and not (options.is_clone or options.force):
            raise ParkError(
                f"{self.directory} is {manifest.state.value}, not parked: "
                + {
                    ParkedState.GIVING: "a destination may run this guest; when none does, --force",
                    ParkedState.GIVEN: "it was given away; use --clone to start another copy",
                    ParkedState.UNCONFIRMED: "its source may still run it; when it does not, --force",
                }[manifest.state]
            )
        if options.is_clone and manifest.block_devices and not options.force:
            raise ParkError(
                f"{self.directory} has disks ({', '.join(manifest.block_devices)}), which are not "
                "parked with it: two guests on one disk destroy it. With disks of their own: --force"
            )

    @property
    def until_running_ms(self) -> float:
        """From the start until the destination had all it needs to run the guest."""
        moved = self.report.guest_moved_ns or self.report.started_ns
        return (moved - self.report.started_ns) / 1e6

    def run(self, channel: Channel) -> None:
        """Give it over this channel, which is closed at the end.

        :raises Exception: it failed; the manifest says who has the guest.
        """
        if self.options.verify:
            self._verify()
        self.report.advance(StatusInput.START)
        parameters = {
            "max-postcopy-bandwidth": 0,
            "max-bandwidth": 0,
            "downtime-limit": 0,
            "avail-switchover-bandwidth": 0,
            "x-hold-background": int(self.options.on_demand_only_s > 0),
            "x-postcopy-sndbuf": self.options.in_flight_bytes,
        }
        self.migration = OutgoingMigration(
            self.machine,
            channel,
            OutgoingOptions(
                postcopy=True,
                return_path=True,
                features=Feature.CHECKSUM | Feature.SPLIT_RUN | Feature.SPARSE,
                parameter=lambda name: int(parameters[name]),
                configuration=self._configuration(),
                before_giving=self._giving,
            ),
            self.report,
        )
        try:
            self._give(self.migration, parameters)
        finally:
            self._settle()
            self.migration.close()

    def _give(self, migration: OutgoingMigration, parameters: dict[str, int]) -> None:
        migration.ram.nothing_sent = True
        migration.ram.push_only(self.machine.populated())
        self._log = RequestLog(migration.ram.native) if self.options.record else None
        if self.options.prefetch:
            self._prefetch = prefetch_list(
                migration.ram.native, self.options.prefetch, self.machine.ram
            )
        migration.start_postcopy()

        def push() -> None:
            parameters["x-hold-background"] = 0
            migration.settings_changed()

        timer = threading.Timer(self.options.on_demand_only_s, push)
        if self.options.on_demand_only_s:
            timer.daemon = True
            timer.start()
        try:
            migration.run()
        finally:
            timer.cancel()

    def _configuration(self) -> Configuration:
        vm_uuid = None if self.manifest.uuid is None else uuid.UUID(self.manifest.uuid)
        return Configuration(self.manifest.machine, uuid=vm_uuid)

    def _verify(self) -> None:
        for block, kept in zip(self.machine.ram, self.manifest.blocks, strict=True):
            assert block.fd is not None
            if checksum(block.fd, kept.used_length) != kept.crc32c:
                raise ParkError(f"{self.directory / kept.file} is damaged: its checksum is wrong")

    def _giving(self) -> None:
        if not self.options.is_clone:
            self.manifest = change_state(
                self.directory, self.manifest, ParkedState.GIVING, "a destination may run it"
            )

    def _settle(self) -> None:
        """Write down how it ended."""
        assert self.migration is not None
        if self._log is not None and self.options.record is not None:
            self._log.save(self.options.record, self.machine.ram)
        if self.options.is_clone:
            return
        if self.report.status.value == "completed":
            self.manifest = change_state(
                self.directory,
                self.manifest,
                ParkedState.GIVEN,
                f"to {self.migration.channel.peer}",
            )
        elif self.manifest.state is ParkedState.GIVING and self.report.status.value == "failed":
            if not self.migration.is_committed():
                self.manifest = change_state(
                    self.directory, self.manifest, ParkedState.PARKED, "the destination said no"
                )

    def close(self) -> None:
        """Unmap the files."""
        self.machine.close()


_ = os
