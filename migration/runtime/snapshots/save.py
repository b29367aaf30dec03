"""A standing machine written as one stream, in the order of a precopy's last round.

    header, CONFIGURATION, START ram and live handlers, END of each, FULL of each device, EOF,
    description

Plain, RAM is records and goes out by the native loop; in the mapped-ram layout each page goes to
its own place. What is written is what ``migrate file:`` of a paused guest writes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping

from guestmem import Bitmap, TrackerKind
from guestmem.geometry import TARGET_PAGE_BYTES
from migration.native import lib
from migration.wire import headers
from migration.wire.constants import RAM_SECTION_IDSTR, RAM_SECTION_VERSION, SectionType
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.io import Writer
from migration.wire.ram_setup import write_ram_setup

from ..channel import Channel, ChannelWriter
from ..file_channel import FileWriter
from ..machine import Machine
from ..source.parts import RAM_SECTION_ID
from ..source.ram import SourceRam
from .files import SnapshotError
from .mapped import CAPABILITY, file_ops, write_end_of_list, write_pages, write_setup

_PART_BYTES = 64 << 20


class SnapshotWriter:
    """Writes one snapshot. The guest stands still during :meth:`write`."""

    def __init__(self, machine: Machine, *, is_mapped: bool) -> None:
        self.machine = machine
        self.is_mapped = is_mapped
        self._given_up = threading.Event()

    def give_up(self) -> None:
        """Any thread: :meth:`write` fails soon."""
        self._given_up.set()

    def write(self, fd: int, offset: int) -> None:
        """The whole stream, from ``offset`` of the file on. Not synced yet.

        :raises SnapshotError: :meth:`give_up` was called.
        :raises OSError, MigrationError: the file cannot take it.
        """
        try:
            if self.is_mapped:
                self._write_mapped(fd, offset)
            else:
                self._write_plain(fd, offset)
        finally:
            with contextlib.suppress(Exception):
                self.machine.registry.save_live_cleanup()

    def _keep_going(self) -> None:
        if self._given_up.is_set():
            raise SnapshotError("the snapshot was given up")

    def _write_plain(self, fd: int, offset: int) -> None:
        os.lseek(fd, offset, os.SEEK_SET)
        own = os.dup(fd)  # the channel sets flags and must outlive nothing
        channel = Channel(-1, own, peer="the file", close=lambda: os.close(own), is_two_way=False)
        ram = None
        try:
            writer = ChannelWriter(channel)
            ram = SourceRam(self.machine.ram, channel, _StandsStill())
            lib.src_set_ram_section(ram.native, RAM_SECTION_ID)
            self._write_head(writer, Configuration(self.machine.machine_type))
            write_ram_setup(writer, ram.setup(has_page_sizes=False))
            headers.write_footer(writer, RAM_SECTION_ID)
            self._write_live(writer)
            while ram.remaining_bytes > _PART_BYTES:
                self._keep_going()
                ram.send_part(_PART_BYTES)
            ram.send_part(1 << 62, last=True)
            self._write_tail(writer)
            channel.flush()
        except Exception as error:
            if channel.write_errno:
                raise OSError(channel.write_errno, os.strerror(channel.write_errno)) from error
            raise
        finally:
            if ram is not None:
                ram.close()
            channel.close()

    def _write_mapped(self, fd: int, offset: int) -> None:
        writer = FileWriter(file_ops(fd, name="the file"))
        writer.seek(offset)
        configuration = Configuration(self.machine.machine_type, capabilities=(CAPABILITY,))
        self._write_head(writer, configuration)
        entries = write_setup(writer, self.machine.ram)
        headers.write_footer(writer, RAM_SECTION_ID)
        self._write_live(writer)
        for block, entry in zip(self.machine.ram, entries, strict=True):
            write_pages(fd, block, entry, self._keep_going)
        _ram_header(writer, SectionType.END)
        write_end_of_list(writer)
        headers.write_footer(writer, RAM_SECTION_ID)
        self._write_tail(writer)
        writer.flush()

    def _write_head(self, writer: Writer, configuration: Configuration) -> None:
        headers.write_file_header(writer)
        headers.write_configuration(writer, configuration)
        _ram_header(writer, SectionType.START)

    def _write_live(self, writer: Writer) -> None:
        """All of the live handlers' state; nothing changes it meanwhile."""
        self.machine.registry.save_live_setup(writer)
        self._keep_going()
        self.machine.registry.save_live_complete(writer)

    def _write_tail(self, writer: Writer) -> None:
        saved = self.machine.registry.save_full_sections(writer)
        headers.write_end_of_stream(writer)
        headers.write_vmdescription(writer, saved.vmdesc_json(page_size=TARGET_PAGE_BYTES))


def _ram_header(writer: Writer, kind: SectionType) -> None:
    header = SectionHeader(kind, RAM_SECTION_ID, RAM_SECTION_IDSTR, 0, RAM_SECTION_VERSION)
    headers.write_section_header(writer, header)


class _StandsStill:
    """The dirty tracker of a guest that writes nothing."""

    kind = TrackerKind.NONE

    def start(self) -> None:
        """Nothing to watch."""

    def sync(self, into: Mapping[str, Bitmap]) -> int:
        """Nothing was written."""
        return 0

    def stop(self) -> None:
        """Nothing was watched."""

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        """Nobody writes."""
