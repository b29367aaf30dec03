"""Outgoing migrations of one machine: begun, gone on with after a pause, and steered."""

from __future__ import annotations

from collections.abc import Callable

from migration.engine.states import RESTING, Status, StatusInput

from ..channel import Channel
from ..channel_bridge import bridge
from ..errors import MigrationError
from ..machine import Machine
from ..service_options import ONE_CHANNEL, outgoing_options
from ..session import Session
from ..settings import Settings
from ..snapshots.migrate import FileMigrations
from ..snapshots.snapshots import GUEST_IS_NOT_HERE
from ..transport import connect, is_multi_channel
from .outgoing import OutgoingMigration

NOT_PAUSED = "Cannot resume if there is no paused migration"
_GUEST_IS_ELSEWHERE = frozenset(
    {
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER_SETUP,
        Status.POSTCOPY_RECOVER,
    }
)


class OutgoingSide:
    """The source. Any thread; fields change under the session's lock.

    :ivar migration: the one under way, or the last one until something else begins; None: none.
    """

    def __init__(
        self, machine: Machine, session: Session, settings: Settings, files: FileMigrations
    ) -> None:
        self.migration: OutgoingMigration | None = None
        self._machine = machine
        self._session = session
        self._settings = settings
        self._files = files

    @property
    def has_given_guest(self) -> bool:
        """It runs at the destination, or may."""
        migration = self.migration
        return migration is not None and migration.report.status in _GUEST_IS_ELSEWHERE

    # -- beginning ------------------------------------------------------------

    def migrate(self, uri: str) -> None:
        """Connect and start; returns when the connection stands.

        :raises MigrationError: a migration is running, the guest is not here, nobody listens, ...
        """
        self._migrate(uri, lambda: self._connect(uri))

    def migrate_over(self, source: object) -> None:
        """Like :meth:`migrate`, over three functions of the user's (see
        :func:`migration.runtime.channel_ops.channel_ops`): written by ``put_buffer``, answered on
        its return path if it has one. Without one there is no postcopy.

        :raises MigrationError: as :meth:`migrate`. :raises TypeError, ValueError: not a channel.
        """
        self._migrate("put_buffer", lambda: bridge(source, writes=True))

    def _connect(self, uri: str) -> Channel:
        return connect(uri, fds=self._settings.fds)

    def _migrate(self, uri: str, open_channel: Callable[[], Channel]) -> None:
        with self._session.lock:
            self._refuse_now()
            if self._settings.capabilities["mapped-ram"]:
                self._files.begin_outgoing(uri)
                return
            if self._settings.capabilities["multifd"] and not is_multi_channel(uri):
                raise MigrationError(ONE_CHANNEL)
            self._session.is_connecting = True
        try:
            self._session.clear()
            channel = open_channel()  # may take seconds: nobody waits for the lock
            with self._session.lock:
                self._session.refuse_when_closed(channel)
                self._begin(uri, channel)
        finally:
            self._session.is_connecting = False

    def _refuse_now(self) -> None:
        self._session.refuse_while_running("start another migration")
        if self._session.is_connecting:
            raise MigrationError("another migration is connecting")
        if self._machine.run_state in GUEST_IS_NOT_HERE:
            raise MigrationError(
                f"the guest cannot be migrated in run state '{self._machine.run_state}'"
            )
        if blockers := self._machine.registry.blockers():
            raise MigrationError(f"these devices cannot be migrated: {', '.join(blockers)}")
        if self._settings.parameters["mode"] == "cpr-transfer":
            for name in ("postcopy-ram", "mapped-ram"):
                if self._settings.capabilities[name]:
                    raise MigrationError(f"mode cpr-transfer is not compatible with {name}")

    def _begin(self, uri: str, channel: Channel) -> None:
        report = self._session.begin()
        self._session.watch_pressure(report)
        try:
            options = outgoing_options(self._settings, uri, channel, lambda: self._connect(uri))
            migration = OutgoingMigration(self._machine, channel, options, report)
        except BaseException as error:
            channel.close()
            report.advance(StatusInput.FAIL, error=str(error))
            raise
        self.migration = migration
        self._session.when_cleared(self._close)
        self._session.start(lambda: _run(migration, migration.run), "outgoing-migration")

    def _close(self) -> None:
        with self._session.lock:
            migration, self.migration = self.migration, None
        if migration is not None:
            migration.close()

    # -- going on -------------------------------------------------------------

    def resume(self, uri: str) -> None:
        """A paused postcopy goes on over a new channel.

        :raises MigrationError: there is none, it cannot, or nobody listens.
        """
        with self._session.lock:
            migration = self.migration
            if migration is None or migration.report.status is not Status.POSTCOPY_PAUSED:
                raise MigrationError(NOT_PAUSED)
            migration.require_resumable()
            if self._session.is_connecting:
                raise MigrationError("another migration is connecting")
            self._session.is_connecting = True
        try:
            channel = self._connect(uri)
            self._session.join()
            with self._session.lock:
                self._session.refuse_when_closed(channel)
                self._go_on(migration, channel, uri)
        finally:
            self._session.is_connecting = False

    def _go_on(self, migration: OutgoingMigration, channel: Channel, uri: str) -> None:
        if migration.report.status is not Status.POSTCOPY_PAUSED:
            channel.close()  # the thread just joined was that of another command like this
            raise MigrationError(NOT_PAUSED)
        migration.channels.connect_urgent_at(lambda: self._connect(uri))
        migration.channels.announce(channel)  # who pauses or closes from here on cuts it, too
        self._session.start(
            lambda: _run(migration, lambda: migration.resume(channel)), "outgoing-migration"
        )

    # -- steering -------------------------------------------------------------

    def start_postcopy(self) -> None:
        """At the next chance. During set-up, twice or after the end it does no harm.

        :raises MigrationError: capability ``postcopy-ram`` is off, or this machine never was a
            source: what QEMU refuses as well.
        """
        with self._session.lock:
            if not self._settings.capabilities["postcopy-ram"]:
                raise MigrationError(
                    "enable postcopy with migrate-set-capabilities before the start of migration"
                )
            migration = self.migration
            if migration is None:
                raise MigrationError("postcopy must be started after migration has been started")
        migration.start_postcopy()

    def continue_(self, state: str) -> None:
        """:raises MigrationError: the migration does not wait in ``state``."""
        with self._session.lock:
            migration, status = self.migration, self._session.status
            if (
                migration is None
                or status is not Status.PRE_SWITCHOVER
                or state != "pre-switchover"
            ):
                raise MigrationError(f"Migration not in expected state: {status.value}")
        migration.continue_()

    def cancel(self) -> None:
        """No effect without a migration.

        :raises MigrationError: the guest was already given away.
        """
        migration = self.migration
        if migration is None or migration.report.status in RESTING or migration.cancel():
            return
        if migration.stop_waiting():
            raise MigrationError(
                "the guest was already given to the destination: too late to cancel; not waiting "
                "any longer for its answer"
            )
        if migration.is_committed() and migration.report.status not in RESTING:
            raise MigrationError("the guest already runs at the destination: too late to cancel")

    def take_back(self, *, not_running_elsewhere: bool) -> None:
        """Run the guest of a failed precopy here again, whose last word was lost.

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
        with self._session.lock:
            if self.migration is None:
                raise MigrationError("there is no guest to take back: none was given away here")
            self.migration.take_back()

    def end(self) -> None:
        """The service is closed: give up; the thread ends."""
        migration = self.migration
        if migration is not None:
            migration.cancel()
            migration.pause()


def _run(migration: OutgoingMigration, part: Callable[[], None]) -> None:
    """The migration thread."""
    try:
        part()
    except Exception as error:
        migration.report.fail(error)
