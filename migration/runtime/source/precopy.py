"""The precopy of a source: rounds while the guest runs, and the end without a postcopy."""

from __future__ import annotations

import time

from guestmem import TARGET_PAGE_BYTES
from migration.engine.policy import Decision
from migration.wire import headers
from migration.wire.commands import Ping
from migration.wire.extension import Feature

from .package import PING_PACKAGE
from .parts import SourceParts
from .rounds import PART_BYTES, Rounds
from .switchover import SourceSwitchover

MULTIFD_PARTS = 8
"""So many times the usual part: what is on its way to several channels should not run dry."""
EVERYTHING = 1 << 62


class SourcePrecopy:
    """The migration thread's work from set-up to the switchover; with :meth:`complete` to the end.

    :ivar bytes: sent before the switchover, over all channels.
    """

    def __init__(self, parts: SourceParts, switchover: SourceSwitchover) -> None:
        self.bytes = 0
        self._parts = parts
        self._switchover = switchover
        self._rounds: Rounds | None = None

    def iterate(self) -> Decision:
        """Rounds until the policy says how it ends."""
        parts, options = self._parts, self._parts.options
        self._rounds = Rounds(
            parts.ram,
            parts.machine.registry,
            lambda: parts.channels.bytes_sent,
            parts.channels.writer,
            parts.report,
            policy=options.policy,
            parameter=options.parameter,
            wake=parts.control.wake,
            check_alive=parts.answers.check_alive,
            postcopy_allowed=options.postcopy,
            postcopy_requested=lambda: options.postcopy and parts.control.is_postcopy_wanted,
            may_switch_over=self._switchover.may_begin,
            throttler=parts.throttler if options.auto_converge else None,
            part_bytes=PART_BYTES * (MULTIFD_PARTS if parts.channels.has_multifd else 1),
        )
        decision = self._rounds.run()
        self.bytes = parts.channels.bytes_sent
        return decision

    @property
    def bandwidth(self) -> float:
        """Bytes per second over the last window; 0 until one is measured."""
        return self._rounds.bandwidth if self._rounds is not None else 0.0

    @property
    def dirty_pages_rate(self) -> int:
        """Target pages the guest dirtied per second, as of the last sync."""
        return self._rounds.dirty_pages_rate if self._rounds is not None else 0

    def complete(self) -> None:
        """Stop the guest, send what is left, end the stream."""
        self._switchover.stop_guest()
        self._send_rest()
        self._parts.commit.eof_went_out()
        self._switchover.sent()
        if self._parts.answers.are_heard:
            self._parts.answers.await_shut()
        self._parts.report.guest_moved_ns = time.monotonic_ns()
        self._parts.commit.completed()

    def _send_rest(self) -> None:
        parts, channels = self._parts, self._parts.channels
        parts.machine.registry.save_live_complete(channels.writer)
        parts.ram.send_part(EVERYTHING, last=True)
        channels.end_multifd()
        saved = parts.machine.registry.save_full_sections(channels.writer)
        if Feature.SPLIT_RUN in channels.features:
            # Not before the destination has loaded everything: the EOF byte starts its guest.
            channels.command(Ping(PING_PACKAGE))
            channels.main.flush()
            parts.answers.await_pong(PING_PACKAGE)
        channels.main.flush()
        parts.answers.check_alive()
        parts.commit.eof_goes_out()
        headers.write_end_of_stream(channels.writer)
        description = saved.vmdesc_json(page_size=TARGET_PAGE_BYTES)
        headers.write_vmdescription(channels.writer, description)
        channels.main.flush()
        if not parts.answers.are_heard:
            channels.main.finish()
