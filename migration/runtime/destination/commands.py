"""What the commands of a stream do before its switchover."""

from __future__ import annotations

from migration.engine.states import Incoming, IncomingInput
from migration.wire.commands import RamDiscard, RamZero
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import PING_SET_UP, DestinationHandshake, Feature
from migration.wire.return_path import SwitchoverAck

from ..handover import blocks_to_hand_over, take_over
from ..memory_report import stalls
from .guards import check_memory
from .parts import DestinationParts
from .ram import require_matching_sizes


class DestinationCommands:
    """Nothing is at stake yet: each error ends the migration, and the source keeps its guest.

    The main thread's. A :class:`~.main_stream.Commands`, which see; ``at`` is the offset in the
    stream, for errors.
    """

    def __init__(self, parts: DestinationParts) -> None:
        self._parts = parts
        self._handshake = DestinationHandshake(parts.options.features)
        self._needed_bytes: int | None = None  # as the source says, if it does

    @property
    def is_advised(self) -> bool:
        """ADVISE came."""
        return self._parts.phase.state is not Incoming.NONE

    @property
    def ignores_shared(self) -> bool:
        """Capability ``x-ignore-shared`` is on."""
        return self._parts.options.ignore_shared

    def warn(self, text: str) -> None:
        """Something the user should know."""
        self._parts.report.warn(text)

    # -- the return path ------------------------------------------------------

    def open_return_path(self, at: int) -> None:
        """OPEN_RETURN_PATH."""
        channels = self._parts.channels
        if not channels.main.is_two_way:
            raise _bad("the source wants a return path over a one-way channel", at)
        channels.has_return_path = True
        if self._parts.options.switchover_ack:
            # No device here wants to be waited for; QEMU says so at once too.
            channels.answer(SwitchoverAck())

    def ping(self, value: int, at: int) -> None:
        """PING: answered by its value; the handshake's own switch features on."""
        channels = self._parts.channels
        if not channels.has_return_path:
            raise _bad("PING before OPEN_RETURN_PATH", at)
        was_in_force = self._handshake.is_in_force
        for pong in self._handshake.on_ping(value, offset=at):
            channels.answer(pong)
        if self._handshake.is_in_force and not was_in_force:
            channels.agree_on(self._handshake.chosen)
        if value == PING_SET_UP and Feature.HANDOVER in channels.features:
            self._take_over(at)

    def _take_over(self, at: int) -> None:
        """Descriptors follow: the source's memory takes the place of ours."""
        parts = self._parts
        if parts.guest.taken or self.is_advised:
            raise _bad("memory handed over twice, or in a postcopy", at)
        parts.guest.taken = blocks_to_hand_over(parts.machine.ram)
        take_over(parts.channels.main, parts.guest.taken)
        parts.ram.keep(parts.guest.taken)

    # -- RAM ------------------------------------------------------------------

    def start_multifd(self, has_flush: bool, at: int) -> None:
        """See :meth:`DestinationChannels.start_multifd`."""
        self._parts.channels.start_multifd(has_flush, at)

    def needs(self, length: int, at: int) -> None:
        """X_RAM_NEEDED: how much of RAM holds something; the rest takes no memory."""
        if Feature.SPARSE not in self._parts.channels.features:
            raise _bad("X_RAM_NEEDED, which was not agreed on", at)
        self._needed_bytes = min(length, self._parts.machine.ram.total_length)

    def zero(self, command: RamZero, at: int) -> None:
        """X_RAM_ZERO: before any discard, so that what is discarded later is missing again."""
        if Feature.SPARSE not in self._parts.channels.features:
            raise _bad("X_RAM_ZERO, which was not agreed on", at)
        phase = self._parts.phase.state
        if phase not in (Incoming.NONE, Incoming.ADVISE):
            raise _bad(f"X_RAM_ZERO in phase {phase.value}", at)
        self._parts.ram.know_zero(command, at)

    def advise(self, summary: int, target_page_bytes: int, at: int) -> None:
        """ADVISE: whatever would keep postcopy from working is said now."""
        parts, ram = self._parts, self._parts.machine.ram
        if not parts.options.postcopy:
            raise _bad("the source wants postcopy, and capability postcopy-ram is off here", at)
        if parts.guest.taken:
            raise _bad("postcopy of memory that was handed over", at)
        parts.phase.advance(IncomingInput.ADVISE, at)
        require_matching_sizes(parts.ram, summary, target_page_bytes)
        if parts.options.memory_guard:
            check_memory(ram, self._needed_bytes)
        for text in stalls(ram):
            parts.report.warn(text)
        parts.memory.prepare()

    def discard(self, command: RamDiscard, at: int) -> None:
        """RAM_DISCARD."""
        parts = self._parts
        is_first = parts.phase.state is Incoming.ADVISE
        parts.phase.advance(IncomingInput.RAM_DISCARD, at)
        if is_first:
            parts.channels.end_multifd()
            # One huge page formed by the kernel would cover pages that have not arrived with zeros.
            parts.ram.forbid_thp()
        parts.ram.discard(command, at)


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset)
