"""The migration service of one machine: what the monitor and the commands steer.

At most one migration at a time, in one direction. Every method may be called from any thread; long
work happens in threads named after their role. Listeners are called from those threads. The lock,
and what it is for, is in :mod:`~migration.runtime.session`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from migration.engine.states import Status

from .destination.side import IncomingSide
from .dirty_rate import SAMPLE_PAGES, DirtyRate
from .errors import MigrationError
from .machine import Machine
from .memory_report import memdevs
from .query import describe
from .report import EventListener, Listeners
from .session import Session
from .settings import Settings
from .snapshots.migrate import FileMigrations
from .snapshots.snapshots import BROKEN, Snapshots
from .source.side import OutgoingSide
from .transport import FdLookup

_CAN_PAUSE = frozenset(
    {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER}
)


class MigrationService:
    """Migrations of one machine, outgoing and incoming.

    :param start_paused: QEMU's ``-S``: an incoming guest waits for ``cont``.
    :param snapshot_dir: where named snapshots lie; None: only ``file:`` is possible.
    :ivar settings: what holds for the next migration; capabilities and parameters are changed
        through the service.
    :ivar outgoing: the source's side, and :ivar incoming: the destination's, to look at.
    """

    def __init__(
        self, machine: Machine, *, start_paused: bool = False, snapshot_dir: Path | None = None
    ) -> None:
        self.machine = machine
        self.settings = Settings(start_paused=start_paused)
        self._listeners = Listeners()
        self.snapshots = Snapshots(machine, self._listeners.emit, snapshot_dir)
        self._session = Session(self._listeners, self.snapshots)
        self._files = FileMigrations(self._session, self.settings, self.snapshots)
        self.outgoing = OutgoingSide(machine, self._session, self.settings, self._files)
        self.incoming = IncomingSide(machine, self._session, self.settings, self._files)
        self._dirty_rate = DirtyRate(machine.ram)

    # -- settings -------------------------------------------------------------

    @property
    def policy(self) -> object | None:
        """See :class:`Settings`."""
        return self.settings.policy

    @policy.setter
    def policy(self, policy: object | None) -> None:
        self.settings.policy = policy

    @property
    def fds(self) -> FdLookup | None:
        """See :class:`Settings`."""
        return self.settings.fds

    @fds.setter
    def fds(self, look_up: FdLookup | None) -> None:
        self.settings.fds = look_up

    def capabilities(self) -> dict[str, bool]:
        """Every capability on offer and whether it is on."""
        return dict(self.settings.capabilities)

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """:raises MigrationError: unknown or not offered, or a migration is running. Nothing
        changed."""
        with self._session.lock:
            if not self.incoming.is_waiting:  # one who only listens has not begun
                self._session.refuse_while_running("change capabilities")
            self.settings.change_capabilities(changes)

    def parameters(self) -> dict[str, object]:
        """Every parameter and its value."""
        return dict(self.settings.parameters)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Takes effect at once, also in a running migration.

        :raises MigrationError: unknown, of another type, out of range. Nothing changed.
        """
        with self._session.lock:
            self.settings.change_parameters(changes)
            migration = self.outgoing.migration
        if migration is not None:
            migration.settings_changed()

    def query_memdev(self) -> list[dict[str, object]]:
        """``query-memdev``: what each RAM block is made of and on which NUMA nodes it lies."""
        return memdevs(self.machine.ram)

    def add_listener(self, callback: EventListener) -> None:
        """``callback(name, data)`` for MIGRATION, MIGRATION_PASS, STOP and RESUME, from any
        thread."""
        self._listeners.add(callback)

    # -- beginning ------------------------------------------------------------

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        """``migrate``, see :meth:`OutgoingSide.migrate` and :meth:`OutgoingSide.resume`; returns
        when the connection stands."""
        if resume:
            self.outgoing.resume(uri)
        else:
            self.outgoing.migrate(uri)

    def migrate_over(self, source: object) -> None:
        """Over functions of the user's, see :meth:`OutgoingSide.migrate_over`."""
        self.outgoing.migrate_over(source)

    def migrate_incoming(self, uri: str) -> str:
        """``migrate-incoming``; returns the URI listened on. See :meth:`IncomingSide.listen`."""
        return self.incoming.listen(uri)

    def migrate_incoming_over(self, source: object) -> None:
        """Over functions of the user's, see :meth:`IncomingSide.read_from`."""
        self.incoming.read_from(source)

    def recover(self, uri: str) -> str:
        """``migrate-recover``; returns the URI listened on. See :meth:`IncomingSide.recover`."""
        return self.incoming.recover(uri)

    # -- steering -------------------------------------------------------------

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``, see :meth:`OutgoingSide.start_postcopy`."""
        self.outgoing.start_postcopy()

    def continue_(self, state: str) -> None:
        """``migrate-continue``, see :meth:`OutgoingSide.continue_`."""
        self.outgoing.continue_(state)

    def cancel(self) -> None:
        """``migrate_cancel``: no effect without a migration.

        On the destination it ends the waiting for a source, and for the word that is still missing
        of one that kept its guest.

        :raises MigrationError: the guest was already given to the destination. A precopy that waits
            for its answer then stops waiting: the answer may never come.
        """
        self.incoming.stop_waiting()
        if not self._files.cancel():
            self.incoming.cancel()
            self.outgoing.cancel()

    def take_back(self, *, not_running_elsewhere: bool) -> None:
        """``x-take-back``, see :meth:`OutgoingSide.take_back`."""
        self.outgoing.take_back(not_running_elsewhere=not_running_elsewhere)

    def pause(self) -> None:
        """``migrate-pause``: cut the channel of a postcopy migration, so that both sides pause. A
        recovery under way is given up.

        :raises MigrationError: no migration is in postcopy.
        """
        with self._session.lock:
            status = self._session.status
            if status not in _CAN_PAUSE:
                raise MigrationError(
                    "migrate-pause is currently only supported during postcopy-active or "
                    f"postcopy-recover state, not '{status.value}'"
                )
            if self.incoming.stop_waiting():  # a recovery nobody has come for yet
                return
            side = self.outgoing.migration or self.incoming.migration
        if side is not None:
            side.pause()

    def yank(self) -> None:
        """``yank``: cut the connection in whatever state: a precopy fails and its guest goes on, a
        postcopy pauses. No effect without a migration."""
        with self._session.lock:
            self.incoming.stop_waiting()
            side = self.outgoing.migration or self.incoming.migration
            if side is None or not self._session.is_running:
                return
        side.pause()

    # -- the guest ------------------------------------------------------------

    def cont(self) -> None:
        """Let the guest run. :raises MigrationError: it is not here (any more)."""
        with self._session.lock:
            state = self.machine.run_state
            if state == "running":
                return
            if self.snapshots.is_busy:
                raise MigrationError("a snapshot is being saved or loaded: 'cont' after it")
            if state in ("inmigrate", "finish-migrate", BROKEN):
                raise MigrationError(f"the guest cannot run in state '{state}'")
            if self.outgoing.has_given_guest:
                raise MigrationError("the guest runs at the destination: two of it must never run")
            self.machine.start()
        self._listeners.emit("RESUME", {})

    def stop_guest(self) -> None:
        """Stop the guest; never waits for a missing page."""
        with self._session.lock:
            did_run = self.snapshots.stop_guest()
        if did_run:
            self._listeners.emit("STOP", {})

    # -- snapshots ------------------------------------------------------------

    def savevm(self, name: str) -> None:
        """Save the machine as ``NAME`` or ``file:PATH[,offset=N]``, in the mapped-ram layout with
        that capability; returns when it is on disk. The guest stands still for a part of that.

        :raises MigrationError: see :meth:`Snapshots.save`; the guest goes on.
        """
        with self._session.no_migration("save a snapshot"):
            self.snapshots.save(name, is_mapped=self.settings.capabilities["mapped-ram"])

    def loadvm(self, name: str) -> None:
        """Replace the machine by a snapshot. :raises MigrationError: see :meth:`Snapshots.load`."""
        with self._session.no_migration("load a snapshot"):
            self._session.clear()  # what a failed migration left may still watch RAM
            self.snapshots.load(name, start_paused=self.settings.start_paused)

    def delvm(self, name: str) -> None:
        """Delete a named snapshot. :raises MigrationError: there is none."""
        self.snapshots.delete(name)

    def list_snapshots(self) -> list[dict[str, object]]:
        """The named snapshots, see :meth:`SnapshotInfo.as_json`."""
        return [info.as_json() for info in self.snapshots.list()]

    # -- looking --------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """A migration is under way, waited for or paused."""
        return self._session.is_running

    def query(self) -> dict[str, object]:
        """``query-migrate``: QEMU's fields, ours under ``x-postcopy``. ``{}`` before the first
        one, unless a device blocks it."""
        blockers = self.machine.registry.blockers()
        reasons = [f"device {name} cannot be migrated" for name in blockers]
        blocked: dict[str, object] = {"blocked-reasons": reasons} if reasons else {}
        with self._session.lock:
            if self._session.report is None:
                return blocked
            info = describe(
                self._session.report,
                self.outgoing.migration,
                self.incoming.migration,
                self.parameters(),
                self._session.pressure(),
            )
            return info | blocked

    def calc_dirty_rate(self, calc_time_ms: int, sample_pages: int | None = None) -> None:
        """``calc-dirty-rate`` by sampling pages; returns at once.

        :raises MigrationError: one is measured already, the guest does not run here, pages are
            missing, or a value is out of range.
        """
        with self._session.lock:
            if self.machine.run_state != "running":
                raise MigrationError("the guest does not run here: there is nothing to measure")
            migration = self.incoming.migration
            if migration is not None and migration.holds_missing_pages:
                raise MigrationError("pages are still missing: measure once the migration is over")
            self._dirty_rate.start(calc_time_ms, sample_pages or SAMPLE_PAGES)

    def query_dirty_rate(self, unit: str = "second") -> dict[str, object]:
        """``query-dirty-rate``, see :meth:`DirtyRate.query`."""
        return self._dirty_rate.query(unit)

    def wait(self, timeout_s: float | None = None) -> str:
        """Sleep until the migration has ended, all of it cleaned up, or paused; the status then.
        Listeners have heard of it before. Not to be called by one."""
        return self._session.wait(timeout_s).value

    # -- the end --------------------------------------------------------------

    def close(self) -> None:
        """End everything: cancel, stop the guest, join the threads. Never waits for a missing page;
        pages that are missing are poisoned, so nobody reads zeros in their place."""
        with self._session.lock:
            if self._session.is_closed:
                return
            self._session.is_closed = True
        # What begins from here on sees that and ends by itself.
        self.snapshots.close()
        self._dirty_rate.close()
        self.incoming.stop_waiting()
        self.outgoing.end()
        self.incoming.end()
        self._session.clear()
