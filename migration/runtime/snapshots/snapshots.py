"""``savevm``, ``loadvm`` and ``delvm``: snapshots of the whole machine, by name or in a file.

A snapshot is a migration stream at rest (see ``docs/snapshots.md``). Saving never costs the guest:
whatever fails, it goes on and nothing half stays behind. Loading compares before it touches; if it
fails after that, the machine stays stopped in run state ``internal-error`` until another one is
loaded.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from migration.wire.errors import StreamError

from ..errors import MigrationError
from ..machine import Machine
from ..report import EventListener
from . import manifest as manifests
from .files import (
    Location,
    NewFile,
    SnapshotError,
    copy_front,
    is_full,
    locate,
    locked,
    no_room,
    open_stream,
    write_at,
)
from .list import SnapshotInfo, delete, list_directory
from .load import SnapshotReader
from .manifest import Manifest
from .mapped import CAPABILITY
from .save import SnapshotWriter

BROKEN = "internal-error"
"""Run state of a machine that was half loaded. It must not run, be saved or be migrated."""
GUEST_IS_NOT_HERE = frozenset({"inmigrate", "postmigrate", "finish-migrate", BROKEN})
_PLAIN = "stream"
# What only the machine that saved it was in; whoever loads it has a guest that was stopped.
_AS_PAUSED = frozenset(
    {"inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo", BROKEN}
)


class _Work(Protocol):
    """A save or load under way."""

    def give_up(self) -> None: ...


class Snapshots:
    """The snapshots of one machine. One save or load at a time; any thread.

    :param directory: where named ones lie; it must exist. None: only ``file:`` is possible.
    :param emit: told of STOP and RESUME.
    """

    def __init__(self, machine: Machine, emit: EventListener, directory: Path | None) -> None:
        self.machine = machine
        self.directory = directory
        self._emit = emit
        self._claimed = threading.Lock()
        self._guest = threading.Lock()
        self._goes_on = False
        self._stays = "paused"
        self._work: _Work | None = None
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        """A save or load is under way: the guest is not anybody else's to start."""
        return self._claimed.locked()

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Only one at a time. :raises SnapshotError: it is not this one."""
        if not self._claimed.acquire(blocking=False):
            raise SnapshotError("another snapshot is being saved or loaded")
        try:
            yield
        finally:
            self._claimed.release()

    def stop_guest(self) -> bool:
        """``stop``: now, or if it stands still for a snapshot, by not starting it again.

        :returns: whether it ran until now.
        """
        with self._guest:
            self._goes_on = False
            if self._work is not None or self.machine.run_state != "running":
                return False
            self.machine.stop()
            return True

    # -- saving ---------------------------------------------------------------

    def save(
        self,
        name: str,
        *,
        is_mapped: bool = False,
        gives_away: bool = False,
        on_stopped: Callable[[], object] = lambda: None,
        before_publishing: Callable[[], object] = lambda: None,
    ) -> None:
        """Save the machine; a snapshot of that name is replaced. The guest stands still while its
        state is written, and runs while the file is synced and summed. Call within :meth:`claim`.

        :param name: ``NAME`` or ``file:PATH[,offset=N]`` (what is in front of N stays).
        :param is_mapped: QEMU's mapped-ram layout.
        :param gives_away: the guest does not go on here, unless it could not be saved.
        :param on_stopped: called once the guest stands still.
        :param before_publishing: called right before the file gets its name. Both may raise.
        :raises SnapshotError: it cannot be; nothing changed, the guest goes on.
        """
        location = locate(name, self.directory)
        if self.machine.run_state in GUEST_IS_NOT_HERE:
            raise SnapshotError(f"there is no guest to save in state '{self.machine.run_state}'")
        if blockers := self.machine.registry.blockers():
            raise SnapshotError(f"these devices cannot be saved: {', '.join(blockers)}")
        if not location.is_internal:
            _check_replaceable(location)
        try:
            self._save(location, is_mapped, gives_away, on_stopped, before_publishing)
        except (OSError, StreamError, MigrationError) as error:
            raise SnapshotError(
                f"saving snapshot {name!r}: {_why(error, location)}; nothing was saved, the guest "
                "goes on"
            ) from error

    def _save(
        self,
        location: Location,
        is_mapped: bool,
        gives_away: bool,
        on_stopped: Callable[[], object],
        before_publishing: Callable[[], object],
    ) -> None:
        layout = CAPABILITY if is_mapped else _PLAIN
        with ExitStack() as stack:
            new = NewFile(location.path)
            stack.callback(new.discard)
            if location.offset:
                copy_front(location.path, new.fd, location.offset)
            writer = SnapshotWriter(self.machine, is_mapped=is_mapped)
            standing = stack.enter_context(ExitStack())
            run_state = standing.enter_context(self._standing_still("save-vm", writer))
            on_stopped()
            manifest = manifests.survey(
                self.machine, run_state=run_state, layout=layout, offset=location.offset
            )
            writer.write(new.fd, location.offset)
            if not gives_away:
                standing.close()
            new.sync()
            manifest = manifests.measured(manifest, new.fd)
            before_publishing()
            self._publish(location, new, manifest)
            if gives_away:
                self._stay("postmigrate")

    @staticmethod
    def _publish(location: Location, new: NewFile, manifest: Manifest) -> None:
        """The stream and what describes it get their names."""
        seal = NewFile(location.manifest_path)
        try:
            write_at(seal.fd, manifest.to_json().encode(), 0)
            seal.sync()
            with locked(location.path.parent, exclusive=True) as directory_fd:
                # A new stream must not stand beside the old one's checksum, whenever we die.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(location.manifest_path)
                new.publish(directory_fd)
                # From here on it is saved; without its checksum it is only harder to check.
                with contextlib.suppress(OSError):
                    seal.publish(directory_fd)
        finally:
            seal.discard()

    @contextmanager
    def _standing_still(self, state: str, work: _Work) -> Iterator[str]:
        """The guest stopped, and afterwards what it was before, whatever happens; yields that."""
        before = self._halt(state, work, goes_on=("running",))
        self._stays = "paused" if before == "running" else before
        try:
            self.machine.note_run_state(before)
            yield before
        finally:
            self._let_go()

    def _halt(self, state: str, work: _Work, *, goes_on: tuple[str, ...]) -> str:
        """Stop the guest for ``work``; the run state it had. In which of them it is to go on."""
        with self._guest:
            before = self.machine.run_state
            self._goes_on = before in goes_on and not self._is_closed
            self._work = work
            self.machine.stop()
            self.machine.run_state = state
        if before == "running":
            self._emit("STOP", {})
        return before

    def _stay(self, state: str) -> None:
        """Whatever is under way ends with the guest stopped, in this run state."""
        with self._guest:
            self._goes_on = False
            self._stays = state

    def _let_go(self) -> None:
        """Start the guest if it is to go on."""
        with self._guest:
            self._work = None
            goes_on = self._goes_on
            if goes_on:
                self.machine.start()
            else:
                self.machine.run_state = self._stays
        if goes_on:
            self._emit("RESUME", {})

    # -- loading --------------------------------------------------------------

    def load(self, name: str, *, start_paused: bool = False, needs_mapped: bool = False) -> None:
        """Replace the machine's state. Call within :meth:`claim`; no migration holds its RAM.

        The guest runs afterwards if it ran when it was saved and this machine ran now (or was
        waiting for a guest, and not with ``-S``); otherwise ``cont`` starts it.

        :raises SnapshotError: damaged, or not for this machine. Found before anything changed, the
            guest goes on; after that the machine is left in ``internal-error``. The text says it.
        """
        location = locate(name, self.directory)
        fd, manifest = self._open(location)
        try:
            reader = SnapshotReader(self.machine, fd, offset=location.offset, label=location.label)
            try:
                self._check(location, manifest, fd, reader)
                if needs_mapped and not reader.is_mapped:
                    raise SnapshotError(f"{name} is a plain stream, and mapped-ram is on here")
                self._load(location, reader, start_paused=start_paused)
            finally:
                reader.close()
        finally:
            os.close(fd)

    @staticmethod
    def _open(location: Location) -> tuple[int, Manifest | None]:
        try:
            # Both of one save: nobody replaces one of them meanwhile.
            with locked(location.path.parent, exclusive=False):
                fd = open_stream(location)
                try:
                    return fd, manifests.read(location.manifest_path)
                except BaseException:
                    os.close(fd)
                    raise
        except OSError as error:
            raise SnapshotError(f"snapshot {location.label!r}: {error.strerror}") from None

    def _check(
        self, location: Location, manifest: Manifest | None, fd: int, reader: SnapshotReader
    ) -> None:
        """Everything that can be known before the guest is touched."""
        try:
            if manifest is not None:
                if manifest.offset != location.offset:
                    raise SnapshotError(
                        f"{location.path} has its snapshot at offset {manifest.offset}, "
                        f"not {location.offset}"
                    )
                manifests.check_machine(manifest, self.machine, location.label)
                manifests.verify(manifest, fd, offset=location.offset, label=location.label)
            reader.prepare()
        except Exception as error:
            text = f"snapshot {location.label!r} was not loaded: {error}; nothing has changed"
            raise SnapshotError(text) from error

    def _load(self, location: Location, reader: SnapshotReader, *, start_paused: bool) -> None:
        goes_on = ("running",) if start_paused else ("running", "inmigrate")
        # A machine without a guest stays what it is until it has one.
        is_empty = self.machine.run_state == "inmigrate"
        self._halt("inmigrate" if is_empty else "restore-vm", reader, goes_on=goes_on)
        try:
            reader.load()
        except Exception as error:
            self._stay("inmigrate" if is_empty else BROKEN)
            self._let_go()
            raise SnapshotError(
                f"loading snapshot {location.label!r} failed: {error}; the machine is neither what "
                "it was nor what it should become, and stays stopped: load another snapshot, or "
                "quit"
            ) from error
        state = reader.run_state or "running"
        self._stays = "paused"
        if state != "running":
            self._stay("paused" if state in _AS_PAUSED else state)
        self._let_go()

    # -- the directory --------------------------------------------------------

    def delete(self, name: str) -> None:
        """Delete a named snapshot. :raises SnapshotError: there is none, or it is a ``file:``."""
        delete(locate(name, self.directory))

    def list(self) -> list[SnapshotInfo]:
        """The named snapshots, by name. :raises SnapshotError: the directory cannot be read."""
        return [] if self.directory is None else list_directory(self.directory)

    # -- the end --------------------------------------------------------------

    def close(self) -> None:
        """Give up what is under way and wait for it; the guest is not started any more."""
        with self._guest:
            self._is_closed = True
            self._goes_on = False
        self.give_up()
        with self._claimed:
            pass

    def give_up(self) -> None:
        """Any thread: what is under way fails soon, unless it is nearly done."""
        with self._guest:
            work = self._work
        if work is not None:
            work.give_up()


def _check_replaceable(location: Location) -> None:
    """The files of that name are ours to replace. :raises SnapshotError: they are not."""
    path = location.path
    if path.exists() and not path.is_file():
        raise SnapshotError(f"{path} is no regular file: use migrate file: or exec: for that")
    if path.is_symlink():
        raise SnapshotError(f"{path} is a symbolic link: name the file itself")
    manifests.read(location.manifest_path)


def _why(error: Exception, location: Location) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if cause is not None and is_full(cause.errno or 0):
        return no_room(location.path)
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
