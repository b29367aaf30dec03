"""A destination that knows nothing of the machine: takes a stream in and keeps what it says.

One thread does it all but the preempt channel: nobody runs here, so nobody faults, and a postcopy
source sends every page unasked. :class:`StreamSink` reads; what becomes of blocks and state is its
:class:`~migration.park.keeper.Keeper`'s.

From the package on the guest's device state is here and the rest of its RAM there, and a QEMU then
never starts it again by itself: so whatever goes wrong here (the connection, the disk), it is
paused there, and waited for.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BYTES
from migration.native import ffi, lib
from migration.runtime.channel import Channel, ChannelWriter
from migration.runtime.errors import MigrationError
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
from migration.wire.errors import RemoteStreamError, StreamError, TruncatedStreamError
from migration.wire.extension import DestinationHandshake, Feature
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.ram_setup import read_ram_setup
from migration.wire.return_path import Pong, Shut, write_rp

from .keeper import Keeper, Package
from .links import SourceLinks
from .sections import OpaqueSection, PrecopyTail, in_package
from .sink_ram import SinkBlock, SinkRam

DEVICE_BYTES_MAX = 512 << 20
SWITCHOVER_TIMEOUT_S = 1.0
_READ = 256 << 10
_LOADED_PING = 0x42
"""A source of 10.2 and later has its guest back when it is cut off before it heard the answer."""
_FEATURES = Feature.CHECKSUM | Feature.SPLIT_RUN | Feature.COUNTED


class StreamSink:
    """One incoming stream.

    :ivar configuration: machine name and what else the header said.
    :ivar is_postcopy: the source entered postcopy: its guest is ours to keep.
    :ivar ram: once the blocks are known.
    :ivar has_refused: :meth:`stop` came first: the source keeps its guest if it can.
    :ivar description: what the source said of its devices at the end of a precopy, JSON text.
    """

    def __init__(
        self,
        channel: Channel,
        keeper: Keeper,
        *,
        say: Callable[[str], None],
        links: SourceLinks | None = None,
        is_file: bool = False,
    ) -> None:
        """:param links: more connections of the same source; closed with this.
        :param is_file: no source is there any more, to be told or warned about.
        """
        self._is_file = is_file
        self.channel = channel
        self.configuration = Configuration("?")
        self.is_postcopy = False
        self.has_return_path = False
        self.ram: SinkRam | None = None
        self.description = b""
        self._keeper = keeper
        self._say = say
        self._links = links or SourceLinks(None, give_up_s=0)
        self._old_channels: list[Channel] = []
        self._urgent_error: Exception | None = None
        self._stopped = threading.Event()
        self._verdict = threading.Lock()
        self._accepted = self._is_switching = self.has_refused = False
        self._may_take_back = False
        self._refusing = threading.Timer(SWITCHOVER_TIMEOUT_S, self._refuse_late)
        self._refusing.daemon = True
        self._summary = 0
        self._sections: dict[int, SectionHeader] = {}
        self._handshake = DestinationHandshake(_FEATURES)
        self._features = Feature(0)
        self._run_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def native(self) -> Any:
        """``struct dst *``, or None before the blocks are known."""
        return None if self.ram is None else self.ram.native

    @property
    def origin(self) -> str:
        """How it came: ``file``, ``precopy`` or ``postcopy``."""
        if self._is_file:
            return "file"
        return "postcopy" if self.is_postcopy else "precopy"

    @property
    def received(self) -> list[Bitmap]:
        """Per block a bit per target page that came."""
        return [] if self.ram is None else self.ram.received

    # -- the whole stream -----------------------------------------------------

    def run(self) -> None:
        """Read to the end and answer SHUT 0; when anything goes wrong before, what the keeper says.

        :raises RemoteStreamError: bad bytes. :raises MigrationError, OSError: anything else.
        """
        try:
            self._read()
        except BaseException:
            self._refuse()
            raise
        self._shut(0)

    def run_again(self, package: Package, blocks: list[SinkBlock]) -> None:
        """Go on with a stream that another process had begun; its source comes back over this
        channel. What that process had received counts for nothing.

        :raises Exception: as :meth:`run`.
        """
        self.configuration = package.configuration
        self.is_postcopy = self.has_return_path = True
        self._features = package.features
        self.ram = SinkRam(self.channel, blocks, package.ram_section_id)
        self.ram.begin_postcopy(-1)
        self._keeper.ready(self.ram)
        try:
            try:
                if Feature.CHECKSUM in self._features:
                    self.channel.set_read_framed()
                self._resume_over(self.channel)
            except (MigrationError, StreamError) as error:
                self._recover(error)
            self._rest_of_postcopy(list(package.sections))
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
        else:
            self._ram().load_section()
        headers.check_footer(self.channel, header)

    def _ram(self) -> SinkRam:
        if self.ram is None:
            raise RemoteStreamError("RAM before the block list", offset=self.channel.position)
        return self.ram

    def _ram_setup(self, header: SectionHeader) -> None:
        if self.ram is not None:
            raise RemoteStreamError("a second block list", offset=self.channel.position)
        if not self.has_return_path and not self._is_file:
            self._say(
                "warning: the source opened no return path: it believes in the end of this as "
                "soon as all bytes are sent, before they are on disk (set capability return-path "
                "there)"
            )
        setup = read_ram_setup(self.channel, page_sizes_summary=self._summary)
        self.ram = SinkRam(self.channel, self._keeper.blocks(setup), header.section_id)
        self._keeper.ready(self.ram)
        self._expect_urgent()

    def _expect_urgent(self) -> None:
        if self.has_return_path:
            is_framed = Feature.CHECKSUM in self._features
            self._links.expect_urgent(self.native, self._urgent_failed, is_framed=is_framed)

    def _urgent_failed(self, error: Exception) -> None:
        self._urgent_error = error
        self.channel.abort()

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
                self._is_switching = True
                for index, start, length in self._ram().take_back(command, at):
                    self._keeper.discarded(index, start, length)
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

    # -- postcopy -------------------------------------------------------------

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
        self._may_take_back = _LOADED_PING in pings
        ram = self._ram()
        ram.begin_postcopy(-1 if has_run else self._run_fd)

        def accept() -> None:
            with self._verdict, contextlib.suppress(MigrationError):  # whoever reads tells
                self._accepted = not self.has_refused
                for value in pings if self._accepted else ():
                    self._pong(value)

        state = Package(self.configuration, tuple(sections), ram.section_id, self._features)
        self._hand_over(state, accept)
        self._rest_of_postcopy(sections)

    def _hand_over(self, package: Package, accept: Callable[[], None]) -> None:
        while True:
            try:
                self._keeper.packaged(package, accept)
                self._is_switching = False
                if self._stopped.is_set():
                    self.channel.abort()
                return
            except OSError as error:
                if not self._links.can_come_back:
                    raise
                self._recover(error)

    def _rest_of_postcopy(self, sections: list[OpaqueSection]) -> None:
        while True:
            try:
                self._rest_of_ram()
                self._keeper.finished(sections)
                return
            except (MigrationError, StreamError, OSError) as error:
                cause, self._urgent_error = self._urgent_error or error, None
                if not self._links.can_come_back:
                    raise cause from error
                self._recover(cause)

    def _rest_of_ram(self) -> None:
        ram = self._ram()
        ram.listen(self.channel)
        self._links.await_last_pages(lambda: ram.missing_pages)
        self._require_whole()

    def _require_whole(self) -> None:
        missing = self._ram().missing_pages
        if missing:
            raise RemoteStreamError(
                f"the source ended the stream with {missing} pages never sent",
                offset=self.channel.position,
                section="ram",
            )

    # -- after a cut ------------------------------------------------------------

    def _recover(self, cause: Exception) -> None:
        """Wait for the source to come back, and agree with it on what is still to come.

        :raises MigrationError: it did not in time, or nobody wants to wait any longer.
        """
        while True:
            self._say(self._what_broke(cause))
            self.channel.abort()
            channel = self._links.accept_again()
            # A relay's other leg may have a request on its way into the old one: closed later.
            self._old_channels.append(self.channel)
            self.channel = channel
            if self._stopped.is_set():
                channel.abort()
            try:
                self._resume_over(channel)
                return
            except (MigrationError, StreamError) as error:
                if not self._links.can_come_back:
                    raise
                cause = error

    def _what_broke(self, cause: Exception) -> str:
        waits = "The guest waits at its source"
        if self._may_take_back:
            waits += (
                " (unless that says failed: then it had not heard of us yet, and runs the guest "
                "again; end this, and see that it runs nowhere else)"
            )
        return (
            f"warning: interrupted: {cause}. {waits}; when the cause is mended, there: "
            f"migrate -r {self._links.uri} (QMP: migrate with resume)"
        )

    def _resume_over(self, channel: Channel) -> None:
        if Feature.CHECKSUM in self._features:
            channel.set_write_framed()
        ram = self._ram()
        self._expect_urgent()
        answer_source(channel, ram.received_by_name)
        ram.move_to(channel)
        acknowledge(channel)
        self._may_take_back = False
        self._say("the source is back")
        ram.ask_again()

    def stop(self) -> None:
        """Any thread: :meth:`run` ends with an error soon.

        A source that may still go on with its guest is made to. A stock one that has begun to
        switch over cannot: cut off before its package is here, it waits for ever for nobody. So
        that is still taken in, also when it comes within moments.
        """
        self._stopped.set()
        self._links.interrupt()
        with self._verdict:
            if self.has_refused:
                return
            is_kept = self._accepted or not self._keeper.may_refuse()
            if self._is_switching and not is_kept and not self._handshake.is_in_force:
                self._say("the source cannot go back any more: waiting for its device state")
                return
            if not is_kept:
                self.has_refused = True
                if self.has_return_path and not self._handshake.is_in_force:
                    # It may have begun to switch over, and its package be on the way: SHUT 1 would
                    # leave a QEMU of 7.2 without a way back then. So that is waited for a moment.
                    self._refusing.start()
                    return
                self._shut_off()
        self.channel.abort()

    def tell_well(self) -> None:
        """Any thread, once all of the stream is here: SHUT 0 before the keeper is done with it."""
        with contextlib.suppress(MigrationError):
            self._shut(0)

    def _refuse_late(self) -> None:
        if not self._is_switching:
            self._shut_off()
            self.channel.abort()

    def _shut_off(self) -> None:
        with contextlib.suppress(MigrationError):
            self._shut(1)

    @property
    def is_refusal_certain(self) -> bool:
        """The source was told to keep its guest, and will: it waits for our word with it."""
        return self.has_refused and self._handshake.is_in_force

    # -- precopy ----------------------------------------------------------------

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
        self.description = tail.description
        if self.has_refused:
            raise MigrationError("stopped")
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

    def was_heard(self, timeout_s: float) -> bool:
        """After :meth:`run`: whether the source took our answer; see :meth:`Channel.was_heard`.
        Not when we were stopped meanwhile: that ends the connection as well."""
        return self.channel.was_heard(timeout_s) and not self._stopped.is_set()

    def _shut(self, value: int) -> None:
        if self.has_return_path:
            write_rp(ChannelWriter(self.channel), Shut(value))
            self.channel.flush()

    def _refuse(self) -> None:
        value = self._keeper.refusal()
        if value is None:
            return
        with contextlib.suppress(MigrationError, OSError):  # the connection may be what broke
            self._shut(value)

    def close(self) -> None:
        """Free everything, the channel too. :meth:`run` must have returned."""
        self._links.close()
        self._refusing.cancel()
        if self._refusing.ident is not None:
            self._refusing.join()
        if self.ram is not None:
            self.ram.close()
        for channel in (self.channel, *self._old_channels):
            channel.close()
        os.close(self._run_fd)
