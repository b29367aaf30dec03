"""The main thread's reading: sections and commands of the stream, up to the guest's start.

It knows what may stand where; what a command *does* is its :class:`Commands`' and its
:class:`Switchover`'s.
"""

from __future__ import annotations

from typing import Protocol
from uuid import UUID

from migration.native import lib
from migration.wire import headers
from migration.wire.commands import (
    Command,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
    RamNeeded,
    RamZero,
    SwitchoverStart,
    command_name,
    read_command,
)
from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import SectionHeader
from migration.wire.io import BytesReader, Reader
from migration.wire.ram_setup import read_ram_setup

from ..channel import Channel
from ..machine import Machine, uuid_of
from .ram import DestinationRam

PACKAGE_BYTES_MAX = 512 << 20
RAM_SECTION = "ram"
RAM_VERSION = 4


class Commands(Protocol):
    """What the stream makes the destination do before the switchover. ``at`` is the stream offset,
    for errors."""

    @property
    def is_advised(self) -> bool:
        """ADVISE came: page sizes are announced and compared."""
        ...

    @property
    def ignores_shared(self) -> bool:
        """Capability ``x-ignore-shared``: the block list has addresses."""
        ...

    def warn(self, text: str) -> None: ...
    def open_return_path(self, at: int) -> None: ...
    def ping(self, value: int, at: int) -> None: ...
    def advise(self, summary: int, target_page_bytes: int, at: int) -> None: ...
    def discard(self, command: RamDiscard, at: int) -> None: ...
    def needs(self, length: int, at: int) -> None: ...
    def zero(self, command: RamZero, at: int) -> None: ...
    def start_multifd(self, has_flush: bool, at: int) -> None: ...


class Switchover(Protocol):
    """What it makes it do from the package, or the EOF byte of a precopy, on."""

    @property
    def is_started(self) -> bool:
        """The guest was started: the stream is somebody else's, or over."""
        ...

    def listen(self, at: int) -> None: ...
    def package_ping(self, value: int) -> None: ...
    def run_guest(self, at: int) -> None: ...
    def await_run(self, at: int) -> None: ...
    def finish_precopy(self) -> None: ...


