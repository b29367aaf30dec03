"""``postcopy relay``: a guest passes through us from one QEMU to another, running all the time.

Upstream we are the destination of A, downstream the source of B. What has come from A is pushed to
B; what B asks for before it has come is asked of A at once. Both legs meet natively (``relay.c``);
no page waits for Python.

Who has the guest: A until B's side of it runs. B may only run after the package was sent to it, and
A is told that all is well (SHUT 0) whenever that happened, whatever becomes of B, since A must not
start its guest again then.

A leg that breaks while the guest is between the two is mended: A comes back with ``migrate -r``; to
B we connect again, as soon as it was told ``migrate_recover``. Should we die, A and B can do that
with each other: A still has all of RAM, B says what it has, and RAM's section has A's id.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from guestmem import RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BYTES, align_up
from migration.engine.states import Status, StatusInput
from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.options import OutgoingOptions
from migration.runtime.report import EventListener, Report
from migration.runtime.source.outgoing import OutgoingMigration
from migration.wire.extension import Feature
from migration.wire.io import Reader, Writer
from migration.wire.ram_setup import RamSetup
from migration.wire.registry import StateRegistry
from uffd.threads import NamedThread

from .keeper import Package
from .links import SourceLinks
from .manifest import ParkError
from .parked_machine import NothingWritten
from .retold import Retold
from .sections import OpaqueSection, run_state_of
from .sink import StreamSink
from .sink_ram import SinkBlock, SinkRam

_MOVED = frozenset(
    {
        Status.POSTCOPY_ACTIVE,
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
    """:ivar page_sizes: host page size of B per block, bytes. :ivar in_flight_bytes: towards B.
    :ivar preempt: B has capability postcopy-preempt. :ivar is_old: and is a QEMU of 7.2.
    :ivar reconnect_s: between two tries to reach B again. :ivar ask: B's status of its migration,
    from its monitor; None: it says nothing."""

    page_sizes: Mapping[str, int]
    in_flight_bytes: int = 64 << 10
    preempt: bool = False
    is_old: bool = False
    reconnect_s: float = 0.5
    ask: Callable[[], str | None] = lambda: None


class Relay:
    """One passage. :meth:`run` returns when B has everything and A was told."""

    def __init__(
        self,
        upstream: Channel,
        connect: Callable[[], Channel],
        options: RelayOptions,
        listener: EventListener,
        *,
        say: Callable[[str], None],
        links: SourceLinks | None = None,
    ) -> None:
        """:param connect: opens a channel to B: the first when A's block list came, then a preempt
            channel, and again after each cut.
        :param links: more connections of A; closed with this."""
        self._connect = connect
        self._options = options
        self._stack = ExitStack()
        self._listener = listener
        self._error: Exception | None = None  # how the downstream leg ended
        self._cause: Exception | None = None  # the same, when it was not we who ended it
        self._thread: threading.Thread | None = None
        self._accepting: threading.Thread | None = None
        self._ram = RAMList()
        self._downstream: Channel | None = None
        self._say = say
        self._breaks = Retold()  # of the downstream leg
        self._is_all_here = self._insisted = False
        self._stopping = threading.Event()
        self.sink = StreamSink(upstream, self, say=say, links=links)
        self.report: Report | None = None
        self.migration: OutgoingMigration | None = None

    def run(self) -> None:
        """:raises Exception: it failed; the message says who has the guest."""
        try:
            self.sink.run()
        except Exception as error:
            # Of a downstream leg that failed the upstream one only knows that it was stopped.
            cause = self._cause or error
            raise MigrationError(f"{cause}. {self._who_has_it()}") from cause

    def stop(self) -> bool:
        """Any thread: :meth:`run` ends soon. Before the guest moved it stays A's.

        False: it goes on, until it is told again. Once B may run, an A that had sent everything
        would, cut off without our answer, start its guest beside B's; and when it had our answer,
        only we have the pages that B lacks. How far A is we cannot know.
        """
        if self.migration is not None and self.migration.is_committed():
            if not self._insisted:
                self._insisted = True
                self._say(f"warning: {self._why_not_stop()}")
                return False
            if self._is_all_here:
                self.sink.tell_well()
        self._stopping.set()
        if self.migration is not None and not self.migration.cancel():
            self.migration.pause()
        self.sink.stop()
        return True

    def _why_not_stop(self) -> str:
        assert self.migration is not None
        if self.migration.may_be_complete:
            return (
                "whether the destination got all of it is not known here. Only when query-migrate "
                "there says completed is it safe to tell this to stop again"
            )
        return (
            "the destination's guest needs pages that only come through here: going on until it "
            "has them. When told to stop again, it is cut off from them"
        )

    def _who_has_it(self) -> str:
        if self.migration is None or not self.migration.is_committed():
            return "The guest is still the source's"
        return "The guest moved to the destination: look there, and do not start it at the source"

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

    def ready(self, ram: SinkRam) -> None:
        """Nothing else to do."""

    def discarded(self, index: int, start: int, length: int) -> None:
        block = list(self._ram)[index]
        block.discard(start, length)

    def packaged(self, package: Package, accept: Callable[[], None]) -> None:
        """A's guest stands still: B gets the package, and A hears of it when B has loaded it."""
        self._start(list(package.sections), from_upstream=True, accept=accept)

    def may_refuse(self) -> bool:
        return self.migration is None or not self.migration.is_committed()

    def refusal(self) -> int | None:
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
            self._is_all_here = True
            self._say("all of the guest is here; the destination gets the rest")
            self.migration.ram.upstream_ended()
        assert self._thread is not None
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _start(
        self, sections: list[OpaqueSection], *, from_upstream: bool, accept: Callable[[], None]
    ) -> None:
        configuration = self.sink.configuration
        assert self._downstream is not None
        assert self.sink.ram is not None
        machine = PassingMachine(configuration.machine, self._ram, sections)
        self._note_paused(sections)
        report = Report(self._heard)
        report.advance(StatusInput.START)
        parameters = {"x-postcopy-sndbuf": self._options.in_flight_bytes}
        migration = OutgoingMigration(
            machine,
            self._downstream,
            OutgoingOptions(
                postcopy=True,
                return_path=True,
                features=Feature.CHECKSUM | Feature.SPLIT_RUN | Feature.COUNTED,
                before_giving=self._choose_pages,
                parameter=lambda name: parameters.get(name, 0),
                configuration=configuration,
                connect_urgent=self._connect if self._options.preempt else None,
                urgent_first=self._options.is_old,
                ram_section_id=self.sink.ram.section_id,
            ),
            report,
        )
        self.report, self.migration = report, migration
        migration.ram.nothing_sent = True
        if from_upstream:
            migration.ram.relay_from(self.sink.native, self.sink.received)
        migration.start_postcopy()
        self._thread = NamedThread(target=self._give, name="relay-downstream", daemon=True)
        self._thread.start()
        self._accepting = NamedThread(
            target=self._accept_when_moved, args=(accept,), name="relay-accept", daemon=True
        )
        self._accepting.start()

    def _note_paused(self, sections: list[OpaqueSection]) -> None:
        state = run_state_of(sections)
        if state != "running":
            self._say(
                f"note: this guest is {state}, but a postcopy always starts it: at a destination "
                "that was not started with -S it runs now"
            )

    def _heard(self, event: str, data: dict[str, object]) -> None:
        if data.get("status") == Status.POSTCOPY_ACTIVE.value:
            self._breaks.forget()
        self._listener(event, data)

    def _choose_pages(self) -> None:
        """A stock destination takes what never comes for zero; one that counts pages does not."""
        assert self.migration is not None
        if Feature.COUNTED in self.migration.features:
            self.migration.ram.push_zeros()

    def _give(self) -> None:
        assert self.migration is not None
        try:
            self.migration.run()
        except Exception as error:
            self._error = self._mend(error)
        if self._error is not None:
            if not self._stopping.is_set():
                self._cause = self._error
            # Whoever reads from A must not wait for pages nobody takes.
            self.sink.stop()

    def _mend(self, error: Exception) -> Exception | None:
        """After an error towards B: until it is whole again (None), or cannot be."""
        assert self.migration is not None
        assert self.report is not None
        while self.report.status is Status.POSTCOPY_PAUSED and not self._stopping.is_set():
            self._tell_broken(str(error))
            channel = self._reconnect()
            if channel is None:
                break
            try:
                self.migration.resume(channel)
                return None
            except Exception as again:
                error = again
        if self.report.status is Status.COMPLETED:
            return None
        if self.report.status is Status.POSTCOPY_PAUSED:
            self.report.advance(StatusInput.FAIL, error=str(error))
        return MigrationError(f"towards the destination: {self.report.error or error}")

    def _tell_broken(self, cause: str) -> None:
        """What listens there may be anything, and end every connection as soon as it is made."""
        assert self.migration is not None
        if not self._breaks.is_worth_a_line(cause):
            return
        recover = f"migrate_recover {self.migration.channel.peer}"
        broke = f"warning: the connection to the destination broke{self._breaks.times} ({cause}); "
        if self.migration.may_be_complete:
            self._say(
                f"{broke}it was sent everything, only its last word is missing. When "
                f"query-migrate there says completed, stop this; postcopy-paused, there: {recover}"
            )
        else:
            self._say(f"{broke}its guest waits for pages. There: {recover}")

    def _reconnect(self) -> Channel | None:
        """A new channel to B; None: stopping, or B is complete. Nothing tells when it listens:
        hence the tries."""
        assert self.migration is not None
        while not self._stopping.wait(self._options.reconnect_s):
            if self.migration.ask_complete(self._options.ask):
                break
            try:
                return self._connect()
            except MigrationError:
                continue
        return None

    def _accept_when_moved(self, accept: Callable[[], None]) -> None:
        assert self.report is not None
        assert self.migration is not None
        status = self.report.wait_for(_MOVED, None)
        if status not in (Status.POSTCOPY_ACTIVE, Status.COMPLETED):
            return
        # A stock B may still refuse the package; an A that was told nothing has its guest back.
        if self.migration.wait_loaded():
            accept()

    def _settle(self) -> None:
        """The upstream leg failed for good: end the downstream one unless its guest runs."""
        assert self.migration is not None
        assert self._thread is not None
        if not self.migration.is_committed():
            self._stopping.set()
            self.migration.cancel()
            self._thread.join()

    def close(self) -> None:
        """Free everything. :meth:`run` must have returned."""
        self._stopping.set()
        if self.migration is not None:
            self.migration.pause()
            if self._thread is not None:
                self._thread.join()
            if self._accepting is not None:
                self._accepting.join()
        self.sink.close()
        if self.migration is not None:
            self.migration.close()
        elif self._downstream is not None:
            self._downstream.close()
        self._stack.close()
