"""The start of an outgoing migration: connections, who this is, what RAM there is and which of it
need not be sent."""

from __future__ import annotations

from collections.abc import Sequence

from guestmem import TARGET_PAGE_BYTES, RAMBlock
from migration.engine.states import StatusInput
from migration.wire import headers
from migration.wire.commands import OpenReturnPath, Ping, PostcopyAdvise, RamNeeded
from migration.wire.constants import RAM_SECTION_IDSTR, RAM_SECTION_VERSION, SectionType
from migration.wire.extension import PING_SET_UP, Feature
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.ram_setup import write_ram_setup

from ..errors import MigrationError
from ..handover import blocks_to_hand_over, hand_over, require_channel
from ..machine import Machine, uuid_of
from ..memory_report import stalls
from ..options import OutgoingOptions
from .answers import PING_HANDED
from .parts import SourceParts
from .ram import choose_zero_detection


def configuration(machine: Machine, options: OutgoingOptions) -> Configuration:
    """The configuration section: the caller's own, or the machine's name and what is compared."""
    if options.configuration is not None:
        return options.configuration
    capabilities = ("x-ignore-shared",) if options.ignore_shared else None
    vm_uuid = uuid_of(machine) if options.validate_uuid else None
    return Configuration(machine.machine_type, uuid=vm_uuid, capabilities=capabilities)


class SourceSetUp:
    """The migration thread's work before the first round. It writes up to a PING, whose answer
    says that the destination has taken it; nobody waits for that here unless he must."""

    def __init__(self, parts: SourceParts) -> None:
        self._parts = parts
        self._uses_multifd_flush = False

    def run(self) -> None:
        """:raises Exception: cancelled, the destination is gone or refuses, or cannot do what this
        migration needs."""
        parts, options = self._parts, self._parts.options
        self._warn_of_stalls()
        self._connect()
        self._introduce()
        parts.guest.handed = self._leave_out()
        if Feature.SPARSE in parts.channels.features:
            parts.channels.command(RamNeeded(parts.ram.populated_bytes))
        if options.postcopy:
            summary = parts.ram.page_sizes_summary
            parts.channels.command(PostcopyAdvise(summary, TARGET_PAGE_BYTES))
        self._start_multifd()
        self._write_blocks()
        self._start_tracking()
        if parts.answers.are_heard:
            parts.channels.command(Ping(PING_SET_UP))
        parts.channels.main.flush()
        if options.release:
            parts.ram.release_sent()
        if options.xbzrle:
            parts.ram.use_xbzrle(options.parameter("xbzrle-cache-size"))
        self._await_answers()
        parts.answers.check_alive()
        parts.report.advance(StatusInput.READY)

    # -- before the first byte ------------------------------------------------

    def _warn_of_stalls(self) -> None:
        parameter = self._parts.options.parameter
        if self._parts.options.postcopy:
            for text in stalls(self._parts.machine.ram, parameter("max-postcopy-bandwidth")):
                self._parts.report.warn(text)

    def _connect(self) -> None:
        parts = self._parts
        if parts.options.urgent_first:
            parts.channels.open_urgent()
        parts.channels.open_multifd(
            vm=uuid_of(parts.machine),
            check_alive=parts.answers.check_alive,
            failed=self._multifd_failed,
        )
        self._uses_multifd_flush = (
            parts.channels.has_multifd and not parts.options.multifd_each_section
        )

    def _multifd_failed(self, _error: Exception) -> None:
        self._parts.control.wake.set()  # the migration thread finds it at its next page

    # -- the stream -----------------------------------------------------------

    def _introduce(self) -> None:
        parts, channels = self._parts, self._parts.channels
        headers.write_file_header(channels.writer)
        headers.write_configuration(channels.writer, configuration(parts.machine, parts.options))
        if not (parts.options.return_path or parts.options.postcopy):
            return
        if not channels.main.is_two_way:
            raise MigrationError(
                "the channel is one-way: no return path, so no postcopy; use tcp or unix"
            )
        channels.command(OpenReturnPath())
        parts.answers.listen(channels.main)
        channels.negotiate()

    def _leave_out(self) -> Sequence[RAMBlock]:
        """RAM of which no page is sent: the destination has it, or is given it.

        :returns: blocks whose memory is handed over.
        :raises MigrationError: the destination cannot take memory over, or the channel carries
            none.
        """
        parts, ram = self._parts, self._parts.machine.ram
        if parts.options.ignore_shared:
            shared = [block for block in ram if block.is_named_file]
            parts.ram.leave_out(shared, has_addresses=True)
        if not parts.options.handover:
            return ()
        handed = blocks_to_hand_over(ram)
        require_channel(parts.channels.main)
        if Feature.HANDOVER | Feature.SPLIT_RUN not in parts.channels.features:
            raise MigrationError(
                "the destination takes no memory over (a stock QEMU, or x-split-run is off); a "
                "stock QEMU goes on with RAM made of a named file: --mem-path FILE at both "
                "ends, and capability x-ignore-shared"
            )
        parts.ram.leave_out(handed)
        return handed

    def _start_multifd(self) -> None:
        first, later = choose_zero_detection(
            self._parts.options.zero_page_detection,
            over_multifd=self._uses_multifd_flush,
            is_known_to_read=Feature.COUNTED in self._parts.channels.features,
        )
        self._parts.ram.detect_zero(first, later)
        self._parts.channels.start_multifd()

    def _write_blocks(self) -> None:
        """The START sections: of RAM the block list, of live devices what they like."""
        parts, writer = self._parts, self._parts.channels.writer
        ram = SectionHeader(
            SectionType.START, parts.ram_section_id, RAM_SECTION_IDSTR, 0, RAM_SECTION_VERSION
        )
        headers.write_section_header(writer, ram)
        setup = parts.ram.setup(
            has_page_sizes=parts.options.postcopy, has_flush=self._uses_multifd_flush
        )
        write_ram_setup(writer, setup)
        headers.write_footer(writer, parts.ram_section_id)
        parts.machine.registry.save_live_setup(writer)

    def _start_tracking(self) -> None:
        parts = self._parts
        if not parts.ram.is_all_left_out:
            parts.tracker.start()
        if Feature.SPARSE in parts.channels.features:
            for command in parts.ram.leave_out_holes():
                parts.channels.command(command)

    # -- its end --------------------------------------------------------------

    def _await_answers(self) -> None:
        parts, channels = self._parts, self._parts.channels
        if parts.guest.handed:
            self._hand_over(parts.guest.handed)
        elif channels.has_multifd and Feature.SPARSE in channels.features:
            # Known zero pages are told of on the main channel: no page may overtake that.
            parts.answers.await_pong(PING_SET_UP)

    def _hand_over(self, blocks: Sequence[RAMBlock]) -> None:
        """While the guest still runs: a destination that cannot take the memory says so now."""
        parts = self._parts
        parts.answers.await_pong(PING_SET_UP)
        hand_over(parts.channels.main, blocks)
        parts.channels.command(Ping(PING_HANDED))
        parts.channels.main.flush()
        parts.answers.await_pong(PING_HANDED)
