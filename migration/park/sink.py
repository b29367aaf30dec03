"""A destination that knows nothing of the machine: takes a stream in and keeps what it says.

One thread does it all but the preempt channel: nobody runs here, so nobody faults, and a postcopy
source sends every page unasked. :class:`StreamSink` reads; what becomes of blocks and state is its
:class:`Keeper`'s.

A connection that breaks in postcopy is waited for: the device state is here, the rest of RAM there.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from migration.native import ffi, lib
from migration.runtime.channel import Channel, ChannelWriter
from migration.runtime.errors import MigrationError, is_lost_channel, native_error
from migration.runtime.recovery import acknowledge, answer_source
from migration.wire import headers
from migration.wire.commands import (
    Command,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyAdviseEmpty,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
    SwitchoverStart,
    command_name,
    read_command,
)
from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.extension import DestinationHandshake, Feature
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.ram_setup import RamSetup, read_ram_setup
from migration.wire.return_path import Pong, Shut, write_rp

from .links import SourceLinks
from .sections import OpaqueSection, PrecopyTail, in_package

DEVICE_BYTES_MAX = 512 << 20
_READ = 256 << 10
_FEATURES = Feature.CHECKSUM | Feature.SPLIT_RUN


@dataclass(frozen=True, slots=True)
class SinkBlock:
    """Where a block's pages go: memory at ``host``, or (host 0) the file ``fd``."""

    idstr: str
    used_length: int
    page_size: int
    host: int
    fd: int


class Keeper(Protocol):
    """What becomes of the stream's contents. All calls come from the thread that runs the sink."""

    def blocks(self, setup: RamSetup) -> list[SinkBlock]:
        """The block list came; make room."""
        ...

    def discarded(self, index: int, start: int, length: int) -> None:
        """The source takes back pages: they read as zero until they come again."""
        ...

    def packaged(self, sections: list[OpaqueSection], accept: Callable[[], None]) -> None:
        """Device state is whole, and pages go on coming (postcopy). The source's last PINGs are
        answered when ``accept`` is called, now or later, from any thread."""
        ...

    def refusal(self) -> int:
        """Something went wrong: the value for SHUT. Non-zero gives the guest back to its source."""
        ...

    def finished(self, sections: list[OpaqueSection]) -> None:
        """Everything is here. After this returned the source is told that all is well."""
        ...


