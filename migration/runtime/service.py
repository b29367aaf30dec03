"""The migration service of one machine: what the monitor and the commands steer.

At most one migration at a time, in one direction. Every method may be called from any thread; long
work happens in threads named after their role. Listeners are called from those threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from migration.engine.settings import (
    OFFERED,
    SettingError,
    change_capabilities,
    change_parameters,
    default_parameters,
)
from migration.engine.states import RESTING, Status, StatusInput
from uffd.threads import NamedThread

from .affinity import ChoosePlacement, Placement
from .channel import Channel
from .channel_bridge import bridge
from .dirty_rate import SAMPLE_PAGES, DirtyRate
from .errors import MigrationError
from .gather import ChannelsError, gather
from .incoming import IncomingMigration
from .machine import Machine, uuid_of
from .memory_report import memdevs
from .outgoing import OutgoingMigration
from .pressure import PressureWatch
from .query import describe
from .report import EventListener, Report
from .service_options import ONE_CHANNEL, incoming_options, outgoing_options
from .snapshot import BROKEN, GUEST_IS_NOT_HERE, Snapshots
from .snapshot_migrate import FileMigration, require_file
from .transport import FdLookup, Listener, connect, is_multi_channel

_SETTLED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED})
_RECOVERING = frozenset({Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER})
_ENDED = frozenset({Status.COMPLETED.value, Status.FAILED.value, Status.CANCELLED.value})
_GUEST_IS_ELSEWHERE = frozenset({Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED}) | _RECOVERING
_CAN_PAUSE = frozenset({Status.POSTCOPY_ACTIVE}) | _RECOVERING


class MigrationService:
    """Migrations of one machine, outgoing and incoming.

    :ivar start_paused: QEMU's ``-S``: an incoming guest waits for ``cont``.
    :param snapshot_dir: where named snapshots lie; None: only ``file:`` is possible.
    :ivar choose_placement: measures where the threads of a migration run best; asked once, at the
        start of the first one. None: left to the scheduler.
    :ivar policy: a user's own, see :func:`migration.runtime.policies.load_policy`; None: QEMU's.
    :ivar fds: looks up ``fd:NAME``; the descriptor it returns is the channel's to close.
    """

    def __init__(
        self, machine: Machine, *, start_paused: bool = False, snapshot_dir: Path | None = None
    ) -> None:
        self.machine = machine
        self.start_paused = start_paused
        self.fds: FdLookup | None = None
        self.policy: object | None = None
        self.choose_placement: ChoosePlacement | None = None
        self._lock = threading.RLock()
        self._capabilities = dict(OFFERED)
        self._parameters = default_parameters()
        self._listeners: list[EventListener] = []
        self._report: Report | None = None
        self._outgoing: OutgoingMigration | None = None
        self._incoming: IncomingMigration | None = None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._is_connecting = False
        self._has_come = False
        self._closed = False
        self._placed: Placement | None = None
        self._files: FileMigration | None = None
        self._pressure: PressureWatch | None = None
        self.snapshots = Snapshots(machine, self._emit, snapshot_dir)
        self._dirty_rate = DirtyRate(machine.ram)

    # -- settings -------------------------------------------------------------

    def capabilities(self) -> dict[str, bool]:
        """Every capability on offer and whether it is on."""
        with self._lock:
            return dict(self._capabilities)

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """:raises MigrationError: unknown or not offered, or a migration is running. Nothing
        changed."""
        with self._lock:
            if self._listener is None or self._has_come:  # one who only listens has not begun
                self._refuse_while_running("change capabilities")
            try:
                self._capabilities = change_capabilities(self._capabilities, changes)
            except SettingError as error:
                raise MigrationError(str(error)) from None

    def parameters(self) -> dict[str, object]:
        """Every parameter and its value."""
        with self._lock:
            return dict(self._parameters)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Takes effect at once, also in a running migration.

        :raises MigrationError: unknown, of another type, out of range. Nothing changed.
        """
        with self._lock:
            try:
                self._parameters = change_parameters(self._parameters, changes)
            except SettingError as error:
                raise MigrationError(str(error)) from None
            outgoing = self._outgoing
        if outgoing is not None:
            outgoing.settings_changed()

    def _parameter(self, name: str) -> int:
        return int(self._parameters[name])

    def _placement(self) -> Placement | None:
        if self._placed is None and self.choose_placement is not None:
            self._placed = self.choose_placement()
        return self._placed

    def query_memdev(self) -> list[dict[str, object]]:
        """``query-memdev``: what each RAM block is made of and on which NUMA nodes it lies."""
        return memdevs(self.machine.ram)

    # -- events ---------------------------------------------------------------

    def add_listener(self, callback: EventListener) -> None:
        """``callback(name, data)`` for MIGRATION, MIGRATION_PASS, STOP and RESUME, from any
        thread."""
        with self._lock:
            self._listeners.append(callback)

    def _emit(self, event: str, data: dict[str, object]) -> None:
        if event == "MIGRATION" and data.get("status") in _ENDED and self._pressure is not None:
            self._pressure.freeze()
        for callback in list(self._listeners):
            callback(event, data)

    # -- outgoing -------------------------------------------------------------

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """Connect and start; returns when the connection stands.

        :raises MigrationError: a migration is running, the guest is not here, nobody listens, ...
        """
        if resume:
            self._resume(uri)
            return
        self._migrate(uri, lambda: connect(uri, fds=self.fds))

    def migrate_over(self, source: object) -> None:
        """Like :meth:`migrate`, over three functions of the user's (see
        :func:`migration.runtime.channel_ops.channel_ops`): written by ``put_buffer``, answered on
        its return path if it has one. Without one there is no postcopy.

        :raises MigrationError: as :meth:`migrate`. :raises TypeError, ValueError: not a channel.
        """
        self._migrate("put_buffer", lambda: bridge(source, writes=True))

    def _migrate(self, uri: str, open_channel: Callable[[], Channel]) -> None:
        with self._lock:
            self._refuse_while_running("start another migration")
            if self._is_connecting:
                raise MigrationError("another migration is connecting")
            if self.machine.run_state in GUEST_IS_NOT_HERE:
                raise MigrationError(
                    f"the guest cannot be migrated in run state '{self.machine.run_state}'"
                )
            if blockers := self.machine.registry.blockers():
                raise MigrationError(f"these devices cannot be migrated: {', '.join(blockers)}")
            for name in ("postcopy-ram", "mapped-ram"):
                if self._parameters["mode"] == "cpr-transfer" and self._capabilities[name]:
                    raise MigrationError(f"mode cpr-transfer is not compatible with {name}")
            if self._capabilities["mapped-ram"]:
                self._begin_file(uri, outgoing=True)
                return
            _check_multifd(self._capabilities["multifd"], uri)
            self._is_connecting = True
        try:
            self._clear()
            channel = open_channel()  # may take seconds: nobody waits for the lock
            with self._lock:
                self._refuse_when_closed(channel)
                self._begin(uri, channel)
        finally:
            self._is_connecting = False

    def _begin_file(self, uri: str, *, outgoing: bool) -> None:
        """Capability ``mapped-ram``: the guest goes into a file, or comes out of one."""
        require_file(uri)
        self._clear()
        self._report = Report(self._emit)
        self._report.advance(StatusInput.START)
        files = self._files = FileMigration(self.snapshots, uri, self._report)
        if outgoing:
            self._start(files.run_outgoing, "outgoing-migration")
            return
        self._start(lambda: files.run_incoming(start_paused=self.start_paused), "incoming-main")

    def _begin(self, uri: str, channel: Channel) -> None:
        self._report = Report(self._emit)
        self._report.advance(StatusInput.START)
        self._pressure = PressureWatch(self._report.warn)
        try:
            self._outgoing = self._new_outgoing(uri, channel, self._report)
        except BaseException as error:
            channel.close()
            self._report.advance(StatusInput.FAIL, error=str(error))
            raise
        self._start(self._run_outgoing, "outgoing-migration")

    def _resume(self, uri: str) -> None:
        """``migrate`` with ``resume``: a paused outgoing postcopy goes on over a new channel."""
        with self._lock:
            outgoing = self._outgoing
            if outgoing is None or self._status() is not Status.POSTCOPY_PAUSED:
                raise MigrationError("Cannot resume if there is no paused migration")
            outgoing.require_resumable()
        channel = connect(uri, fds=self.fds)
        outgoing.channels.connect_urgent_at(lambda: connect(uri, fds=self.fds))
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            self._refuse_when_closed(channel)
            self._start(lambda: self._run_outgoing(channel), "outgoing-migration")

    def _new_outgoing(self, uri: str, channel: Channel, report: Report) -> OutgoingMigration:
        options = outgoing_options(
            uri,
            channel,
            lambda: connect(uri, fds=self.fds),
            capabilities=self._capabilities,
            parameters=self._parameters,
            parameter=self._parameter,
            placement=self._placement(),
            policy=self.policy,
        )
        return OutgoingMigration(self.machine, channel, options, report)

    def _run_outgoing(self, resumed: Channel | None = None) -> None:
        outgoing, report = self._outgoing, self._report
        assert outgoing is not None
        assert report is not None
        try:
            if resumed is None:
                outgoing.run()
            else:
                outgoing.resume(resumed)
        except Exception as error:
            if report.status not in _SETTLED:  # it said itself how it ended: paused is no failure
                report.try_advance(StatusInput.FAIL, error=str(error) or repr(error))

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``: at the next chance. During set-up, twice or after the end it
        does no harm.

        :raises MigrationError: capability ``postcopy-ram`` is off, or this machine never was a
            source: what QEMU refuses as well.
        """
        with self._lock:
            if not self._capabilities["postcopy-ram"]:
                raise MigrationError(
                    "enable postcopy with migrate-set-capabilities before the start of migration"
                )
            outgoing = self._outgoing
            if outgoing is None:
                raise MigrationError("postcopy must be started after migration has been started")
        outgoing.start_postcopy()

    def cancel(self) -> None:
        """``migrate_cancel``: no effect without a migration.

        On the destination it ends the waiting for a source, and for the word that is still missing
        of one that kept its guest.

        :raises MigrationError: the guest was already given to the destination. A precopy that waits
            for its answer then stops waiting: the answer may never come.
        """
        with self._lock:
            outgoing, report, listener = self._outgoing, self._report, self._listener
            incoming = self._incoming
        if listener is not None:
            listener.wake()
        if self._files is not None and self._files.cancel():
            return
        if incoming is not None:
            incoming.cancel()
        if outgoing is None or report is None or report.status in RESTING or outgoing.cancel():
            return
        if outgoing.stop_waiting():
            raise MigrationError(
                "the guest was already given to the destination: too late to cancel; not waiting "
                "any longer for its answer"
            )
        if outgoing.is_committed() and report.status not in RESTING:
            raise MigrationError("the guest already runs at the destination: too late to cancel")

    def take_back(self, *, not_running_elsewhere: bool) -> None:
        """``x-take-back``: run the guest of a failed precopy here again, whose last word was lost.

        Only a person, or a program that asked the destination, can know that it does not run over
        there: that it says ``failed`` with its guest in ``inmigrate``, which it then stays in, or
        that its process is gone. Nothing here ever does this by itself.

        :param not_running_elsewhere: the caller knows that.
        :raises MigrationError: it was not said, or there is nothing to take back.
        """
        if not not_running_elsewhere:
            raise MigrationError(
                "take the guest back only if you know that it does not run at the destination "
                "(query-migrate there says 'failed' and query-status 'inmigrate', or the process "
                "is gone), and say so: not-running-elsewhere"
            )
        with self._lock:
            if self._outgoing is None:
                raise MigrationError("there is no guest to take back: none was given away here")
            self._outgoing.take_back()

    def pause(self) -> None:
        """``migrate-pause``: cut the channel of a postcopy migration, so that both sides pause. A
        recovery under way is given up.

        :raises MigrationError: no migration is in postcopy.
        """
        with self._lock:
            if self._status() not in _CAN_PAUSE:
                raise MigrationError(
                    "migrate-pause is currently only supported during postcopy-active or "
                    f"postcopy-recover state, not '{self._status().value}'"
                )
            side = self._outgoing or self._incoming
            if self._listener is not None:  # a recovery nobody has come for yet
                self._listener.wake()
                return
        if side is not None:
            side.pause()

    def yank(self) -> None:
        """``yank``: cut the connection in whatever state: a precopy fails and its guest goes on, a
        postcopy pauses. No effect without a migration."""
        with self._lock:
            side = self._outgoing or self._incoming
            if self._listener is not None:
                self._listener.wake()
            if side is None or not self._is_running():
                return
        side.pause()

    @property
    def is_busy(self) -> bool:
        """A migration is under way, waited for or paused."""
        return self._is_running()

    def recover(self, uri: str) -> str:
        """``migrate-recover``: a paused incoming postcopy waits here for its source; the URI.

        :raises MigrationError: nothing is paused here, or the address cannot be had.
        """
        with self._lock:
            incoming = self._incoming
            if incoming is not None and self._status() in _RECOVERING:
                raise MigrationError(
                    "Migrate recovery is triggered already; 'migrate-pause' gives it up"
                )
            if incoming is None or self._status() is not Status.POSTCOPY_PAUSED:
                raise MigrationError("Migrate recover can only be run when postcopy is paused.")
            listener = self._listener = Listener(uri, fds=self.fds)
            incoming.report.advance(StatusInput.RECOVER)
        NamedThread(
            target=self._accept_recovery,
            args=(listener, incoming),
            name="incoming-recover",
            daemon=True,
        ).start()
        return listener.uri

    def _accept_recovery(self, listener: Listener, incoming: IncomingMigration) -> None:
        is_kept = False
        try:
            channel = listener.accept()
            is_kept = self._capabilities["postcopy-preempt"]
            incoming.recover(channel, listener if is_kept else None)
        except MigrationError as error:
            is_kept = False
            with self._lock:
                self._listener = None
            incoming.report.try_advance(StatusInput.LOST_CHANNEL, error=str(error))
        finally:
            with self._lock:
                self._listener = None
            if not is_kept:
                listener.close()

    def continue_(self, state: str) -> None:
        """``migrate-continue``. :raises MigrationError: the migration does not wait in
        ``state``."""
        with self._lock:
            outgoing = self._outgoing
            if (
                outgoing is None
                or self._status() is not Status.PRE_SWITCHOVER
                or state != "pre-switchover"
            ):
                raise MigrationError(f"Migration not in expected state: {self._status().value}")
        outgoing.continue_()

    # -- incoming -------------------------------------------------------------

    def migrate_incoming(self, uri: str) -> str:
        """Listen; returns the URI listened on (with the port the kernel chose, if it did).

        :raises MigrationError: the machine already has a guest, or the address cannot be had.
        """
        with self._lock:
            self._refuse_while_running("start an incoming migration")
            if self.machine.run_state != "inmigrate":
                raise MigrationError("this machine does not wait for an incoming migration")
            if self._capabilities["mapped-ram"]:
                self._begin_file(uri, outgoing=False)
                return uri
            _check_multifd(self._capabilities["multifd"], uri)
            self._clear()
            self._has_come = False
            self._listener = Listener(uri, fds=self.fds)
            self._report = Report(self._emit)
            self._report.advance(StatusInput.START)
            self._start(self._run_incoming, "incoming-main")
            return self._listener.uri

    def migrate_incoming_over(self, source: object) -> None:
        """Like :meth:`migrate_incoming`, over functions of the user's: read by ``get_buffer``,
        answered on its return path if it has one. Returns at once.

        Pages that come this way need the GIL, so it is no way for a postcopy: somebody may sleep
        on a missing page with the GIL in hand.

        :raises MigrationError: as there, or capability ``postcopy-ram`` is on.
        :raises TypeError, ValueError: not a channel.
        """
        with self._lock:
            self._refuse_while_running("start an incoming migration")
            if self.machine.run_state != "inmigrate":
                raise MigrationError("this machine does not wait for an incoming migration")
            if self._capabilities["postcopy-ram"]:
                raise MigrationError("postcopy needs a descriptor, Python functions are too late")
            if self._capabilities["multifd"]:
                raise MigrationError(ONE_CHANNEL)
            self._clear()
            channel = bridge(source, writes=False)
            report = self._report = Report(self._emit)
            report.advance(StatusInput.START)
            self._start(lambda: self._serve(channel, report, None), "incoming-main")

    def _run_incoming(self) -> None:
        listener, report = self._listener, self._report
        assert listener is not None
        assert report is not None
        channel: Channel | None = None
        channels: tuple[Channel, ...] = ()
        failure: str | None = None
        try:
            channel = listener.accept()
            with self._lock:  # until now capabilities may be changed
                self._has_come = True
                multifd = self._capabilities["multifd"]
            if multifd:
                first, channel = channel, None
                channel, channels = self._gather(listener, first)
        except ChannelsError as error:
            failure = str(error)
            listener.close()
        except MigrationError:
            listener.close()
        finally:
            with self._lock:
                self._listener = None
        if channel is None:
            # Last, and without the lock: who hears it may start anew at once and joins this thread.
            if failure is not None:
                report.advance(StatusInput.FAIL, error=failure)
            elif report.try_advance(StatusInput.CANCEL):
                report.advance(StatusInput.CANCELLED)
            return
        preempt = self._capabilities["postcopy-preempt"]
        if not preempt:
            listener.close()
        self._serve(channel, report, listener if preempt else None, channels)

    def _gather(self, listener: Listener, first: Channel) -> tuple[Channel, tuple[Channel, ...]]:
        """All connections of a multifd source. :raises MigrationError: see :func:`gather`."""
        if not is_multi_channel(listener.uri):
            first.close()
            raise ChannelsError(ONE_CHANNEL)
        count = self._parameter("multifd-channels")
        return gather(listener, first, count, vm=uuid_of(self.machine))

    def _serve(
        self,
        channel: Channel,
        report: Report,
        listener: Listener | None,
        multifd: tuple[Channel, ...] = (),
    ) -> None:
        options = incoming_options(
            self.machine,
            channel,
            listener,
            multifd,
            capabilities=self._capabilities,
            parameters=self._parameters,
            placement=self._placement(),
            start_paused=self.start_paused,
        )
        self._pressure = PressureWatch(report.warn)
        try:
            with self._lock:
                incoming = self._incoming = IncomingMigration(
                    self.machine, channel, options, report
                )
                if self._closed:  # who closed us meanwhile saw nothing here to end
                    incoming.abandon()
            incoming.run()
        except Exception as error:
            # A device's hook may raise anything; whatever it was, the report tells it.
            if report.status not in _SETTLED:
                report.try_advance(StatusInput.FAIL, error=str(error) or repr(error))
            if self._incoming is None:
                for each in (channel, *multifd):
                    each.close()
                if listener is not None:
                    listener.close()

    # -- the guest ------------------------------------------------------------

    def cont(self) -> None:
        """Let the guest run. :raises MigrationError: it is not here (any more)."""
        with self._lock:
            state, status = self.machine.run_state, self._status()
            if state == "running":
                return
            if self.snapshots.is_busy:
                raise MigrationError("a snapshot is being saved or loaded: 'cont' after it")
            if state in ("inmigrate", "finish-migrate", BROKEN):
                raise MigrationError(f"the guest cannot run in state '{state}'")
            if self._outgoing is not None and status in _GUEST_IS_ELSEWHERE:
                raise MigrationError("the guest runs at the destination: two of it must never run")
            self.machine.start()
        self._emit("RESUME", {})

    def stop_guest(self) -> None:
        """Stop the guest; never waits for a missing page."""
        with self._lock:
            did_run = self.snapshots.stop_guest()
        if did_run:
            self._emit("STOP", {})

    # -- snapshots ------------------------------------------------------------

    def savevm(self, name: str) -> None:
        """Save the machine as ``NAME`` or ``file:PATH[,offset=N]``, in the mapped-ram layout with
        that capability; returns when it is on disk. The guest stands still for a part of that.

        :raises MigrationError: see :meth:`Snapshots.save`; the guest goes on.
        """
        with self._snapshot("save a snapshot"):
            self.snapshots.save(name, is_mapped=self._capabilities["mapped-ram"])

    def loadvm(self, name: str) -> None:
        """Replace the machine by a snapshot. :raises MigrationError: see :meth:`Snapshots.load`."""
        with self._snapshot("load a snapshot"):
            self._clear()  # what a failed migration left may still watch RAM
            self.snapshots.load(name, start_paused=self.start_paused)

    def delvm(self, name: str) -> None:
        """Delete a named snapshot. :raises MigrationError: there is none."""
        self.snapshots.delete(name)

    def list_snapshots(self) -> list[dict[str, object]]:
        """The named snapshots, see :meth:`SnapshotInfo.as_json`."""
        return [info.as_json() for info in self.snapshots.list()]

    @contextmanager
    def _snapshot(self, doing: str) -> Iterator[None]:
        """No migration, and no other snapshot, meanwhile."""
        with ExitStack() as stack:
            with self._lock:
                self._refuse_while_running(doing)
                if self._is_connecting:
                    raise MigrationError("a migration is connecting")
                stack.enter_context(self.snapshots.claim())
            yield

    # -- looking --------------------------------------------------------------

    def query(self) -> dict[str, object]:
        """``query-migrate``: QEMU's fields, ours under ``x-postcopy``. ``{}`` before the first
        one, unless a device blocks it."""
        blockers = self.machine.registry.blockers()
        reasons = [f"device {name} cannot be migrated" for name in blockers]
        blocked: dict[str, object] = {"blocked-reasons": reasons} if reasons else {}
        with self._lock:
            if self._report is None:
                return blocked
            pressure = None if self._pressure is None else self._pressure.figures()
            info = describe(
                self._report, self._outgoing, self._incoming, dict(self._parameters), pressure
            )
            return info | blocked

    def calc_dirty_rate(self, calc_time_ms: int, sample_pages: int | None = None) -> None:
        """``calc-dirty-rate`` by sampling pages; returns at once.

        :raises MigrationError: one is measured already, the guest does not run here, pages are
            missing, or a value is out of range.
        """
        with self._lock:
            if self.machine.run_state != "running":
                raise MigrationError("the guest does not run here: there is nothing to measure")
            if self._incoming is not None and self._incoming.holds_missing_pages:
                raise MigrationError("pages are still missing: measure once the migration is over")
            self._dirty_rate.start(calc_time_ms, sample_pages or SAMPLE_PAGES)

    def query_dirty_rate(self, unit: str = "second") -> dict[str, object]:
        """``query-dirty-rate``, see :meth:`DirtyRate.query`."""
        return self._dirty_rate.query(unit)

    def wait(self, timeout_s: float | None = None) -> str:
        """Sleep until the migration has ended, all of it cleaned up, or paused; the status then.
        Listeners have heard of it before. Not to be called by one."""
        with self._lock:
            report, thread = self._report, self._thread
        if report is None:
            return Status.NONE.value
        until = None if timeout_s is None else time.monotonic() + timeout_s
        status = report.wait_for(_SETTLED, timeout_s)
        if status in RESTING and thread is not None:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return status.value

    def _status(self) -> Status:
        return self._report.status if self._report else Status.NONE

    def _is_running(self) -> bool:
        return self._status() not in RESTING

    def _refuse_when_closed(self, channel: Channel) -> None:
        """Connected too late."""
        if self._closed:
            channel.close()
            raise MigrationError("the service is closed")

    def _refuse_while_running(self, doing: str) -> None:
        if self._closed:
            raise MigrationError("the service is closed")
        if self._is_running():
            raise MigrationError(f"There's a migration process in progress: cannot {doing} now")
        if self.snapshots.is_busy:
            raise MigrationError(f"a snapshot is being saved or loaded: cannot {doing} now")

    # -- threads and the end --------------------------------------------------

    def _start(self, target: Callable[[], None], name: str) -> None:
        self._thread = NamedThread(target=target, name=name, daemon=True)
        self._thread.start()

    def _clear(self) -> None:
        """Free what the last migration left; it has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for side in (self._outgoing, self._incoming):
            if side is not None:
                side.close()
        self._outgoing = self._incoming = self._files = None
        if self._pressure is not None:
            self._pressure.close()
            self._pressure = None

    def close(self) -> None:
        """End everything: cancel, stop the guest, join the threads. Never waits for a missing page;
        pages that are missing are poisoned, so nobody reads zeros in their place."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            listener, outgoing, incoming = self._listener, self._outgoing, self._incoming
        self.snapshots.close()
        self._dirty_rate.close()
        if listener is not None:
            listener.wake()
        if outgoing is not None:
            outgoing.cancel()
            outgoing.pause()
        if incoming is not None:
            self.machine.stop()
            incoming.abandon()
        if self._thread is not None:
            self._thread.join()
        self._clear()


def _check_multifd(is_on: bool, uri: str) -> None:
    if is_on and not is_multi_channel(uri):
        raise MigrationError(ONE_CHANNEL)
