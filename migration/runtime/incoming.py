"""The destination of one migration.

The main thread reads the stream up to LISTEN (the whole of it in a precopy), then loads the devices
from the package while the listen thread places pages and the fault thread asks for them. END needs
both: the stream read to its end, and the guest running.

Before LISTEN nothing is at stake here: any error ends the incoming migration cleanly and the source
keeps its guest. From RUN on a lost connection pauses: sleepers wait, and nothing is made up.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Sequence
from typing import TypeAlias

from guestmem import Collapser, CollapseReport, RAMBlock
from guestmem.geometry import TARGET_PAGE_BYTES
from migration.engine.states import (
    INCOMING,
    Incoming,
    IncomingInput,
    StateError,
    StateMachine,
    Status,
    StatusInput,
)
from migration.native import lib
from migration.wire.commands import RamDiscard, RamZero
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.extension import PING_SET_UP, DestinationHandshake, Feature
from migration.wire.return_path import Pong, Shut, SwitchoverAck, write_rp
from uffd.threads import NamedThread

from .affinity import move_here
from .channel import Channel, ChannelWriter
from .destination_ram import DestinationRam, require_matching_sizes
from .errors import MigrationError, is_lost_channel, native_error
from .guards import check_memory
from .handover import blocks_to_hand_over, let_go, take_over
from .machine import Machine
from .main_stream import MainStream, skip_description
from .memory_report import misplaced, stalls
from .multifd import MultifdReceivers
from .options import IncomingOptions
from .recovery import acknowledge, answer_source
from .report import Report
from .sensitise import Sensitised
from .transport import Listener
from .urgent import UrgentReceiver

LAST_PAGES_TIMEOUT_S = 10.0
LOOPS_BEGIN_TIMEOUT_S = 10
RUN_IS_MISSING = (
    "all devices are loaded, but whether the source gave its guest away is not known here: if it "
    "is postcopy-paused there, recover the migration; if it runs there, migrate_cancel or quit here"
)
LAST_PAGES_POLL_S = 0.005

_MAY_RECOVER = frozenset(
    {Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER}
)

_Way: TypeAlias = tuple[Channel, Listener | None]


class IncomingMigration:
    """One incoming migration over one channel. :meth:`run` is the main thread's part.

    :ivar last_word_us: of a postcopy: microseconds from the end of the stream to the verdict sent,
        in which a stock source that loses its connection takes the guest for its own; None before.
    """

    def __init__(
        self, machine: Machine, channel: Channel, options: IncomingOptions, report: Report
    ) -> None:
        self.machine = machine
        self.channel = channel
        self.report = report
        self.ram = DestinationRam(machine.ram, channel)
        self.phase: StateMachine[Incoming, IncomingInput] = StateMachine(INCOMING, Incoming.NONE)
        self.features = Feature(0)
        self._options = options
        self._handshake = DestinationHandshake(options.features)
        self._has_return_path = False
        self.last_word_us: int | None = None
        self._phase_lock = threading.Lock()
        self._guest_started = threading.Event()
        self._main_failed = threading.Event()
        self._taken: Sequence[RAMBlock] = ()
        self._may_be_ours = False  # everything is loaded and acknowledged, only RUN is missing
        self._needed_bytes: int | None = None  # as the source says, if it does
        self._cause: str | None = None  # of a failure before RUN: the first one
        self._sensitised: Sensitised | None = None
        self._threads: list[threading.Thread] = []
        self._run_fd = os.eventfd(0, os.EFD_CLOEXEC)  # RUN came alone; stays readable
        self._fail_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._stop_fault_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._recovery: queue.SimpleQueue[_Way | None] = queue.SimpleQueue()
        self._old_channels: list[Channel] = []
        self._collapser: Collapser | None = None
        self._multifd = MultifdReceivers(self.ram.native, options.multifd, self._multifd_failed)
        self._urgent: UrgentReceiver | None = None
        if options.listener is not None:
            self._urgent = UrgentReceiver(self.ram.native, options.listener, self._listen_failed)

    @property
    def counts_blocktime(self) -> bool:
        """Capability ``postcopy-blocktime`` is on."""
        return self._options.blocktime

    # -- the main thread ------------------------------------------------------

    def run(self) -> None:
        """Read and load until the guest runs here (or waits for ``cont``), or fail.

        :raises RemoteStreamError: the bytes are not a stream for this machine.
        :raises MigrationError: anything else. The report says FAILED (or paused) by then.
        """
        try:
            self.report.advance(StatusInput.READY)
            if self._options.ignore_shared:
                self.ram.keep(block for block in self.machine.ram if block.is_named_file)
            self.ram.empty()
            self.machine.registry.load_live_setup()
            MainStream(self.machine, self.channel, self.ram, self).read()
        except Exception as error:
            self._main_failed.set()
            self._end_live_state()
            if not self.is_started:
                let_go(self._taken)  # before anybody hears of it and empties this RAM
            self._fail(error)
            raise

    def _end_live_state(self) -> None:
        """All live state but RAM comes before the guest runs here, or never."""
        with contextlib.suppress(Exception):
            self.machine.registry.load_live_cleanup()

    # -- commands -------------------------------------------------------------

    @property
    def is_started(self) -> bool:
        """The guest was started (or waits for ``cont``)."""
        return self._guest_started.is_set()

    @property
    def is_advised(self) -> bool:
        """ADVISE came."""
        return self.phase.state is not Incoming.NONE

    @property
    def ignores_shared(self) -> bool:
        """Capability ``x-ignore-shared`` is on."""
        return self._options.ignore_shared

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self.report.warn(text)

    def open_return_path(self, at: int) -> None:
        """OPEN_RETURN_PATH."""
        if not self.channel.is_two_way:
            raise _bad("the source wants a return path over a one-way channel", at)
        self._has_return_path = True
        if self._options.switchover_ack:
            # No device here wants to be waited for; QEMU says so at once too.
            self._answer(SwitchoverAck())

    def ping(self, value: int, at: int) -> None:
        """PING: answered by its value; the handshake's own switch features on."""
        if not self._has_return_path:
            raise _bad("PING before OPEN_RETURN_PATH", at)
        was_in_force = self._handshake.is_in_force
        for pong in self._handshake.on_ping(value, offset=at):
            self._answer(pong)
        if self._handshake.is_in_force and not was_in_force:
            self.features = self._handshake.chosen
            if Feature.CHECKSUM in self.features:
                self.channel.set_write_framed()
                self.channel.set_read_framed()
        if value == PING_SET_UP and Feature.HANDOVER in self.features:
            self._take_over(at)

    def _take_over(self, at: int) -> None:
        """Descriptors follow: the source's memory takes the place of ours."""
        if self._taken or self.is_advised:
            raise _bad("memory handed over twice, or in a postcopy", at)
        self._taken = blocks_to_hand_over(self.machine.ram)
        take_over(self.channel, self._taken)
        self.ram.keep(self._taken)

    def _answer(self, message: Pong | Shut | SwitchoverAck) -> None:
        """One message on the return path; whole, since other threads answer there too."""
        if isinstance(message, Pong):
            result = lib.dst_pong(self.ram.native, message.value)
            if result < 0:
                raise MigrationError(f"answering on the return path: {os.strerror(-result)}")
            return
        write_rp(ChannelWriter(self.channel), message)
        self.channel.flush()

    def advise(self, summary: int, target_page_bytes: int, at: int) -> None:
        """ADVISE: whatever would keep postcopy from working is said now."""
        if not self._options.postcopy:
            raise _bad("the source wants postcopy, and capability postcopy-ram is off here", at)
        if self._taken:
            raise _bad("postcopy of memory that was handed over", at)
        self._advance(IncomingInput.ADVISE, at)
        require_matching_sizes(self.ram, summary, target_page_bytes)
        if self._options.memory_guard:
            check_memory(self.machine.ram, self._needed_bytes)
        for text in stalls(self.machine.ram):
            self.report.warn(text)
        self._sensitised = Sensitised(self.machine, self.ram)

    def needs(self, length: int, at: int) -> None:
        """X_RAM_NEEDED: how much of RAM holds something; the rest takes no memory."""
        if Feature.SPARSE not in self.features:
            raise _bad("X_RAM_NEEDED, which was not agreed on", at)
        self._needed_bytes = min(length, self.machine.ram.total_length)

    def zero(self, command: RamZero, at: int) -> None:
        """X_RAM_ZERO: before any discard, so that what is discarded later is missing again."""
        if Feature.SPARSE not in self.features:
            raise _bad("X_RAM_ZERO, which was not agreed on", at)
        if self.phase.state not in (Incoming.NONE, Incoming.ADVISE):
            raise _bad(f"X_RAM_ZERO in phase {self.phase.state.value}", at)
        self.ram.know_zero(command, at)

    def discard(self, command: RamDiscard, at: int) -> None:
        """RAM_DISCARD."""
        is_first = self.phase.state is Incoming.ADVISE
        self._advance(IncomingInput.RAM_DISCARD, at)
        if is_first:
            self._end_multifd()
            # One huge page formed by the kernel would cover pages that have not arrived with zeros.
            self.ram.forbid_thp()
        self.ram.discard(command, at)

    # -- multifd channels -----------------------------------------------------

    def start_multifd(self, has_flush: bool, at: int) -> None:
        """The START section is read: from here on pages may come over the channels.

        :param has_flush: the channels meet at flushes only, not at each EOS.
        """
        if not self._multifd.count:
            if has_flush:
                raise _bad("the source uses multifd channels; capability multifd is off here", at)
            return
        self._multifd.start(is_framed=Feature.CHECKSUM in self.features, each_section=not has_flush)
        self._multifd.meet()

    def _multifd_failed(self, error: Exception) -> None:
        """From a channel's thread. The main thread learns of it where it waits for the stream."""
        with self._phase_lock:
            self._note_cause(error)
        if not is_lost_channel(error):
            with contextlib.suppress(MigrationError):
                self._shut(1)
        self.channel.abort()

    def _end_multifd(self) -> None:
        """The source said that it has flushed them: from here on RAM changes under their feet."""
        self._multifd.stop()
        if self._multifd.count and self._urgent is not None:
            self._urgent.refuse_multifd()

    @property
    def multifd_bytes(self) -> list[int]:
        """Received per multifd channel; empty without any."""
        return self._multifd.bytes_received

    def _advance(self, input_: IncomingInput, at: int) -> Incoming:
        with self._phase_lock:
            return self._advance_locked(input_, at)

    def _advance_locked(self, input_: IncomingInput, at: int) -> Incoming:
        try:
            return self.phase.advance(input_)
        except StateError as error:
            raise _bad(str(error), at) from None

    # -- postcopy -------------------------------------------------------------

    def package_ping(self, value: int) -> None:
        """A PING inside the package: everything before it is loaded. From this answer on the source
        may say RUN at any time, and whether it did is not known here should the stream be lost."""
        with self._phase_lock:
            self._may_be_ours = Feature.SPLIT_RUN in self.features
        try:
            self._answer(Pong(value))
        except MigrationError:
            with self._phase_lock:
                self._may_be_ours = False
            raise

    def listen(self, at: int) -> None:
        """RAM becomes sensitive: from here on a touch of a missing page asks the source for it."""
        was_discarded = self.phase.state is Incoming.DISCARD
        self._advance(IncomingInput.LISTEN, at)
        if not was_discarded:
            self._end_multifd()
            self.ram.forbid_thp()
        assert self._sensitised is not None  # made at ADVISE
        self._sensitised.arm()
        run_fd = self._run_fd if Feature.SPLIT_RUN in self.features else -1
        self.channel.bound_in_flight(self._options.in_flight_bytes)
        lib.dst_start_postcopy(
            self.ram.native,
            self._sensitised.fd,
            self._stop_fault_fd,
            run_fd,
            threading.get_native_id(),
            self._sensitised.pending.address,
            self._sensitised.watchdog.address,
        )
        if self.counts_blocktime:
            self.ram.watch_vcpus(self.machine.vcpu_thread_ids())
        self.machine.attach_received(self.ram.received)
        if self._urgent is not None:
            self._urgent.start(is_framed=Feature.CHECKSUM in self.features)
        self._start_thread("fault", self._fault_thread)
        self._start_thread("listen", self._listen_thread)
        # A device's load may touch a missing page with the GIL held: nobody may still need it then.
        loops = 2 if self._urgent is None else 3
        if lib.dst_await_loops(self.ram.native, loops, LOOPS_BEGIN_TIMEOUT_S) < 0:
            what = "the fault and listen threads" if loops == 2 else "the preempt channel"
            raise MigrationError(f"{what} did not come up within {LOOPS_BEGIN_TIMEOUT_S} s")
        self.report.advance(StatusInput.PACKAGE_SENT)
        self.report.advance(StatusInput.POSTCOPY)

    def _start_thread(self, name: str, target: object) -> None:
        thread = NamedThread(target=target, name=f"incoming-{name}", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def await_run(self, at: int) -> None:
        """The package is loaded, which its last PONG told the source; RUN comes alone."""
        if Feature.SPLIT_RUN not in self.features:
            raise _bad("the package ends without RUN", at)
        ready, _, _ = select.select([self._run_fd, self._fail_fd], [], [])
        if self._run_fd not in ready:
            raise MigrationError("the source gave up before RUN: the guest is still its own")
        self.run_guest(at)

    def run_guest(self, at: int) -> None:
        """RUN and a failure of the stream meet here: one of them wins, under the lock."""
        with self._phase_lock:
            if self._main_failed.is_set():
                raise MigrationError("the stream was lost before RUN")
            state = self._advance_locked(IncomingInput.RUN, at)
        lib.dst_set_running(self.ram.native)
        self._start_guest(honour_run_state=False)
        if state is Incoming.END:
            # The stream was read to its end before: nobody else will finish.
            self._guest_started.set()

    def _start_guest(self, *, honour_run_state: bool) -> None:
        """RUN starts the guest whatever state was sent; after a precopy that state decides."""
        self._end_live_state()
        wanted = (self.machine.incoming_run_state if honour_run_state else None) or "running"
        if wanted != "running" or self._options.start_paused:
            self.machine.run_state = "paused" if wanted == "running" else wanted
        else:
            self.machine.start()
            self.report.emit("RESUME", {})
        self._guest_started.set()

    # -- the end of a precopy -------------------------------------------------

    def finish_precopy(self) -> None:
        """The EOF byte without a package: everything is here."""
        self._end_multifd()
        self._advance(IncomingInput.STREAM_EOF, self.channel.position)
        if self.channel.is_two_way and self._has_return_path:
            # QEMU always sends the description; one that closed instead has still sent all state.
            with contextlib.suppress(TruncatedStreamError):
                skip_description(self.channel)
        self.machine.attach_received(None)
        if self._sensitised is not None:
            # Advised, but not needed: nothing is registered.
            self._sensitised.close(is_complete=True)
            self._sensitised = None
        self.ram.restore_thp()
        self._start_guest(honour_run_state=True)
        # The guest runs here whether or not the source hears of it: nothing failed.
        with contextlib.suppress(MigrationError):
            self._shut(0)
        self._look_at_placement()
        self.report.advance(StatusInput.DONE)

    def _shut(self, value: int) -> None:
        if self._has_return_path:
            self._answer(Shut(value))

    # -- the listen and fault threads -----------------------------------------

    def _listen_thread(self) -> None:
        move_here(self._options.fault_cpus)
        while True:
            try:
                self._read_to_end()
                return
            except Exception as error:
                self._listen_failed(error)
            if not self._await_recovery():
                return

    def _read_to_end(self) -> None:
        event = lib.dst_listen_loop(self.ram.native)
        if event < 0:
            raise native_error(self.ram.native.main.error, fallback="listen thread")  # type: ignore[attr-defined]
        if event != 0:
            raise _bad("what comes here is not for a RAM-only postcopy", self.channel.position)
        self._stream_read()

    # -- recovery ---------------------------------------------------------------

    def recover(self, channel: Channel, listener: Listener | None) -> None:
        """Any thread: go on over this channel, which is closed with the migration.

        :param listener: where a preempt channel will come in; ours to close.
        """
        self._recovery.put((channel, listener))

    def _await_recovery(self) -> bool:
        """Paused: until a new channel works. False when the migration was given up."""
        while self.report.status in _MAY_RECOVER:
            way = self._recovery.get()
            if way is None:
                return False
            try:
                self._resume_over(*way)
                return True
            except Exception as error:
                self._listen_failed(error)
        return False

    def _resume_over(self, channel: Channel, listener: Listener | None) -> None:
        # Nobody else uses the old channel any more, but a request may be on its way into it.
        self._old_channels.append(self.channel)
        self.channel = channel
        self.report.try_advance(StatusInput.RECOVER)  # unless migrate-recover has said it
        is_framed = Feature.CHECKSUM in self.features
        if is_framed:
            channel.set_read_framed()
            channel.set_write_framed()
        if self._urgent is not None:
            self._urgent.stop()
            if listener is not None:
                self._urgent.move_to(listener)
            self._urgent.start(is_framed=is_framed)
        self.report.advance(StatusInput.RECOVER_CONNECTED)
        run_came = answer_source(channel, self.ram.received)
        channel.bound_in_flight(self._options.in_flight_bytes)
        lib.dst_set_channel(self.ram.native, channel.native)
        acknowledge(channel)
        if self._sensitised is not None:
            self._sensitised.watchdog.end_process = False
        self.report.advance(StatusInput.RESUMED)
        asked = lib.dst_request_again(self.ram.native)
        if asked < 0:
            raise MigrationError(f"asking again: {os.strerror(-asked)}")
        if run_came:
            os.eventfd_write(self._run_fd, 1)  # no effect on a guest that runs already

    def _stream_read(self) -> None:
        """The EOF byte came. What is not here would read as zero from now on."""
        begun_ns = time.monotonic_ns()
        self._await_urgent_pages()
        missing = self.ram.missing_pages
        if missing:
            raise RemoteStreamError(
                f"the source ended the stream with {missing} target pages "
                f"({missing * TARGET_PAGE_BYTES >> 10} KiB) never sent",
                offset=self.channel.position,
                section="ram",
            )
        self._advance(IncomingInput.STREAM_EOF, self.channel.position)
        self._guest_started.wait()
        # First of all: a source that loses its connection before it heard this may believe that
        # the guest never left.
        with contextlib.suppress(MigrationError):
            self._shut(0)
        self.last_word_us = (time.monotonic_ns() - begun_ns) // 1000
        self._desensitise()
        self._look_at_placement()
        self.report.advance(StatusInput.DONE)

    def _await_urgent_pages(self) -> None:
        """The last requested pages may still be on their way on the other channel."""
        if self._urgent is None:
            return
        until = time.monotonic() + LAST_PAGES_TIMEOUT_S
        while self.ram.missing_pages and time.monotonic() < until:
            if self._urgent.ended.wait(LAST_PAGES_POLL_S):
                return

    def _desensitise(self) -> None:
        """All pages are here: end the fault thread, unregister, allow huge pages again."""
        if self._urgent is not None:
            self._urgent.stop()
        os.eventfd_write(self._stop_fault_fd, 1)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._sensitised is not None:
            self._sensitised.close(is_complete=True)
            self._sensitised = None
        self.machine.attach_received(None)
        self.ram.restore_thp()
        if self._options.collapse:
            self._collapser = Collapser(self.machine.ram, self._collapsed)
            self._collapser.start()

    def _collapsed(self, report: CollapseReport) -> None:
        self.report.emit("X_COLLAPSED", {"state": report.state.value, "regions": report.collapsed})

    @property
    def collapse_report(self) -> CollapseReport | None:
        """How far making huge pages is; ``None``: it was not asked for, or not begun."""
        return self._collapser.report() if self._collapser is not None else None

    def stop_collapsing(self) -> None:
        """At once; what is huge stays so."""
        if self._collapser is not None:
            self._collapser.stop()

    def _look_at_placement(self) -> None:
        """Pages are on NUMA nodes now: the wanted ones?"""
        for text in misplaced(self.machine.ram):
            self.report.warn(text)

    def _fault_thread(self) -> None:
        move_here(self._options.fault_cpus)
        if lib.dst_fault_loop(self.ram.native) < 0:
            error = native_error(self.ram.native.fault_error, fallback="fault thread")  # type: ignore[attr-defined]
            self._listen_failed(error)

    # -- failing --------------------------------------------------------------

    def _listen_failed(self, error: Exception) -> None:
        """The stream is lost or bad. Once RUN came the guest is ours: pause. Once we said that
        everything is loaded it may be, RUN having been lost on its way: pause as well, and run only
        when it comes after all. Before, it never will be, and the main thread may sleep on a page
        that never comes: poison wakes it."""
        with self._phase_lock:
            guest_is_ours = self._has_run_come()
            keeps = guest_is_ours or (self._may_be_ours and not self._main_failed.is_set())
            if not keeps:
                self._main_failed.set()
                self._note_cause(error)
        if keeps:
            self.channel.abort()
            text = str(error) if guest_is_ours else f"{error}; {RUN_IS_MISSING}"
            self.report.try_advance(StatusInput.LOST_CHANNEL, error=text)
            return
        os.eventfd_write(self._fail_fd, 1)
        self._fail(error)
        with contextlib.suppress(MigrationError):
            self.give_up()

    def _has_run_come(self) -> bool:
        if self.phase.state in (Incoming.RUNNING, Incoming.END):
            return True
        ready, _, _ = select.select([self._run_fd], [], [], 0)
        return bool(ready)

    def _note_cause(self, error: Exception) -> str:
        """A failure ends main and listen thread one after the other; what the second one says is
        only how it was ended. Under the phase lock."""
        if self._cause is None:
            self._cause = self.channel.explain(str(error))
        return self._cause

    def _fail(self, error: Exception) -> None:
        if self.report.status is Status.FAILED or self._guest_started.is_set():
            return
        with self._phase_lock:
            cause = self._note_cause(error)
        self.machine.run_state = "inmigrate"
        if not is_lost_channel(error):
            with contextlib.suppress(Exception):
                self._shut(1)
        self.report.try_advance(StatusInput.FAIL, error=cause)
        self.channel.abort()
        self._multifd.abort()

    @property
    def holds_missing_pages(self) -> bool:
        """RAM is registered: closing now would show zeros to whoever still looks."""
        return self._sensitised is not None and self._sensitised.is_armed

    def pause(self) -> None:
        """``migrate-pause``: cut the channel; the listen thread does the rest."""
        self.channel.abort()
        self._multifd.abort()

    def cancel(self) -> bool:
        """Paused before RUN came: the source kept its guest, as the user knows. Back to waiting for
        a migration. False: the guest is ours, or there is nothing to give up."""
        with self._phase_lock:
            is_waiting = self.report.status is Status.POSTCOPY_PAUSED and self._may_be_ours
            if not is_waiting or self._has_run_come():
                return False
            self._main_failed.set()
            self._note_cause(MigrationError("cancelled before RUN came"))
        self._recovery.put(None)
        os.eventfd_write(self._fail_fd, 1)
        return True

    def give_up(self) -> None:
        """Never to be finished: poison what is missing, so that its sleepers are woken by SIGBUS
        and nobody reads zeros. The vCPUs must have been stopped."""
        if self._sensitised is not None:
            self._sensitised.give_up()

    def abandon(self) -> None:
        """Any thread: nobody wants this migration any more. Sleepers are woken by SIGBUS, waiters
        return; the vCPUs must have been stopped."""
        self._main_failed.set()
        self._recovery.put(None)
        self.channel.abort()
        self._multifd.abort()
        os.eventfd_write(self._fail_fd, 1)
        with contextlib.suppress(MigrationError):
            self.give_up()

    def close(self) -> None:
        """End the threads and free everything, the userfaultfd last: what is missing is poisoned
        before, so that its sleepers get SIGBUS and nobody reads zeros."""
        self.abandon()
        self._guest_started.set()
        self.stop_collapsing()
        os.eventfd_write(self._stop_fault_fd, 1)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._sensitised is not None:
            self._sensitised.close(is_complete=False)
            self._sensitised = None
        if self._urgent is not None:
            self._urgent.close()
        self._multifd.close()
        self.ram.close()
        for channel in (self.channel, *self._old_channels):
            channel.close()
        while not self._recovery.empty():
            if (unused := self._recovery.get()) is not None:
                for each in unused:
                    if each is not None:
                        each.close()
        os.close(self._run_fd)
        os.close(self._fail_fd)
        os.close(self._stop_fault_fd)


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset)
