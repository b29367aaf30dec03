"""``postcopy unpark``: a directory becomes a running guest again, at once, pages following.

We are the source of a postcopy that begins with everything discarded: the device state goes out as
the package, RAM is mapped from the files, requested pages first, the rest behind. Zero pages are
neither on the disk nor on the wire, unless they are asked for.

Whatever breaks after the package, the files still hold all of RAM: any later process can take the
migration up again (``--resume``), as long as the destination waits in postcopy-paused.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from migration.engine.states import Status, StatusInput
from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.options import OutgoingOptions
from migration.runtime.report import EventListener, Report
from migration.runtime.source.outgoing import OutgoingMigration
from migration.wire.extension import Feature
from migration.wire.headers import Configuration

from .manifest import (
    Manifest,
    ParkedState,
    ParkError,
    change_state,
    count_clone,
    hold_guest,
    load_settled,
)
from .parked_machine import ParkedMachine
from .store import checksum
from .working_set import Prefetch, RequestLog

_FEATURES = Feature.CHECKSUM | Feature.SPLIT_RUN | Feature.COUNTED


@dataclass(frozen=True, slots=True)
class GiveOptions:
    """What the user decides.

    :ivar page_sizes: host page size of the destination per block, bytes; others have target pages.
    :ivar is_clone: give a copy; the parked VM stays as it is.
    :ivar force: also from a state that is not certain, and clones with writable disks.
    :ivar resume: an earlier unpark broke after its commit point; go on with it.
    :ivar on_demand_only_s: how long only requested pages are sent.
    :ivar record: file for the requests as they came. :ivar prefetch: such a file, pushed first.
    :ivar verify: check the checksums of RAM before anything is sent.
    :ivar connect_urgent: opens a preempt channel, for a destination with that capability.
    :ivar urgent_first: which it opens and ends as a QEMU of 7.2 needs it.
    :ivar ask: the destination's status of its migration, from its monitor, once it is settled;
        None: it says nothing.
    """

    page_sizes: Mapping[str, int]
    is_clone: bool = False
    force: bool = False
    resume: bool = False
    on_demand_only_s: float = 0.0
    record: Path | None = None
    prefetch: Path | None = None
    verify: bool = False
    in_flight_bytes: int = 64 << 10
    connect_urgent: Callable[[], Channel] | None = None
    urgent_first: bool = False
    ask: Callable[[], str | None] = lambda: None


class Giving:
    """One unpark. :meth:`run` returns when the destination has everything.

    :ivar record_error: why the record of requests could not be written; the guest was given.
    """

    def __init__(self, directory: Path, options: GiveOptions, listener: EventListener) -> None:
        """:raises ParkError: the VM may not be given (any more), or is damaged; or an option cannot
        be followed."""
        self.directory = directory
        self.options = options
        with ExitStack() as stack:
            if not options.is_clone:
                stack.callback(os.close, hold_guest(directory))
            self.manifest = load_settled(directory)
            refuse_unless_allowed(directory, self.manifest, options)
            self.machine = ParkedMachine(directory, self.manifest, options.page_sizes)
            stack.callback(self.machine.close)
            # Found wrong later, these would cost the destination its life: it waits only once.
            self._prefetch = (
                Prefetch.load(options.prefetch, self.machine.ram) if options.prefetch else None
            )
            if options.record:
                _require_writable(options.record)
            self._stack = stack.pop_all()
        start = Status.POSTCOPY_PAUSED if options.resume else Status.NONE
        self.report = Report(listener, start)
        self.migration: OutgoingMigration | None = None
        self.record_error: OSError | None = None
        self._log: RequestLog | None = None
        self._parameters: dict[str, int] = {}
        self._stopped = False

    @property
    def until_running_ms(self) -> float:
        """From the start until the destination had all it needs to run the guest."""
        moved = self.report.guest_moved_ns or self.report.started_ns
        return (moved - self.report.started_ns) / 1e6

    def run(self, channel: Channel) -> None:
        """Give it over this channel, which is closed at the end.

        :raises ParkError: a file is damaged.
        :raises MigrationError: it failed, or broke; the message and the manifest say who has the
            guest.
        """
        try:
            if self.options.verify:
                self._verify()
        except BaseException:
            channel.close()
            raise
        first = _no_channel() if self.options.resume else channel
        self.migration = OutgoingMigration(
            self.machine, first, self._outgoing_options(), self.report
        )
        try:
            self._give(self.migration, channel)
        except MigrationError as error:
            if not self.migration.ask_complete(self.options.ask):
                raise MigrationError(self._explain(error)) from error
        finally:
            self._settle()
            self.migration.close()

    def stop(self) -> None:
        """Any thread: :meth:`run` ends soon; the destination keeps the guest if it may have it."""
        self._stopped = True
        if self.migration is not None and not self.migration.cancel():
            self.migration.pause()

    def _outgoing_options(self) -> OutgoingOptions:
        self._parameters = {
            "x-hold-background": int(self.options.on_demand_only_s > 0),
            "x-postcopy-sndbuf": self.options.in_flight_bytes,
        }
        vm_uuid = None if self.manifest.uuid is None else uuid.UUID(self.manifest.uuid)
        return OutgoingOptions(
            postcopy=True,
            return_path=True,
            features=_FEATURES,
            parameter=lambda name: int(self._parameters.get(name, 0)),
            configuration=Configuration(self.manifest.machine, uuid=vm_uuid),
            before_giving=self._giving,
            connect_urgent=self.options.connect_urgent,
            urgent_first=self.options.urgent_first,
        )

    def _give(self, migration: OutgoingMigration, channel: Channel) -> None:
        ram = migration.ram
        ram.nothing_sent = True
        self._log = RequestLog(ram.native) if self.options.record else None
        if self._prefetch is not None:
            self._pushed_first = self._prefetch.begin(ram.native)

        def push() -> None:
            self._parameters["x-hold-background"] = 0
            migration.settings_changed()

        timer = threading.Timer(self.options.on_demand_only_s, push)
        if self.options.on_demand_only_s:
            timer.daemon = True
            timer.start()
        try:
            if self.options.resume:
                migration.take_over(Feature(self.manifest.features))
                self._choose_pages()
                migration.resume(channel)
            else:
                self.report.started_ns = time.monotonic_ns()
                self.report.advance(StatusInput.START)
                migration.start_postcopy()
                migration.run()
        finally:
            timer.cancel()
            if timer.ident is not None:
                timer.join()

    def _verify(self) -> None:
        for block, kept in zip(self.machine.ram, self.manifest.blocks, strict=True):
            assert block.fd is not None
            if checksum(block.fd, kept.used_length) != kept.crc32c:
                raise ParkError(f"{self.directory / kept.file} is damaged: its checksum is wrong")

    def _choose_pages(self) -> None:
        """A stock destination takes what never comes for zero: it need not be told of holes."""
        assert self.migration is not None
        if Feature.COUNTED not in self.migration.features:
            self.migration.ram.push_only(self.machine.populated())

    def _giving(self) -> None:
        assert self.migration is not None
        self._choose_pages()
        if not self.options.is_clone:
            self.manifest = change_state(
                self.directory,
                ParkedState.GIVING,
                "a destination may run it",
                features=self.migration.features.value,
            )

    def note_complete(self, peer: str) -> None:
        """Instead of :meth:`run`: the destination of an earlier unpark says that it is complete."""
        if self.options.is_clone:
            self.manifest = count_clone(self.directory, f"to {peer}")
        else:
            self._enter(ParkedState.GIVEN, f"to {peer}")

    def _explain(self, error: MigrationError) -> str:
        """What broke, who has the guest, what to do."""
        assert self.migration is not None
        if self.report.status is Status.POSTCOPY_PAUSED:
            clone = "--clone " if self.options.is_clone else ""
            resume = f"postcopy unpark --resume {clone}"
            if self.migration.may_be_complete:
                return (
                    f"{error}. The destination was sent everything, only its last word is missing. "
                    f"{resume}--qmp SOCKET {self.directory} URI asks it, and goes on if it must"
                )
            return (
                f"{error}. The destination has the guest, which waits for its pages. There: "
                f"migrate_recover URI; then here: {resume}{self.directory} URI"
            )
        if self.migration.is_committed():
            return f"{error}. The guest was the destination's: look there"
        text = f"{error}. The guest is still parked in {self.directory}"
        is_early = self.report.setup_done_ns is None or self.report.guest_stopped_ns is None
        if is_early and self.migration.channel.is_two_way:
            text += (
                "; when the destination complained of page sizes, name those of its blocks: "
                "--page-size pc.ram=2M, or let --qmp find out"
            )
        return text

    def _settle(self) -> None:
        """Write down how it ended."""
        assert self.migration is not None
        if self.report.status is Status.COMPLETED:
            self.note_complete(self.migration.channel.peer)
        elif self.manifest.state is ParkedState.GIVING and self._was_refused():
            self._enter(ParkedState.PARKED, "the destination said no")
        if self._log is not None and self.options.record is not None:
            try:
                self._log.save(self.options.record, self.machine.ram)
            except OSError as error:
                self.record_error = error

    def _was_refused(self) -> bool:
        assert self.migration is not None
        ended = self.report.status in (Status.FAILED, Status.CANCELLED)
        was_first = not (self.options.resume or self.options.is_clone)
        return ended and was_first and not self.migration.is_committed()

    def _enter(self, state: ParkedState, why: str) -> None:
        self.manifest = change_state(self.directory, state, why)

    def close(self) -> None:
        """Unmap the files; another process may give it."""
        self._stack.close()


def refuse_unless_allowed(directory: Path, manifest: Manifest, options: GiveOptions) -> None:
    """One guest, one side. :raises ParkError: giving it now could make two of it."""
    state = manifest.state
    if options.resume:
        if state is not ParkedState.GIVING and not options.is_clone:
            raise ParkError(f"{directory} is {state.value}: there is nothing to resume")
        return
    if state is not ParkedState.PARKED and not (options.is_clone or options.force):
        remedy = {
            ParkedState.GIVING: "a destination may run this guest; when it waits for its pages, "
            "--resume; when none has it, --force",
            ParkedState.GIVEN: "it was given away; use --clone to start another copy",
            ParkedState.UNCONFIRMED: "its source may still run it; when it does not, --force",
        }[state]
        raise ParkError(f"{directory} is {state.value}, not parked: {remedy}")
    if options.is_clone and manifest.block_devices and not options.force:
        raise ParkError(
            f"{directory} has disk controllers ({', '.join(manifest.block_devices)}), and disks "
            "are not parked with a VM: two guests on one disk destroy it. Without disks, or with "
            "disks of their own: --force"
        )


def _require_writable(path: Path) -> None:
    """:raises ParkError: no file could be written there."""
    if path.is_dir():
        raise ParkError(f"{path} is a directory: name a file for the record")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ParkError(f"{path} cannot be written: choose another file for the record")


def _no_channel() -> Channel:
    """What a migration that is taken up again had before: nothing."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return Channel.over_socket(ours, peer="nobody")
