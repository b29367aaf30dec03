"""``postcopy relay``: a guest passes through us from one QEMU to another, running all the time.

Upstream we are the destination of A, downstream the source of B. What has come from A is pushed to B;
what B asks for before it has come is asked of A at once. Both legs meet natively (``relay.c``); no
page waits for Python.

Who has the guest: A until B's side of it runs. B may only run after the package was sent to it, and A
is told that all is well (SHUT 0) whenever that happened, whatever becomes of B, since A must not start
its guest again then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from guestmem import RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BYTES, align_up
from migration.engine.states import Status, StatusInput
from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.outgoing import OutgoingMigration, OutgoingOptions
from migration.runtime.report import EventListener, Report
from migration.wire.extension import Feature
from migration.wire.io import Reader, Writer
from migration.wire.ram_setup import RamSetup
from migration.wire.registry import StateRegistry

from .give_back import NothingWritten
from .manifest import ParkError
from .sections import OpaqueSection, run_state_of
from .sink import SinkBlock, StreamSink

_MOVED = frozenset(
    {
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.COMPLETED,
        Status.FAILED,
        Status.CANCELLED,
    }
)


class PassingMachine(NothingWritten):
    """The guest while it passes through: RAM in memory, devices as bytes. A
    :class:`~migration.runtime.machine.Machine`."""

    needs_kernel_faults = False
    incoming_run_state: str | None = None

    def __init__(self, machine_type: str, ram: RAMList, sections: list[OpaqueSection]) -> None:
        self.machine_type = machine_type
        self.ram = ram
        self.registry = StateRegistry()
        state = run_state_of(sections)
        self.run_state = "paused" if state == "running" else state
        for section in sections:
            self._register(section)

    def _register(self, section: OpaqueSection) -> None:
        def save(writer: Writer) -> None:
            writer.write(section.payload)

        def load(reader: Reader, version_id: int) -> None:
            raise ParkError("a passing guest takes nothing in")

        self.registry.register_legacy(
            section.idstr, section.instance_id, section.version_id, save=save, load=load
        )

    def dirty_tracker(self) -> NothingWritten:
        return self

    def note_run_state(self, state: str) -> None:
        """``globalstate`` passes with the devices."""

    def attach_received(self, received: object) -> None:
        """Nobody runs here."""

    def vcpu_thread_ids(self) -> list[int]:
        return []

    def hold(self, seconds: float) -> None:
        """Nothing runs."""

    def statistics(self) -> dict[str, object]:
        return {}

    def close(self) -> None:
        """The relay owns the RAM."""


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """:ivar page_sizes: host page size of B per block, bytes. :ivar in_flight_bytes: towards B."""

    page_sizes: dict[str, int]
    in_flight_bytes: int = 192 << 10


class Relay:
    """One passage. :meth:`run` returns when B has everything and A was told."""

    def __init__(
        self,
        upstream: Channel,
        connect: Callable[[], Channel],
        options: RelayOptions,
        listener: EventListener,
        *,
        warn: Callable[[str], None],
    ) -> None:
        """:param connect: opens the channel to B, called when A's guest is about to move."""
        self._connect = connect
        self._options = options
        self._stack = ExitStack()
        self._listener = listener
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._ram = RAMList()
        self.sink = StreamSink(upstream, self, warn=warn)
        self.report: Report | None = None
        self.migration: OutgoingMigration | None = None

    def run(self) -> None:
        """:raises Exception: it failed; the message says who has the guest."""
        self.sink.run()

    # -- the sink's keeper ------------------------------------------------------

    def blocks(self, setup: RamSetup) -> list[SinkBlock]:
        """Room in memory. The connection to B is made now, while A can still keep its guest."""
        kept = []
        for each in setup.blocks:
            length = align_up(each.used_length, TARGET_PAGE_BYTES)
            block = RAMBlock.allocate(each.idstr, length)
            self._stack.callback(block.close)
            block.page_size = self._options.page_sizes.get(each.idstr, TARGET_PAGE_BYTES)
            self._ram.add(block)
            kept.append(SinkBlock(each.idstr, each.used_length, block.page_size, block.host, -1))
        self._downstream = self._connect()
        return kept

    def discarded(self, index: int, start: int, length: int) -> None:
        block = list(self._ram)[index]
        block.discard(start, length)

    def packaged(self, sections: list[OpaqueSection], accept: Callable[[], None]) -> None:
        """A's guest stands still: B gets the package, and A hears of it when B has loaded it."""
        self._start(sections, from_upstream=True, accept=accept)

    def refusal(self) -> int:
        """A may have its guest back only when B's cannot run."""
        if self.migration is not None:
            self._settle()
            return 0 if self.migration.is_committed() else 1
        return 1

    def finished(self, sections: list[OpaqueSection]) -> None:
        """All of A's bytes are here. A is told when B has them too."""
        if self.migration is None:
            self._start(sections, from_upstream=False, accept=lambda: None)
        else:
            self.migration.ram.upstream_ended()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _start(
        self, sections: list[OpaqueSection], *, from_upstream: bool, accept: Callable[[], None]
    ) -> None:
        configuration = self.sink.configuration
        machine = PassingMachine(configuration.machine, self._ram, sections)
        report = Report(self._listener)
        report.advance(StatusInput.START)
        parameters = {"x-postcopy-sndbuf": self._options.in_flight_bytes}
        migration = OutgoingMigration(
            machine,
            self._downstream,
            OutgoingOptions(
                postcopy=True,
                return_path=True,
                features=Feature.CHECKSUM | Feature.SPLIT_RUN,
                parameter=lambda name: parameters.get(name, 0),
                configuration=configuration,
            ),
            report,
        )
        self.report, self.migration = report, migration
        migration.ram.nothing_sent = True
        if from_upstream:
            migration.ram.relay_from(self.sink.native, self.sink.received)
        migration.start_postcopy()
        self._thread = threading.Thread(target=self._give, name="relay-downstream", daemon=True)
        self._thread.start()
        threading.Thread(
            target=self._accept_when_moved, args=(accept,), name="relay-accept", daemon=True
        ).start()

    def _give(self) -> None:
        assert self.migration is not None
        try:
            self.migration.run()
        except Exception as error:
            self._error = MigrationError(f"towards the destination: {error}")
            # Whoever reads from A must not wait for pages nobody takes.
            if not self.migration.is_committed():
                self.sink.channel.abort()

    def _accept_when_moved(self, accept: Callable[[], None]) -> None:
        assert self.report is not None
        status = self.report.wait_for(_MOVED, None)
        if status in (Status.POSTCOPY_ACTIVE, Status.COMPLETED):
            accept()

    def _settle(self) -> None:
        """The upstream leg failed: end the downstream one unless its guest runs already."""
        assert self.migration is not None
        assert self._thread is not None
        if not self.migration.is_committed():
            self.migration.cancel()
            self._thread.join()

    def close(self) -> None:
        """Free everything. :meth:`run` must have returned."""
        if self.migration is not None:
            self.migration.pause()
            if self._thread is not None:
                self._thread.join()
        self.sink.close()
        if self.migration is not None:
            self.migration.close()
        elif hasattr(self, "_downstream"):
            self._downstream.close()
        self._stack.close()
