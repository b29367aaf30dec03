"""The postcopy of a source: the package, then the pages that are left, requested ones first."""

from __future__ import annotations

from guestmem import TARGET_PAGE_BYTES
from migration.engine.states import StatusInput
from migration.native import ffi, lib
from migration.wire import headers
from migration.wire.commands import Ping
from migration.wire.extension import Feature

from ..errors import native_error
from .answers import PING_DISCARDED, PING_SWITCHOVER
from .package import packaged_state
from .parts import SourceParts
from .push_advisor import PushAdvisor
from .switchover import SourceSwitchover

DISCARD_ROUNDS, DISCARD_ENOUGH_BYTES = 3, 16 << 20


class SourcePostcopy:
    """The migration thread's work from the end of the rounds; :meth:`push_pages` again after each
    recovery."""

    def __init__(self, parts: SourceParts, switchover: SourceSwitchover) -> None:
        self._parts = parts
        self._switchover = switchover
        self._advisor: PushAdvisor | None = None
        policy = parts.options.push_policy
        if policy is not None:
            self._advisor = PushAdvisor(
                parts.ram.native, parts.machine.ram, policy, self._policy_failed
            )

    def _policy_failed(self, reason: str) -> None:
        self._parts.report.emit("X_POLICY_FAILED", {"reason": reason})

    def apply_settings(self) -> None:
        """Any thread: parameters that the loop looks at natively."""
        native, parameter = self._parts.ram.native, self._parts.options.parameter
        if native is not None:
            lib.src_set_rate(native, parameter("max-postcopy-bandwidth"))
            lib.src_set_hold(native, bool(parameter("x-hold-background")))

    def run(self) -> None:
        """Stop the guest, give it away, send everything that the destination lacks."""
        parts, channels = self._parts, self._parts.channels
        channels.end_multifd()
        channels.open_urgent()
        self._discard_ahead()
        self._switchover.stop_guest()
        parts.machine.registry.save_live_complete(channels.writer, postcopy=False)
        self._discard()
        channels.command(Ping(PING_SWITCHOVER))
        parts.answers.check_alive()
        self.apply_settings()
        self._send_package()
        channels.bound_in_flight()
        self._switchover.sent()
        parts.report.advance(StatusInput.PACKAGE_SENT)
        if Feature.SPLIT_RUN not in channels.features:
            parts.commit.guest_left()
        self.push_pages()

    def _discard_ahead(self) -> None:
        """What is dirty now stays dirty: nothing is sent any more before the switchover. So the
        destination drops it while the guest still runs here; to drop all of a large RAM takes it
        longer than everything else in the downtime together. A disk must be complete before any
        discard, which it is only once the guest stands still: then all waits for that."""
        ram, channels = self._parts.ram, self._parts.channels
        if ram.nothing_sent or self._parts.machine.registry.completes_live_before_postcopy:
            return
        for _ in range(DISCARD_ROUNDS):
            newly = ram.sync()
            self._discard()
            channels.command(Ping(PING_DISCARDED))
            channels.main.flush()
            self._parts.answers.await_pong(PING_DISCARDED)
            if newly * TARGET_PAGE_BYTES <= DISCARD_ENOUGH_BYTES:
                return

    def _discard(self) -> None:
        self._parts.ram.widen()
        for command in self._parts.ram.discards():
            self._parts.channels.command(command)

    def _send_package(self) -> None:
        """Device state as one blob, and with a stock destination RUN as its last command."""
        parts, native = self._parts, self._parts.ram.native
        run_alone = Feature.SPLIT_RUN in parts.channels.features
        out = packaged_state(
            parts.machine.registry, parts.options.ram_section_id, with_run=not run_alone
        )
        if parts.options.before_giving is not None:
            parts.options.before_giving()
        parts.commit.package_goes_out(with_run=not run_alone)
        if lib.src_send_package(native, ffi.from_buffer(out), len(out), run_alone) < 0:
            raise native_error(native.error, fallback="sending the package")

    def push_pages(self) -> None:
        """Until everything is sent and the destination has said that it is well."""
        native = self._parts.ram.native
        if self._advisor is not None:
            self._advisor.start()
        try:
            while (progress := lib.src_postcopy_loop(native)) > 0:
                self._parts.commit.guest_left()
        finally:
            if self._advisor is not None:
                self._advisor.stop()
        if progress < 0:
            raise native_error(native.error, fallback="sending pages")
        self._finish()

    def _finish(self) -> None:
        parts, channels = self._parts, self._parts.channels
        parts.commit.guest_left()
        channels.end_urgent()
        parts.ram.send_part(0, last=True)
        parts.machine.registry.save_live_complete(channels.writer, postcopy=True)
        headers.write_end_of_stream(channels.writer)
        channels.main.flush()
        parts.answers.await_shut()
        parts.commit.completed()
