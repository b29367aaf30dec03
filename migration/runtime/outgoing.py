"""The source of one migration.

The migration thread writes: set-up, rounds of dirty pages, the switchover, then in postcopy the
pages that are left, requested ones first. The return-path thread reads: PONGs, page requests, SHUT.

The guest is given away at one point. Between our own ends that is the first byte of RUN, which goes
out alone after the package was acknowledged; against a stock destination it is the first byte of
the package. Before it any failure starts the guest here again; from it on nothing here ever does,
except a stock destination saying SHUT non-zero before its last PONG, and a person who knows that
the guest of a precopy does not run over there (:meth:`OutgoingMigration.take_back`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

from guestmem import TARGET_PAGE_BYTES, RAMBlock, TrackerKind
from migration.engine.policy import Decision
from migration.engine.states import Status, StatusInput
from migration.native import ffi, lib
from migration.wire import headers
from migration.wire.commands import (
    Command,
    OpenReturnPath,
    Ping,
    PostcopyAdvise,
    RamNeeded,
    write_command,
)
from migration.wire.constants import SectionType
from migration.wire.extension import PING_SET_UP, Feature
from migration.wire.headers import SectionHeader
from migration.wire.ram_setup import write_ram_setup

from .channel import Channel, ChannelWriter
from .errors import MigrationError, is_lost_channel, native_error
from .handover import hand_over, let_go
from .machine import Machine, uuid_of
from .memory_report import stalls
from .options import OutgoingOptions
from .push_advisor import PushAdvisor
from .recovery import SourceRecovery
from .report import Report
from .return_path import ReturnPath
from .rounds import PART_BYTES, Rounds
from .source_channels import SourceChannels
from .source_guest import SourceGuest
from .source_package import PING_PACKAGE, packaged_state
from .source_ram import SourceRam, choose_zero_detection
from .source_set_up import configuration, leave_out
from .throttle import Throttler

RAM_SECTION_ID = 0x10000  # devices count up from 0; ids mean nothing across machines
RAM_VERSION = 4
PING_SWITCHOVER, PING_DISCARDED, PING_HANDED = 2, 6, 7
MULTIFD_PARTS = 8
"""So many times the usual part: what is on its way to several channels should not run dry."""
DISCARD_ROUNDS, DISCARD_ENOUGH_BYTES = 3, 16 << 20
ANSWER_TIMEOUT_S = 30.0
LAST_WORD_TIMEOUT_S = 2.0
MAY_BE_NOWHERE = (
    ". The last word of this precopy was lost: if the destination did not get it either, it says "
    "'failed' and never runs the guest; x-take-back then takes it back here"
)


class OutgoingMigration:
    """One outgoing migration over one channel. :meth:`run` is the migration thread's part."""

    def __init__(
        self, machine: Machine, channel: Channel, options: OutgoingOptions, report: Report
    ) -> None:
        self.machine = machine
        self.report = report
        self._options = options
        self._writer = ChannelWriter(channel)
        self._tracker = machine.dirty_tracker()
        self.ram = SourceRam(machine.ram, channel, self._tracker)
        given_id = options.ram_section_id
        self._ram_section_id = RAM_SECTION_ID if given_id is None else given_id
        lib.src_set_ram_section(self.ram.native, self._ram_section_id)
        self.channels = SourceChannels(channel, self.ram.native, options)
        self._rp: ReturnPath | None = None
        self._wake = threading.Event()
        self._postcopy_wanted = threading.Event()
        self._cancelled = threading.Event()
        self._guest = SourceGuest(machine, report)
        self._continued = threading.Event()
        self.throttler = Throttler(machine.hold)
        self._recovery: SourceRecovery | None = None
        self._rounds: Rounds | None = None
        self._handed: Sequence[RAMBlock] = ()
        self._advisor: PushAdvisor | None = None
        if options.push_policy is not None:
            self._advisor = PushAdvisor(
                self.ram.native, machine.ram, options.push_policy, self._policy_failed
            )
        self.downtime_bytes = 0
        self.precopy_bytes = 0

    @property
    def channel(self) -> Channel:
        """The one that carries the stream; another one after a recovery."""
        return self.channels.main

    @property
    def features(self) -> Feature:
        """Extensions agreed on with the destination; none with a stock QEMU."""
        return self.channels.features

    def _policy_failed(self, reason: str) -> None:
        self.report.emit("X_POLICY_FAILED", {"reason": reason})

    # -- requests from other threads ------------------------------------------

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``: from the next round on. Any thread, any time, any number of
        times."""
        self._postcopy_wanted.set()
        self._wake.set()

    def cancel(self) -> bool:
        """Stop, and keep the guest. Refused (False) once it was given away."""
        if self.is_committed() or not self.report.try_advance(StatusInput.CANCEL):
            return False
        self._cancelled.set()
        self._continued.set()
        self._wake.set()
        lib.src_stop(self.ram.native)
        return True

    def stop_waiting(self) -> bool:
        """Cut off a precopy whose guest was given away and whose destination does not say how it
        ended; False: nothing of the kind."""
        if self.report.status is not Status.DEVICE or not self._guest.is_given_away:
            return False
        self.channel.abort()
        return True

    def continue_(self) -> None:
        """``migrate-continue``: go on from the pause before the switchover."""
        self._continued.set()

    def settings_changed(self) -> None:
        """Parameters that the postcopy loop looks at natively."""
        if self.ram.native is not None:
            lib.src_set_rate(self.ram.native, self._options.parameter("max-postcopy-bandwidth"))
            lib.src_set_hold(self.ram.native, bool(self._options.parameter("x-hold-background")))
        self._wake.set()

    def pause(self) -> None:
        """``migrate-pause``: cut the channel, the one of a recovery just begun too."""
        self.channels.abort_main()

    # -- the migration thread -------------------------------------------------

    def run(self) -> None:
        """From set-up to the end.

        :raises Exception: what went wrong; the report says FAILED, CANCELLED or POSTCOPY_PAUSED by
            then and the guest runs here again unless it was given away.
        """
        try:
            self._set_up()
            decision = self._iterate()
            if self._rp is not None:
                # A destination that refuses does so here at the latest, before the guest is
                # stopped.
                self._await_pong(PING_SET_UP)
            if decision is Decision.POSTCOPY:
                self._postcopy()
            else:
                self._complete_precopy()
        except Exception as error:
            self._fail(error)
            raise
        finally:
            self.throttler.stop()
            self.channels.stop_multifd()
            with contextlib.suppress(Exception):
                self.machine.registry.save_live_cleanup()
            with contextlib.suppress(Exception):
                self._tracker.stop()

    def _command(self, command: Command) -> None:
        write_command(self._writer, command)

    def _set_up(self) -> None:
        if self._options.postcopy:
            for text in stalls(self.machine.ram, self._options.parameter("max-postcopy-bandwidth")):
                self.report.warn(text)
        if self._options.urgent_first:
            self.channels.open_urgent()
        self.channels.open_multifd(
            vm=uuid_of(self.machine), check_alive=self._check_alive, failed=self._multifd_failed
        )
        headers.write_file_header(self._writer)
        headers.write_configuration(self._writer, configuration(self.machine, self._options))
        if self._options.return_path or self._options.postcopy:
            self._open_return_path()
        self._handed = leave_out(self.ram, self.machine, self._options, self.channel, self.features)
        if Feature.SPARSE in self.features:
            self._command(RamNeeded(self.ram.populated_bytes))
        if self._options.postcopy:
            self._command(PostcopyAdvise(self.ram.page_sizes_summary, TARGET_PAGE_BYTES))
        self._start_multifd()
        header = SectionHeader(SectionType.START, self._ram_section_id, "ram", 0, RAM_VERSION)
        headers.write_section_header(self._writer, header)
        setup = self.ram.setup(
            has_page_sizes=self._options.postcopy,
            has_flush=self.channels.has_multifd and not self._options.multifd_each_section,
        )
        write_ram_setup(self._writer, setup)
        headers.write_footer(self._writer, self._ram_section_id)
        self.machine.registry.save_live_setup(self._writer)
        if not self.ram.is_all_left_out:
            self._tracker.start()
        if Feature.SPARSE in self.features:
            for command in self.ram.leave_out_holes():
                self._command(command)
        if self._rp is not None:
            self._command(Ping(PING_SET_UP))
        self.channel.flush()
        if self._options.release:
            self.ram.release_sent()
        if self._options.xbzrle:
            self.ram.use_xbzrle(self._options.parameter("xbzrle-cache-size"))
        if self._handed:
            self._hand_over()
        elif self.channels.has_multifd and Feature.SPARSE in self.features:
            # Known zero pages are told of on the main channel: no page may overtake that.
            self._await_pong(PING_SET_UP)
        self._check_alive()
        self.report.advance(StatusInput.READY)

    def _hand_over(self) -> None:
        """While the guest still runs: a destination that cannot take the memory says so now."""
        self._await_pong(PING_SET_UP)
        hand_over(self.channel, self._handed)
        self._command(Ping(PING_HANDED))
        self.channel.flush()
        self._await_pong(PING_HANDED)

    def _open_return_path(self) -> None:
        if not self.channel.is_two_way:
            raise MigrationError(
                "the channel is one-way: no return path, so no postcopy; use tcp or unix"
            )
        self._command(OpenReturnPath())
        self._start_return_path()
        self.channels.negotiate()

    def _multifd_failed(self, _error: Exception) -> None:
        self._wake.set()  # the migration thread finds it at its next page

    def _start_multifd(self) -> None:
        first, later = choose_zero_detection(
            self._options.zero_page_detection,
            over_multifd=self.channels.has_multifd and not self._options.multifd_each_section,
            is_known_to_read=Feature.COUNTED in self.features,
        )
        self.ram.detect_zero(first, later)
        self.channels.start_multifd()

    # -- rounds ---------------------------------------------------------------

    def _iterate(self) -> Decision:
        """Rounds until the policy says how it ends."""
        self._rounds = Rounds(
            self.ram,
            self.machine.registry,
            lambda: self.channels.bytes_sent,
            self._writer,
            self.report,
            policy=self._options.policy,
            parameter=self._options.parameter,
            wake=self._wake,
            check_alive=self._check_alive,
            postcopy_allowed=self._options.postcopy,
            postcopy_requested=lambda: self._options.postcopy and self._postcopy_wanted.is_set(),
            may_switch_over=self._may_switch_over,
            throttler=self.throttler if self._options.auto_converge else None,
            part_bytes=PART_BYTES * (MULTIFD_PARTS if self.channels.has_multifd else 1),
        )
        decision = self._rounds.run()
        self.precopy_bytes = self.channels.bytes_sent
        return decision

    @property
    def bandwidth(self) -> float:
        """Bytes per second over the last window of precopy; 0 until one is measured."""
        return self._rounds.bandwidth if self._rounds is not None else 0.0

    @property
    def dirty_pages_rate(self) -> int:
        """Target pages the guest dirtied per second, as of the last sync."""
        return self._rounds.dirty_pages_rate if self._rounds is not None else 0

    def _check_alive(self) -> None:
        if self._cancelled.is_set():
            raise MigrationError("the migration was cancelled")
        if self._rp_error is not None:
            raise self._rp_error
        if self._shut is not None:
            raise MigrationError(self._refusal())

    def _refusal(self) -> str:
        return (
            f"the destination refused the migration (SHUT {self._shut}); the cause is in its own "
            "error, see its console or query-migrate there"
        )

    # -- switchover -----------------------------------------------------------

    def _may_switch_over(self) -> bool:
        """A guest that does not run loses nothing by a switchover that has to wait in the end."""
        if not self._options.switchover_ack or not self._guest.is_running:
            return True
        return self._rp is not None and self._rp.may_switch_over

    def _stop_guest(self) -> None:
        self.throttler.stop()
        self._guest.stop()
        if self._options.pause_first:
            self.report.advance(StatusInput.PAUSE_BEFORE_SWITCHOVER)
            self._continued.wait()
            self._check_alive()
        self.report.advance(StatusInput.GUEST_STOPPED)
        self.ram.sync()
        # The tracker stays until the end: taking it down costs tens of milliseconds a GiB.

    def _complete_precopy(self) -> None:
        self._stop_guest()
        before = self.channels.bytes_sent
        self.machine.registry.save_live_complete(self._writer)
        self.ram.send_part(1 << 62, last=True)
        self.channels.end_multifd()
        saved = self.machine.registry.save_full_sections(self._writer)
        if Feature.SPLIT_RUN in self.features:
            # Not before the destination has loaded everything: the EOF byte starts its guest.
            self._command(Ping(PING_PACKAGE))
            self.channel.flush()
            self._await_pong(PING_PACKAGE)
        self.channel.flush()
        self._check_alive()
        self._guest.is_given_away = self._rp is not None
        headers.write_end_of_stream(self._writer)
        headers.write_vmdescription(self._writer, saved.vmdesc_json(page_size=TARGET_PAGE_BYTES))
        self.channel.flush()
        if self._rp is None:
            self.channel.finish()
        self._guest.is_given_away = True
        self.downtime_bytes = self.channels.bytes_sent - before
        if self._rp is not None:
            self._await_shut()
        self.report.guest_moved_ns = time.monotonic_ns()
        self._completed()

    def _await_pong(self, value: int) -> None:
        """:raises MigrationError: the destination refused, is gone, or does not answer."""
        timeout_ms = int(ANSWER_TIMEOUT_S * 1000)
        result = lib.src_wait_pong(self.ram.native, value, 0xFFFFFFFF, timeout_ms, ffi.NULL)
        self._check_alive()
        if result < 0:
            what = {
                PING_SET_UP: "take the set-up",
                PING_DISCARDED: "drop stale pages",
                PING_HANDED: "take the memory over",
            }.get(value, "load the devices")
            raise MigrationError(f"the destination did not {what} within {ANSWER_TIMEOUT_S:g} s")

    def _await_shut(self) -> None:
        """The destination says how it ended. :raises MigrationError: it failed, or is gone."""
        assert self._rp is not None
        self._rp.wait()
        if self._rp_error is not None:
            raise self._rp_error
        if self._shut:
            raise MigrationError(self._refusal())

    def _completed(self) -> None:
        let_go(self._handed)
        self._guest.has_moved()
        self.report.advance(StatusInput.DONE)

    # -- postcopy -------------------------------------------------------------

    def _postcopy(self) -> None:
        self.channels.end_multifd()
        self.channels.open_urgent()
        self._discard_ahead()
        self._stop_guest()
        before = self.channel.bytes_sent
        self.machine.registry.save_live_complete(self._writer, postcopy=False)
        self.ram.widen()
        for command in self.ram.discards():
            self._command(command)
        self._command(Ping(PING_SWITCHOVER))
        self._check_alive()
        self.settings_changed()
        self._send_package()
        self.channels.bound_in_flight()
        self.downtime_bytes = self.channel.bytes_sent - before
        self.report.advance(StatusInput.PACKAGE_SENT)
        if Feature.SPLIT_RUN not in self.features:
            self._guest_given_away()
        self._push_pages()

    def _push_pages(self) -> None:
        """Until everything is sent and the destination has said that it is well."""
        if self._advisor is not None:
            self._advisor.start()
        try:
            while (progress := lib.src_postcopy_loop(self.ram.native)) > 0:
                self._guest_given_away()
        finally:
            if self._advisor is not None:
                self._advisor.stop()
        if progress < 0:
            raise native_error(self.ram.native.error, fallback="sending pages")
        self._finish_postcopy()

    # -- recovery -------------------------------------------------------------

    def take_over(self, features: Feature) -> None:
        """Before :meth:`resume`, in another process than the one that gave the guest away.

        :param features: what that one had agreed on with the destination.
        """
        self.channels.features = features
        self._guest.is_stopped = self._guest.is_given_away = True
        # A package of nothing: from here on requests are served.
        lib.src_send_package(self.ram.native, ffi.NULL, 0, False)

    def require_resumable(self) -> None:
        """:raises MigrationError: what was on its way when the connection broke is lost."""
        if self._options.release:
            raise MigrationError(
                "Postcopy recovery cannot work when release-ram capability is set: pages "
                "that were on their way are lost"
            )

    def resume(self, channel: Channel) -> None:
        """Go on over a new channel after a pause; the migration thread's part, like :meth:`run`.

        :raises Exception: it broke again (paused as before), or the destination failed.
        """
        self.channels.announce(channel)
        self.report.advance(StatusInput.RECOVER)
        try:
            self._change_channel()
            self.channels.replaced()
            self.report.advance(StatusInput.RECOVER_CONNECTED)
            self._recover()
            self.report.advance(StatusInput.RESUMED)
            self._push_pages()
        except Exception as error:
            self._fail(error)
            raise

    def _change_channel(self) -> None:
        lib.src_stop(self.ram.native)
        if self._rp is not None:
            self._rp.join()
        channel = self.channels.replace()
        self._writer = ChannelWriter(channel)
        self._recovery = SourceRecovery(channel, self.machine.ram, self.ram.dirty)
        if self._options.urgent_first:
            self.channels.open_urgent()
        self._start_return_path()

    def _recover(self) -> None:
        assert self._recovery is not None
        self.ram.send_again(self._recovery.learn_received())
        self.channels.open_urgent()
        self._recovery.resume(run_again=Feature.SPLIT_RUN in self.features)

    def _discard_ahead(self) -> None:
        """What is dirty now stays dirty: nothing is sent any more before the switchover. So the
        destination drops it while the guest still runs here; to drop all of a large RAM takes it
        longer than everything else in the downtime together. A disk must be complete before any
        discard, which it is only once the guest stands still: then all waits for that."""
        if self.ram.nothing_sent or self.machine.registry.completes_live_before_postcopy:
            return
        for _ in range(DISCARD_ROUNDS):
            newly = self.ram.sync()
            self.ram.widen()
            for command in self.ram.discards():
                self._command(command)
            self._command(Ping(PING_DISCARDED))
            self.channel.flush()
            self._await_pong(PING_DISCARDED)
            if newly * TARGET_PAGE_BYTES <= DISCARD_ENOUGH_BYTES:
                return

    def _send_package(self) -> None:
        """Device state as one blob, and with a stock destination RUN as its last command."""
        run_alone = Feature.SPLIT_RUN in self.features
        out = packaged_state(
            self.machine.registry, self._options.ram_section_id, with_run=not run_alone
        )
        if self._options.before_giving is not None:
            self._options.before_giving()
        self._guest.is_given_away = not run_alone
        if not run_alone:
            lib.src_await_loaded(self.ram.native)
        result = lib.src_send_package(self.ram.native, ffi.from_buffer(out), len(out), run_alone)
        if result < 0:
            raise native_error(self.ram.native.error, fallback="sending the package")

    def _guest_given_away(self) -> None:
        if self.report.guest_moved_ns is None:
            sent = self.ram.statistics()["run_sent_ns"]
            self.report.guest_moved_ns = sent or time.monotonic_ns()
        if self.report.status is Status.POSTCOPY_DEVICE:
            self.report.advance(StatusInput.POSTCOPY)

    def _finish_postcopy(self) -> None:
        self._guest_given_away()
        self.channels.end_urgent()
        self.ram.send_part(0, last=True)
        self.machine.registry.save_live_complete(self._writer, postcopy=True)
        headers.write_end_of_stream(self._writer)
        self.channel.flush()
        self._await_shut()
        self._completed()

    # -- the return path ------------------------------------------------------

    def _start_return_path(self) -> None:
        placement = self._options.placement
        self._rp = ReturnPath(
            self.ram.native,
            self.channel,
            cpus=placement.fault_cpus if placement is not None else (),
            recovery=self._recovery,
            on_news=self._return_path_news,
        )

    def _return_path_news(self) -> None:
        self._continued.set()
        self._wake.set()

    @property
    def _shut(self) -> int | None:
        """The destination's last word, None before it came."""
        return self._rp.shut if self._rp is not None else None

    @property
    def _rp_error(self) -> Exception | None:
        return self._rp.error if self._rp is not None else None

    @property
    def handed_over_bytes(self) -> int:
        """Of RAM whose descriptors went to the destination instead of its pages."""
        return sum(block.used_length for block in self._handed)

    @property
    def tracker_kind(self) -> TrackerKind:
        """Who finds out what the guest writes."""
        return self._tracker.kind

    @property
    def uses_xbzrle(self) -> bool:
        """Capability ``xbzrle`` is on."""
        return self._options.xbzrle

    def is_running_elsewhere(self) -> bool:
        """RUN went out: the guest is the destination's."""
        return bool(self.ram.native is not None and lib.src_run_sent(self.ram.native))

    # -- failing --------------------------------------------------------------

    def is_committed(self) -> bool:
        """Whether the guest may run at the destination."""
        if self.ram.native is not None and lib.src_run_sent(self.ram.native):
            return True
        if self._recovery is not None:
            return True  # it was paused, so it ran there
        return self._guest.is_given_away and not self._destination_said_no()

    def wait_loaded(self) -> bool:
        """Any thread, from postcopy-active on: sleep, without the GIL, until the destination has
        loaded its devices, or says or does something else; whether its guest may run there then."""
        if lib.src_wait_loaded(self.ram.native) < 0:
            assert self._rp is not None
            self._rp.wait()
        return self.is_committed()

    def _destination_said_no(self) -> bool:
        """SHUT non-zero; in postcopy before the package's last PONG: after it the guest ran
        there."""
        if not self._shut:
            return False
        is_precopy = self.report.status is Status.DEVICE
        return is_precopy or not lib.src_has_pong(self.ram.native, PING_PACKAGE)

    def _fail(self, error: Exception) -> None:
        self.throttler.stop()
        if is_lost_channel(error) and self._rp is not None:
            # The peer is gone, but its last word (SHUT) may still wait in the socket to be read.
            self._rp.wait(LAST_WORD_TIMEOUT_S)
        # What the return path said before is the cause; what it says of the abort is not.
        cause = self._rp_error or error
        self.channels.abort()
        if self._rp is not None:
            self._rp.wait()
        text = self._refusal() if self._shut else self.channel.explain(str(cause))
        if is_lost_channel(cause) and not self.is_committed():
            text += "; if the destination refused the migration, its own error says why"
        if self._guest.is_stopped and self.is_committed():
            text += "; the guest is the destination's and does not start here again"
            if self.report.status is Status.DEVICE and self._shut is None:
                text += MAY_BE_NOWHERE
            if self._handed:
                text += (
                    ". Its memory is the destination's too, and still mapped here: end this process"
                )
            self._guest_given_away()
            # In postcopy whatever broke may be mended: paused, unless the destination itself
            # failed.
            kind = StatusInput.FAIL if self._shut else StatusInput.LOST_CHANNEL
            self.report.try_advance(kind, error=text) or self.report.try_advance(
                StatusInput.FAIL, error=text
            )
            return
        if self._guest.is_stopped:
            self._guest.go_on()
        end = StatusInput.CANCELLED if self._cancelled.is_set() else StatusInput.FAIL
        self.report.try_advance(end, error=None if self._cancelled.is_set() else text)

    def take_back(self) -> None:
        """The guest of a precopy goes on here after all, see :meth:`MigrationService.take_back`.

        :raises MigrationError: it is not known to be nowhere: it never left, or it moved, or this
            is a postcopy, in which a recovery repeats the word that was lost.
        """
        if self.report.status is Status.POSTCOPY_PAUSED:
            raise MigrationError(
                "this is a postcopy: recover it, which says RUN once more if it was lost "
                "(migrate-recover there, migrate with resume here)"
            )
        if self.report.status is not Status.FAILED or not self._guest.is_held:
            raise MigrationError(
                f"there is no guest to take back: the migration is '{self.report.status.value}' "
                f"and the guest '{self.machine.run_state}' here"
            )
        if self._shut is not None or self.is_running_elsewhere():
            raise MigrationError("the guest ran at the destination: it cannot be taken back")
        self.report.guest_moved_ns = None
        self.report.error = f"{self.report.error}; taken back by x-take-back"
        self._guest.go_on()

    def close(self) -> None:
        """End the threads and free everything."""
        if self.ram.native is not None:
            lib.src_stop(self.ram.native)
        if self._rp is not None:
            self._rp.join()
        self.channels.close_multifd()
        self.ram.close()
        self.channels.close()