class MainStream:
    """Reads one incoming stream from its first byte."""

    def __init__(
        self,
        machine: Machine,
        channel: Channel,
        ram: DestinationRam,
        commands: Commands,
        switchover: Switchover,
    ) -> None:
        self._machine = machine
        self._channel = channel
        self._ram = ram
        self._commands = commands
        self._switchover = switchover
        self._sections: dict[int, SectionHeader] = {}

    def read(self) -> None:
        """Until the guest was started, by RUN or at the end of a precopy.

        :raises RemoteStreamError: the bytes are not a stream for this machine.
        :raises MigrationError: from what it makes us do, or the channel broke.
        """
        self._read_start()
        while not self._switchover.is_started:
            kind = headers.read_section_type(self._channel)
            if kind is SectionType.EOF:
                self._switchover.finish_precopy()
            elif kind is SectionType.COMMAND:
                self._command(read_command(self._channel))
            elif kind is SectionType.FULL:
                self._load_device(self._channel)
            elif kind in (SectionType.START, SectionType.PART, SectionType.END):
                self._load_live(kind)
            else:
                raise RemoteStreamError(
                    f"a {kind.name} section in the middle of the stream",
                    offset=self._channel.position - 1,
                )

    def _read_start(self) -> None:
        headers.read_file_header(self._channel)
        kind = headers.read_section_type(self._channel)
        if kind is not SectionType.CONFIGURATION:
            raise _bad("configuration section missing", self._channel.position - 1)
        at = self._channel.position
        theirs = headers.read_configuration(self._channel)
        if not self._machine.machine_type.startswith(theirs.machine):
            raise RemoteStreamError(
                f"machine type received is {theirs.machine!r} and local is "
                f"{self._machine.machine_type!r}",
                offset=at,
                section="configuration",
            )
        self._compare_capabilities(set(theirs.capabilities or ()), at)
        self._compare_uuids(theirs.uuid, at)

    def _compare_uuids(self, theirs: UUID | None, at: int) -> None:
        """As QEMU does, whatever the capability says here: one without the other is let pass."""
        ours = uuid_of(self._machine)
        if theirs is not None and ours is None:
            self._commands.warn(f"the source is VM {theirs}; this one has no UUID to compare")
        elif theirs is not None and theirs != ours:
            raise RemoteStreamError(
                f"UUID received is {theirs} and local is {ours}: this destination was made for "
                "another VM",
                offset=at,
                section="configuration",
            )

    def _compare_capabilities(self, theirs: set[str], at: int) -> None:
        ours = {"x-ignore-shared"} if self._commands.ignores_shared else set()
        for name in sorted(theirs ^ ours):
            there, here = ("on", "off") if name in theirs else ("off", "on")
            raise RemoteStreamError(
                f"capability {name} is {there} at the source and {here} here",
                offset=at,
                section="configuration",
            )

    # -- sections -------------------------------------------------------------

    def _load_device(self, reader: Reader) -> None:
        header = headers.read_section_header(reader, SectionType.FULL, self._sections)
        self._machine.registry.load_full_section(reader, header, with_footer=True)

    def _load_live(self, kind: SectionType) -> None:
        header = headers.read_section_header(self._channel, kind, self._sections)
        if header.idstr != RAM_SECTION:
            self._machine.registry.load_live_section(self._channel, header, with_footer=True)
            return
        if kind is SectionType.START:
            self._ram_setup(header)
        else:
            self._ram.load_records()
        headers.check_footer(self._channel, header)

    def _ram_setup(self, header: SectionHeader) -> None:
        at = self._channel.position
        if header.version_id != RAM_VERSION:
            raise RemoteStreamError(
                f"version {header.version_id}, not {RAM_VERSION}", offset=at, section=RAM_SECTION
            )
        is_advised = self._commands.is_advised
        summary = self._ram.page_sizes_summary if is_advised else 0
        setup = read_ram_setup(
            self._channel, page_sizes_summary=summary, has_addresses=self._commands.ignores_shared
        )
        self._ram.accept_setup(setup, is_advised=is_advised, offset=at)
        lib.dst_set_ram_section(self._ram.native, header.section_id)
        self._commands.start_multifd(setup.multifd_flush, at)

    # -- commands -------------------------------------------------------------

    def _command(self, command: Command) -> None:
        at = self._channel.position
        match command:
            case OpenReturnPath():
                self._commands.open_return_path(at)
            case Ping(value):
                self._commands.ping(value, at)
            case PostcopyAdvise(summary, target_page_bytes):
                self._commands.advise(summary, target_page_bytes, at)
            case RamDiscard():
                self._commands.discard(command, at)
            case RamNeeded(length):
                self._commands.needs(length, at)
            case RamZero():
                self._commands.zero(command, at)
            case Packaged(length):
                self._package(length, at)
            case SwitchoverStart():
                pass
            case _:
                raise _bad(f"command {command_name(command)} is not expected here", at)

    def _package(self, length: int, at: int) -> None:
        """Take all of the package off the stream before acting on its first byte: from LISTEN on
        the stream belongs to the listen thread."""
        if length > PACKAGE_BYTES_MAX:
            raise _bad(f"a package of {length} bytes (at most {PACKAGE_BYTES_MAX})", at)
        base = self._channel.position
        package = BytesReader(self._channel.read(length), base=base, section="package")
        while package.remaining:
            kind = headers.read_section_type(package)
            if kind is SectionType.FULL:
                self._load_device(package)
            elif kind is SectionType.COMMAND:
                self._package_command(read_command(package), package.position)
            else:
                raise _bad(f"a {kind.name} section inside the package", package.position - 1)
        if not self._switchover.is_started:
            self._switchover.await_run(package.position)

    def _package_command(self, command: Command, at: int) -> None:
        match command:
            case PostcopyListen():
                self._switchover.listen(at)
            case PostcopyRun():
                self._switchover.run_guest(at)
            case Ping(value):
                self._switchover.package_ping(value)
            case _:
                raise _bad(f"command {command_name(command)} inside the package", at)


def skip_description(channel: Channel) -> None:
    """Behind the EOF byte of a precopy: the trailer, if it comes."""
    if channel.peek(1) == bytes([SectionType.VMDESCRIPTION]):
        headers.read_section_type(channel)
        headers.read_vmdescription(channel)


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset)
