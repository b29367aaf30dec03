"""Incoming migrations of one machine: waited for, begun, and gone on with after a pause."""

from __future__ import annotations

from migration.engine.states import Status, StatusInput
from uffd.threads import NamedThread

from ..channel import Channel
from ..channel_bridge import bridge
from ..errors import MigrationError
from ..machine import Machine, uuid_of
from ..report import Report
from ..service_options import ONE_CHANNEL, incoming_options
from ..session import Session
from ..settings import Settings
from ..snapshots.migrate import FileMigrations
from ..transport import Listener, is_multi_channel
from .gather import ChannelsError, gather
from .incoming import IncomingMigration

_RECOVERING = frozenset({Status.POSTCOPY_RECOVER_SETUP, Status.POSTCOPY_RECOVER})


class IncomingSide:
    """The destination. Any thread; fields change under the session's lock.

    :ivar migration: the one under way, or the last one until something else begins; None: none.
    :ivar is_waiting: for a source; none has come yet.
    """

    def __init__(
        self, machine: Machine, session: Session, settings: Settings, files: FileMigrations
    ) -> None:
        self.migration: IncomingMigration | None = None
        self.is_waiting = False
        self._listener: Listener | None = None  # while a thread waits at it
        self._machine = machine
        self._session = session
        self._settings = settings
        self._files = files

    # -- waiting for a source -------------------------------------------------

    def listen(self, uri: str) -> str:
        """Wait for a source; returns the URI listened on (with the port the kernel chose, if it
        did).

        :raises MigrationError: the machine already has a guest, or the address cannot be had.
        """
        with self._session.lock:
            self._refuse_now()
            if self._settings.capabilities["mapped-ram"]:
                self._files.begin_incoming(uri)
                return uri
            if self._settings.capabilities["multifd"] and not is_multi_channel(uri):
                raise MigrationError(ONE_CHANNEL)
            self._session.clear()
            listener = self._listener = Listener(uri, fds=self._settings.fds)
            self.is_waiting = True
            report = self._session.begin()
            self._session.start(lambda: self._run(listener, report), "incoming-main")
            return listener.uri

    def read_from(self, source: object) -> None:
        """Like :meth:`listen`, over functions of the user's: read by ``get_buffer``, answered on
        its return path if it has one. Returns at once.

        Pages that come this way need the GIL, so it is no way for a postcopy: somebody may sleep
        on a missing page with the GIL in hand.

        :raises MigrationError: as there, or capability ``postcopy-ram`` is on.
        :raises TypeError, ValueError: not a channel.
        """
        with self._session.lock:
            self._refuse_now()
            if self._settings.capabilities["postcopy-ram"]:
                raise MigrationError("postcopy needs a descriptor, Python functions are too late")
            if self._settings.capabilities["multifd"]:
                raise MigrationError(ONE_CHANNEL)
            self._session.clear()
            channel = bridge(source, writes=False)
            report = self._session.begin()
            self._session.start(lambda: self._serve(channel, report, None), "incoming-main")

    def _refuse_now(self) -> None:
        self._session.refuse_while_running("start an incoming migration")
        if self._machine.run_state != "inmigrate":
            raise MigrationError("this machine does not wait for an incoming migration")

    def _run(self, listener: Listener, report: Report) -> None:
        try:
            channel, multifd = self._accept(listener)
        except (MigrationError, OSError) as error:
            listener.close()
            # Last, and without the lock: who hears it may start anew at once and joins this thread.
            if isinstance(error, ChannelsError | OSError):
                report.advance(StatusInput.FAIL, error=str(error))
            elif report.try_advance(StatusInput.CANCEL):
                report.advance(StatusInput.CANCELLED)
            return
        preempt = self._settings.capabilities["postcopy-preempt"]
        if not preempt:
            listener.close()
        self._serve(channel, report, listener if preempt else None, multifd)

    def _accept(self, listener: Listener) -> tuple[Channel, tuple[Channel, ...]]:
        """A source's main channel and those of multifd.

        :raises ChannelsError: a source, but not one of these.
        :raises MigrationError: told to stop waiting. :raises OSError: no way to wait.
        """
        try:
            channel = listener.accept()
            with self._session.lock:  # until now capabilities may be changed
                self.is_waiting = False
                multifd = self._settings.capabilities["multifd"]
            return self._gather(listener, channel) if multifd else (channel, ())
        finally:
            self._nobody_waits()

    def _gather(self, listener: Listener, first: Channel) -> tuple[Channel, tuple[Channel, ...]]:
        """All connections of a multifd source. :raises MigrationError: see :func:`gather`."""
        if not is_multi_channel(listener.uri):
            first.close()
            raise ChannelsError(ONE_CHANNEL)
        count = self._settings.number("multifd-channels")
        return gather(listener, first, count, vm=uuid_of(self._machine))

    def _nobody_waits(self) -> None:
        """Before the listener is closed or goes to a migration: nobody wakes it any more."""
        with self._session.lock:
            self._listener = None
            self.is_waiting = False

    def stop_waiting(self) -> bool:
        """Who waits for a source gives up. False: nobody does."""
        with self._session.lock:
            if self._listener is None:
                return False
            self._listener.wake()
            return True

    # -- a migration ----------------------------------------------------------

    def _serve(
        self,
        channel: Channel,
        report: Report,
        listener: Listener | None,
        multifd: tuple[Channel, ...] = (),
    ) -> None:
        migration: IncomingMigration | None = None
        try:
            options = incoming_options(self._settings, self._machine, channel, listener, multifd)
            self._session.watch_pressure(report)
            with self._session.lock:
                migration = IncomingMigration(self._machine, channel, options, report)
                self.migration = migration
                self._session.when_cleared(self._close)
                if self._session.is_closed:  # who closed us meanwhile saw nothing here to end
                    migration.abandon()
            migration.run()
        except Exception as error:
            # A hook of a device or of the user's may raise anything; the report tells it.
            report.fail(error)
            if migration is None:
                for each in (channel, *multifd):
                    each.close()
                if listener is not None:
                    listener.close()

    def _close(self) -> None:
        with self._session.lock:
            migration, self.migration = self.migration, None
        if migration is not None:
            migration.close()

    def cancel(self) -> None:
        """No longer wait for the word of a source that kept its guest."""
        migration = self.migration
        if migration is not None:
            migration.cancel()

    def end(self) -> None:
        """The service is closed: give up, with the guest stopped; the threads end."""
        migration = self.migration
        if migration is not None:
            self._machine.stop()
            migration.abandon()

    # -- recovering -----------------------------------------------------------

    def recover(self, uri: str) -> str:
        """A paused postcopy waits here for its source; the URI.

        :raises MigrationError: nothing is paused here, or the address cannot be had.
        """
        with self._session.lock:
            migration, status = self.migration, self._session.status
            if migration is not None and status in _RECOVERING:
                raise MigrationError(
                    "Migrate recovery is triggered already; 'migrate-pause' gives it up"
                )
            if migration is None or status is not Status.POSTCOPY_PAUSED:
                raise MigrationError("Migrate recover can only be run when postcopy is paused.")
            listener = self._listener = Listener(uri, fds=self._settings.fds)
            migration.report.advance(StatusInput.RECOVER)
        NamedThread(
            target=self._accept_recovery,
            args=(listener, migration),
            name="incoming-recover",
            daemon=True,
        ).start()
        return listener.uri

    def _accept_recovery(self, listener: Listener, migration: IncomingMigration) -> None:
        try:
            channel = listener.accept()
        except (MigrationError, OSError) as error:
            self._nobody_waits()
            listener.close()
            # Last: who hears it may wait anew at once, at the same place.
            migration.report.try_advance(StatusInput.LOST_CHANNEL, error=str(error))
            return
        preempt = self._settings.capabilities["postcopy-preempt"]
        with self._session.lock:
            self._nobody_waits()
            is_wanted = self.migration is migration  # it was not closed meanwhile
            if is_wanted:
                migration.recover(channel, listener if preempt else None)
        if not is_wanted:
            channel.close()
        if not (is_wanted and preempt):
            listener.close()
