"""A machine's state replaced by what a stream in a file says.

:meth:`SnapshotReader.prepare` reads what comes before anything changes: header, machine type, RAM
list. Only :meth:`SnapshotReader.load` touches the guest; if it fails there is no guest any more.
"""

from __future__ import annotations

import contextlib
import os
import threading

from guestmem import RAMBlock
from guestmem.errors import GuestMemoryLost
from migration.wire import headers
from migration.wire.commands import (
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    SwitchoverStart,
    command_name,
    read_command,
)
from migration.wire.constants import RAM_SECTION_IDSTR, RAM_SECTION_VERSION, SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import SectionHeader
from migration.wire.io import Reader
from migration.wire.ram_setup import read_ram_setup

from ..channel import Channel
from ..destination.ram import DestinationRam
from ..file_channel import FileReader
from ..machine import Machine
from .files import SnapshotError
from .mapped import (
    CAPABILITY,
    MappedArea,
    file_ops,
    read_end_of_list,
    read_pages,
    read_setup,
)

_GLOBAL_STATE = "globalstate"
_LIVE = (SectionType.START, SectionType.PART, SectionType.END)


class SnapshotReader:
    """Reads one stream from a file, plain or mapped-ram, ours or a QEMU's.

    Positions in errors are the file's.

    :param fd: stays the caller's. :param offset: where the stream begins.
    :param label: what to call it.
    :ivar is_mapped: the layout found by :meth:`prepare`.
    :ivar run_state: what the guest was in when it was saved; None: the stream does not say.
    """

    def __init__(self, machine: Machine, fd: int, *, offset: int, label: str) -> None:
        self.machine = machine
        self.is_mapped = False
        self._fd = fd
        self._offset = offset
        self._reader: Reader = FileReader(file_ops(fd, name=label), position=offset)
        self._sections: dict[int, SectionHeader] = {}
        self._areas: tuple[MappedArea, ...] = ()
        self._page_sizes = 0
        self._is_advised = False
        self._has_ram = False
        self._has_run_state = False
        self._given_up = threading.Event()
        own = os.dup(fd)
        self._channel = Channel(own, -1, peer=label, close=lambda: os.close(own), is_two_way=False)
        self._ram = DestinationRam(machine.ram, self._channel)

    @property
    def run_state(self) -> str | None:
        """The guest's run state when it was saved."""
        return self.machine.incoming_run_state if self._has_run_state else None

    def give_up(self) -> None:
        """Any thread: whatever runs fails soon."""
        self._given_up.set()
        self._channel.abort()

    def _keep_going(self) -> None:
        if self._given_up.is_set():
            raise SnapshotError("loading was given up")

    # -- before anything changes ----------------------------------------------

    def prepare(self) -> None:
        """Read up to and including the list of RAM, which stands in front of all state.

        :raises RemoteStreamError: not a stream for this machine. Nothing has changed.
        """
        self._read_head()
        while not self._has_ram:
            kind = headers.read_section_type(self._reader)
            if kind is SectionType.COMMAND:
                self._command()
                continue
            if kind is not SectionType.START:
                raise self._bad(f"a {kind.name} section before the list of RAM")
            header = headers.read_section_header(self._reader, kind, self._sections)
            if header.idstr != RAM_SECTION_IDSTR:
                # Its payload belongs to a device: it is for load() to read, after RAM is emptied.
                raise self._bad(f"section {header.idstr!r} before the list of RAM")
            self._ram_setup(header)

    def _read_head(self) -> None:
        headers.read_file_header(self._reader)
        if headers.read_section_type(self._reader) is not SectionType.CONFIGURATION:
            raise self._bad("configuration section missing")
        theirs = headers.read_configuration(self._reader)
        if not self.machine.machine_type.startswith(theirs.machine):
            raise self._bad(
                f"machine type of the snapshot is {theirs.machine!r} and local is "
                f"{self.machine.machine_type!r}"
            )
        for name in theirs.capabilities or ():
            if name != CAPABILITY:
                raise self._bad(f"the snapshot uses capability {name!r}, which is not known here")
        self.is_mapped = bool(theirs.capabilities)

    def _ram_setup(self, header: SectionHeader) -> None:
        at = self._reader.position
        if header.version_id != RAM_SECTION_VERSION:
            raise self._bad(f"RAM of version {header.version_id}, not {RAM_SECTION_VERSION}")
        if self.is_mapped:
            assert isinstance(self._reader, FileReader)
            setup, self._areas = read_setup(self._reader)
        else:
            setup = read_ram_setup(self._reader, page_sizes_summary=self._page_sizes)
        self._ram.accept_setup(setup, is_advised=self._is_advised, offset=at)
        headers.check_footer(self._reader, header)
        self._has_ram = True

    def _command(self) -> None:
        """Commands of a migration that was recorded: those that ask for nothing are passed over."""
        command = read_command(self._reader)
        match command:
            case PostcopyAdvise(summary, _):
                self._is_advised, self._page_sizes = True, summary
            case OpenReturnPath() | Ping() | SwitchoverStart():
                pass
            case _:
                raise self._bad(f"command {command_name(command)}: this is no snapshot")

    # -- the guest changes ----------------------------------------------------

    def load(self) -> None:
        """Empty RAM, then load everything, in the order of the stream. The guest stands still.

        :raises Exception: the stream is damaged or cut short, or a device refuses it. The machine
            is then partly the old and partly the new one, and must not run.
        """
        registry = self.machine.registry
        for block in self.machine.ram:
            _empty(block)
        try:
            registry.load_live_setup()
            if self.is_mapped:
                areas = {area.idstr: area for area in self._areas}
                for block in self.machine.ram:
                    read_pages(self._fd, block, areas[block.idstr], self._keep_going)
            else:
                self._continue_natively()
            while (kind := headers.read_section_type(self._reader)) is not SectionType.EOF:
                self._keep_going()
                self._section(kind)
        finally:
            with contextlib.suppress(Exception):
                registry.load_live_cleanup()

    def _continue_natively(self) -> None:
        """From here on the native loop reads the records: let it stand where we do."""
        here = self._reader.position
        os.lseek(self._fd, self._offset, os.SEEK_SET)
        self._channel.read(here - self._offset)
        self._reader = _At(self._channel, self._offset)

    def _section(self, kind: SectionType) -> None:
        if kind is SectionType.COMMAND:
            self._command()
        elif kind in _LIVE:
            self._live(headers.read_section_header(self._reader, kind, self._sections))
        elif kind is SectionType.FULL:
            header = headers.read_section_header(self._reader, kind, self._sections)
            self.machine.registry.load_full_section(self._reader, header, with_footer=True)
            self._has_run_state |= header.idstr == _GLOBAL_STATE
        else:
            raise self._bad(f"a {kind.name} section in the middle of the stream")

    def _live(self, header: SectionHeader) -> None:
        if header.idstr != RAM_SECTION_IDSTR:
            self.machine.registry.load_live_section(self._reader, header, with_footer=True)
            return
        if header.type is SectionType.START:
            raise self._bad("the list of RAM comes twice")
        if self.is_mapped:
            read_end_of_list(self._reader)
        else:
            self._ram.load_records()
        headers.check_footer(self._reader, header)

    def _bad(self, reason: str) -> RemoteStreamError:
        return RemoteStreamError(reason, offset=self._reader.position)

    def close(self) -> None:
        """Free everything but the descriptor."""
        self._ram.close()
        self._channel.close()


def _empty(block: RAMBlock) -> None:
    """All of it reads as zero. Huge pages are kept: given back, somebody else may take them."""
    if block.is_hugetlb:
        try:
            block.fill(0, block.used_length, 0)
            return
        except GuestMemoryLost:  # poisoned by a migration that was given up
            pass
    block.discard(0, block.placed_length)


class _At:
    """A reader whose positions count from the start of the file."""

    def __init__(self, channel: Channel, offset: int) -> None:
        self._channel = channel
        self._offset = offset

    @property
    def position(self) -> int:
        return self._offset + self._channel.position

    def read(self, length: int) -> bytes:
        return self._channel.read(length)

    def peek(self, length: int) -> bytes:
        return self._channel.peek(length)