class StreamSink:
    """One incoming stream.

    :ivar configuration: machine name and what else the header said.
    :ivar is_postcopy: the source entered postcopy: its guest is ours to keep.
    :ivar native: ``struct dst *`` once the blocks are known.
    """

    def __init__(
        self,
        channel: Channel,
        keeper: Keeper,
        *,
        warn: Callable[[str], None],
        links: SourceLinks | None = None,
    ) -> None:
        """:param links: more connections of the same source; closed with this."""
        self.channel = channel
        self._links = links or SourceLinks(None, give_up_s=0)
        self._old_channels: list[Channel] = []
        self._urgent_error: Exception | None = None
        self._stopped = threading.Event()
        self.configuration = Configuration("?")
        self.is_postcopy = False
        self.has_return_path = False
        self.native: Any = None
        self.received: list[Bitmap] = []
        self.requested: list[Bitmap] = []
        self._keeper = keeper
        self._warn = warn
        self._blocks: list[SinkBlock] = []
        self._summary = 0
        self._sections: dict[int, SectionHeader] = {}
        self._handshake = DestinationHandshake(_FEATURES)
        self._features = Feature(0)
        self._run_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # -- the whole stream -----------------------------------------------------

    def run(self) -> None:
        """Read to the end and answer SHUT 0; SHUT 1 when anything goes wrong before.

        :raises RemoteStreamError: bad bytes. :raises MigrationError, OSError: anything else.
        """
        try:
            self._read()
        except BaseException:
            self._refuse()
            raise
        self._shut(0)

    def _read(self) -> None:
        headers.read_file_header(self.channel)
        if headers.read_section_type(self.channel) is not SectionType.CONFIGURATION:
            raise RemoteStreamError("configuration section missing", offset=8)
        self.configuration = headers.read_configuration(self.channel)
        if self.configuration.capabilities:
            names = ", ".join(self.configuration.capabilities)
            raise RemoteStreamError(
                f"the source uses {names}, which a parked VM cannot be made of", offset=8
            )
        while True:
            kind = headers.read_section_type(self.channel)
            if kind is SectionType.COMMAND:
                if self._command(read_command(self.channel)):
                    return
            elif kind in (SectionType.START, SectionType.PART, SectionType.END):
                self._live(kind)
            elif kind is SectionType.FULL:
                self._precopy_devices()
                return
            else:
                raise RemoteStreamError(
                    f"a {kind.name} where sections should be", offset=self.channel.position - 1
                )

    # -- live sections: RAM ---------------------------------------------------

    def _live(self, kind: SectionType) -> None:
        header = headers.read_section_header(self.channel, kind, self._sections)
        if header.idstr != "ram":
            raise RemoteStreamError(
                f"live section {header.idstr!r}: only RAM is taken in, not disks or their bitmaps",
                offset=self.channel.position,
                section=header.idstr,
            )
        if kind is SectionType.START:
            self._ram_setup(header)
        elif lib.dst_load_ram(self._dst()) < 0:
            raise native_error(self.native.main.error, fallback="loading RAM")
        headers.check_footer(self.channel, header)

    def _dst(self) -> Any:
        if self.native is None:
            raise RemoteStreamError("RAM pages before the block list", offset=self.channel.position)
        return self.native

    def _ram_setup(self, header: SectionHeader) -> None:
        if not self.has_return_path:
            self._warn(
                "the source opened no return path: it believes in the end of this as soon as all "
                "bytes are sent, before they are on disk (set capability return-path there)"
            )
        setup = read_ram_setup(self.channel, page_sizes_summary=self._summary)
        self._blocks = self._keeper.blocks(setup)
        err = ffi.new("int *")
        self.native = lib.dst_new(self.channel.native, len(self._blocks), TARGET_PAGE_BYTES, err)
        if not self.native:
            raise MemoryError("the list of RAM blocks")
        for index, block in enumerate(self._blocks):
            self._set_block(index, block)
        lib.dst_seal(self.native)
        lib.dst_set_sink(self.native, ffi.NULL)
        lib.dst_set_ram_section(self.native, header.section_id)
        self._expect_urgent()

    def _expect_urgent(self) -> None:
        if self.has_return_path:
            is_framed = Feature.CHECKSUM in self._features
            self._links.expect_urgent(self.native, self._urgent_failed, is_framed=is_framed)

    def _urgent_failed(self, error: Exception) -> None:
        self._urgent_error = error
        self.channel.abort()

    def _set_block(self, index: int, block: SinkBlock) -> None:
        length = align_up(block.used_length, TARGET_PAGE_BYTES)
        self.received.append(Bitmap(length >> TARGET_PAGE_BITS))
        self.requested.append(Bitmap(length >> TARGET_PAGE_BITS))
        result = lib.dst_set_block(
            self.native, index, block.idstr.encode(), block.host, length, TARGET_PAGE_BYTES,
            self.received[index].address, self.requested[index].address, block.fd, 0, 0,
        )  # fmt: skip
        if result < 0:
            raise MigrationError(f"RAM block {block.idstr!r} cannot be kept (errno {-result})")

    # -- commands -------------------------------------------------------------

    def _command(self, command: Command) -> bool:
        """True when the stream is over."""
        at = self.channel.position
        match command:
            case OpenReturnPath():
                if not self.channel.is_two_way:
                    raise RemoteStreamError(
                        "the source wants a return path over a one-way channel", offset=at
                    )
                self.has_return_path = True
            case Ping(value):
                self._ping(value, at)
            case PostcopyAdvise(summary, target_page_bytes):
                if target_page_bytes != TARGET_PAGE_BYTES:
                    raise RemoteStreamError(f"target pages of {target_page_bytes} bytes", offset=at)
                self._summary = summary
            case PostcopyAdviseEmpty() | SwitchoverStart():
                pass
            case RamDiscard():
                self._discard(command, at)
            case Packaged(length):
                self._package(length, at)
                return True
            case _:
                raise RemoteStreamError(f"command {command_name(command)} here", offset=at)
        return False

    def _ping(self, value: int, at: int) -> None:
        was_in_force = self._handshake.is_in_force
        for pong in self._handshake.on_ping(value, offset=at):
            self._pong(pong.value)
        if self._handshake.is_in_force and not was_in_force:
            self._features = self._handshake.chosen
            if Feature.CHECKSUM in self._features:
                self.channel.set_write_framed()
                self.channel.set_read_framed()

    def _pong(self, value: int) -> None:
        write_rp(ChannelWriter(self.channel), Pong(value))
        self.channel.flush()

    def _discard(self, command: RamDiscard, at: int) -> None:
        names = [block.idstr for block in self._blocks]
        if command.idstr not in names:
            raise RemoteStreamError(f"discard in unknown RAM block {command.idstr!r}", offset=at)
        index = names.index(command.idstr)
        length = len(self.received[index]) << TARGET_PAGE_BITS
        for each in command.ranges:
            if (each.start | each.length) % TARGET_PAGE_BYTES or each.start + each.length > length:
                raise RemoteStreamError(
                    f"discard of [{each.start:#x}, +{each.length:#x}) in {command.idstr}", offset=at
                )
            first, count = each.start >> TARGET_PAGE_BITS, each.length >> TARGET_PAGE_BITS
            if self.received[index].count(first, count):
                self._keeper.discarded(index, each.start, each.length)
            self.received[index].clear(first, count)

    # -- device state ---------------------------------------------------------

    def _package(self, length: int, at: int) -> None:
        if length > DEVICE_BYTES_MAX:
            raise RemoteStreamError(f"a package of {length} bytes", offset=at)
        self.is_postcopy = True
        package = self.channel.read(length)
        sections, pings, has_run = [], [], False
        for item in in_package(package):
            match item:
                case OpaqueSection():
                    sections.append(item)
                case Ping(value):
                    pings.append(value)
                case PostcopyRun():
                    has_run = True
                case PostcopyListen():
                    pass
                case _:
                    raise RemoteStreamError(f"command {command_name(item)} in a package", offset=at)
        run_fd = -1 if has_run else self._run_fd
        lib.dst_start_postcopy(self._dst(), -1, -1, run_fd, 0, 0, 0)

        def accept() -> None:
            for value in pings:
                self._pong(value)

        self._keeper.packaged(sections, accept)
        self._rest_of_ram()
        self._keeper.finished(sections)

    def _rest_of_ram(self) -> None:
        while True:
            try:
                self._listen()
                break
            except MigrationError as error:
                cause, self._urgent_error = self._urgent_error or error, None
                if not is_lost_channel(cause) or not self._links.can_come_back:
                    raise cause from error
                self._recover(cause)
        self._links.await_last_pages(lambda: self.missing_pages)
        self._require_whole()

    def _listen(self) -> None:
        event = lib.dst_listen_loop(self.native)
        if event < 0:
            raise native_error(self.native.main.error, fallback="taking in RAM")
        if event != 0:
            raise RemoteStreamError("something else than RAM", offset=self.channel.position)

    # -- after a cut ------------------------------------------------------------

    def _recover(self, cause: Exception) -> None:
        """Wait for the source to come back, and agree with it on what is still to come.

        :raises MigrationError: it did not in time, or nobody wants to wait any longer.
        """
        while True:
            self._warn(
                f"the connection to the source broke ({cause}); its guest is paused. There: "
                f"migrate -r {self._links.uri} (QMP: migrate with resume)"
            )
            self.channel.abort()
            channel = self._links.accept_again()
            try:
                self._resume_over(channel)
                return
            except (MigrationError, RemoteStreamError) as error:
                if not self._links.can_come_back:
                    raise
                cause = error

    def _resume_over(self, channel: Channel) -> None:
        # A relay's other leg may have a request on its way into the old one: it is closed later.
        self._old_channels.append(self.channel)
        self.channel = channel
        if self._stopped.is_set():
            channel.abort()
        if Feature.CHECKSUM in self._features:
            channel.set_read_framed()
            channel.set_write_framed()
        names = [block.idstr for block in self._blocks]
        self._expect_urgent()
        answer_source(channel, dict(zip(names, self.received, strict=True)))
        lib.dst_set_channel(self.native, channel.native)
        acknowledge(channel)
        self._warn("the source is back")
        asked = lib.dst_request_again(self.native)
        if asked < 0:
            raise MigrationError(f"asking again: {os.strerror(-asked)}")

    def stop(self) -> None:
        """Any thread: :meth:`run` ends with an error soon."""
        self._stopped.set()
        self._links.interrupt()
        self.channel.abort()

    def _require_whole(self) -> None:
        missing = int(lib.dst_missing_pages(self._dst()))
        if missing:
            raise RemoteStreamError(
                f"the source ended the stream with {missing} pages never sent",
                offset=self.channel.position,
                section="ram",
            )

    def _precopy_devices(self) -> None:
        """From the type byte of the first device section (read already) to the description."""
        self._require_whole()
        tail = PrecopyTail(DEVICE_BYTES_MAX)
        tail.feed(bytes([SectionType.FULL]))
        answered = False
        while (sections := tail.sections()) is None:
            if not answered and Feature.SPLIT_RUN in self._features and (ping := tail.take_ping()):
                answered = True
                self._pong(ping.value)
            tail.feed(self._read_some())
        self._keeper.finished(sections)

    def _read_some(self) -> bytes:
        buffer = bytearray(_READ)
        got = lib.chan_read_some(self.channel.native, ffi.from_buffer(buffer), len(buffer))
        if got == -61:  # ENODATA
            raise TruncatedStreamError(
                "the stream ended without a description of its devices",
                offset=self.channel.position,
                section="devices",
            )
        if got < 0:
            self.channel.read(1)  # raises the error in the channel's words
        return bytes(buffer[:got])

    # -- the answer -----------------------------------------------------------

    def _shut(self, value: int) -> None:
        if self.has_return_path:
            write_rp(ChannelWriter(self.channel), Shut(value))
            self.channel.flush()

    def _refuse(self) -> None:
        with contextlib.suppress(MigrationError, OSError):  # the connection may be what broke
            self._shut(self._keeper.refusal())

    @property
    def missing_pages(self) -> int:
        """Target pages that have not come."""
        return int(lib.dst_missing_pages(self.native)) if self.native is not None else 0

    def close(self) -> None:
        """Free everything, the channel too. :meth:`run` must have returned."""
        if self.native is not None:
            self._links.close()
            native, self.native = self.native, None
            lib.dst_free(native)
        self._links.close()
        for channel in (self.channel, *self._old_channels):
            channel.close()
        os.close(self._run_fd)
