"""``migrate`` and ``migrate-incoming`` with capability ``mapped-ram``: the guest goes into a file,
or comes out of one.

The guest stands still while it is written: a page has one place in the file, and writing it while
it changes would only write it twice. The file appears whole or not at all, as a snapshot does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from migration.engine.states import StatusInput

from ..errors import MigrationError
from ..report import Report
from ..session import Session
from ..settings import Settings
from .snapshots import Snapshots

NEEDS_FILE = "Migration with mapped-ram requires a seekable transport: file:PATH[,offset=N]"


def require_file(uri: str) -> None:
    """:raises MigrationError: ``uri`` is no file."""
    if not uri.startswith("file:"):
        raise MigrationError(f"{NEEDS_FILE}, not {uri}")


class FileMigration:
    """One migration into or out of a file, for a thread of its own.

    :param report: in status SETUP.
    """

    def __init__(self, snapshots: Snapshots, uri: str, report: Report) -> None:
        """:raises MigrationError: not a file, or a snapshot is under way."""
        require_file(uri)
        self._snapshots = snapshots
        self._uri = uri
        self._report = report
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._is_committed = False

    def run_outgoing(self) -> None:
        """Write the guest away; it stays here, stopped, if that fails it goes on."""
        self._run(self._write)

    def run_incoming(self, *, start_paused: bool) -> None:
        """Take the guest in. A half taken one is none, so this is not cancelled."""
        self._is_committed = True
        self._run(lambda: self._read(start_paused))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            with self._snapshots.claim():
                self._report.advance(StatusInput.READY)
                work()
                self._report.advance(StatusInput.DONE)
        except Exception as error:
            kind = StatusInput.CANCELLED if self._is_cancelled else StatusInput.FAIL
            self._report.try_advance(
                kind, error=None if self._is_cancelled else str(error) or repr(error)
            )

    def _write(self) -> None:
        self._snapshots.save(
            self._uri,
            is_mapped=True,
            gives_away=True,
            on_stopped=lambda: self._report.advance(StatusInput.GUEST_STOPPED),
            before_publishing=self._commit,
        )

    def _commit(self) -> None:
        """From here on the file has the guest."""
        with self._lock:
            if self._is_cancelled:
                raise MigrationError("the migration was cancelled")
            self._is_committed = True

    def _read(self, start_paused: bool) -> None:
        self._snapshots.load(self._uri, start_paused=start_paused, needs_mapped=True)

    def cancel(self) -> bool:
        """Any thread: give up if it is not too late. False: it is, or it has ended."""
        with self._lock:
            if self._is_committed or not self._report.try_advance(StatusInput.CANCEL):
                return False
            self._is_cancelled = True
        self._snapshots.give_up()
        return True


class FileMigrations:
    """Begins them, one at a time. To be called with the session's lock, but for :meth:`cancel`."""

    def __init__(self, session: Session, settings: Settings, snapshots: Snapshots) -> None:
        self._session = session
        self._settings = settings
        self._snapshots = snapshots
        self._migration: FileMigration | None = None

    def begin_outgoing(self, uri: str) -> None:
        """The guest goes into a file. :raises MigrationError: ``uri`` is none."""
        self._session.start(self._begin(uri).run_outgoing, "outgoing-migration")

    def begin_incoming(self, uri: str) -> None:
        """The guest comes out of a file. :raises MigrationError: ``uri`` is none."""
        migration = self._begin(uri)
        self._session.start(
            lambda: migration.run_incoming(start_paused=self._settings.start_paused),
            "incoming-main",
        )

    def _begin(self, uri: str) -> FileMigration:
        require_file(uri)
        self._session.clear()
        self._migration = FileMigration(self._snapshots, uri, self._session.begin())
        self._session.when_cleared(self._forget)
        return self._migration

    def _forget(self) -> None:
        self._migration = None

    def cancel(self) -> bool:
        """Any thread: give up if it is not too late. False: it is, or there is none."""
        migration = self._migration
        return migration is not None and migration.cancel()
