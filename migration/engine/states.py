"""Two small machines: the destination's postcopy phases and the status of a migration as a whole.

Each is one table. The diagrams in docs/architecture.md are drawn from these tables and the property
tests walk every (state, input) pair: it lands on a listed state or raises :class:`StateError` and
nothing changed. What a state *does* (register RAM, start a thread) hangs on entering it, in
:mod:`migration.runtime`.

Source: QEMU ``migration/postcopy-ram.h`` (PostcopyState) and ``qapi/migration.json``
(MigrationStatus).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar


class Incoming(Enum):
    """How far the destination is in postcopy. STREAM_READ is ours: the stream of a small guest ends
    before RUN, and END needs both."""

    NONE = "none"
    ADVISE = "advise"
    DISCARD = "discard"
    LISTENING = "listening"
    STREAM_READ = "stream-read"
    RUNNING = "running"
    END = "end"


class IncomingInput(Enum):
    """What moves the destination on."""

    ADVISE = "advise"
    RAM_DISCARD = "ram-discard"
    LISTEN = "listen"
    RUN = "run"
    STREAM_EOF = "stream-eof"


class Status(Enum):
    """Status of a migration, in QMP's spelling."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_DEVICE = "postcopy-device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER_SETUP = "postcopy-recover-setup"
    POSTCOPY_RECOVER = "postcopy-recover"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMPLETED = "completed"
    FAILED = "failed"


class StatusInput(Enum):
    """What moves a migration on."""

    START = "start"
    READY = "ready"
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    GUEST_STOPPED = "guest-stopped"
    PACKAGE_SENT = "package-sent"
    """Source: the package is out. Destination: the package has come whole."""
    POSTCOPY = "postcopy"
    """Source: RUN is out. Destination: LISTEN was executed."""
    LOST_CHANNEL = "lost-channel"
    RECOVER = "recover"
    RECOVER_CONNECTED = "recover-connected"
    RESUMED = "resumed"
    CANCEL = "cancel"
    CANCELLED = "cancelled"
    FAIL = "fail"
    DONE = "done"


S, On = Incoming, IncomingInput
INCOMING: Mapping[tuple[Incoming, IncomingInput], Incoming] = {
    (S.NONE, On.ADVISE): S.ADVISE,
    (S.NONE, On.STREAM_EOF): S.END,
    (S.ADVISE, On.RAM_DISCARD): S.DISCARD,
    (S.ADVISE, On.STREAM_EOF): S.END,
    (S.ADVISE, On.LISTEN): S.LISTENING,
    (S.DISCARD, On.RAM_DISCARD): S.DISCARD,
    (S.DISCARD, On.LISTEN): S.LISTENING,
    (S.LISTENING, On.RUN): S.RUNNING,
    (S.LISTENING, On.STREAM_EOF): S.STREAM_READ,
    (S.STREAM_READ, On.RUN): S.END,
    (S.RUNNING, On.STREAM_EOF): S.END,
}

M, Do = Status, StatusInput
_BEFORE_COMMIT = (M.SETUP, M.ACTIVE, M.PRE_SWITCHOVER, M.DEVICE, M.POSTCOPY_DEVICE)
_RESTING = (M.NONE, M.CANCELLED, M.COMPLETED, M.FAILED)
STATUS: Mapping[tuple[Status, StatusInput], Status] = {
    **{(state, Do.START): M.SETUP for state in _RESTING},
    (M.SETUP, Do.READY): M.ACTIVE,
    (M.ACTIVE, Do.PAUSE_BEFORE_SWITCHOVER): M.PRE_SWITCHOVER,
    (M.PRE_SWITCHOVER, Do.GUEST_STOPPED): M.DEVICE,
    (M.ACTIVE, Do.GUEST_STOPPED): M.DEVICE,
    (M.DEVICE, Do.PACKAGE_SENT): M.POSTCOPY_DEVICE,
    (M.ACTIVE, Do.PACKAGE_SENT): M.POSTCOPY_DEVICE,
    (M.POSTCOPY_DEVICE, Do.POSTCOPY): M.POSTCOPY_ACTIVE,
    (M.DEVICE, Do.DONE): M.COMPLETED,
    (M.ACTIVE, Do.DONE): M.COMPLETED,
    (M.POSTCOPY_ACTIVE, Do.DONE): M.COMPLETED,
    **{(state, Do.CANCEL): M.CANCELLING for state in _BEFORE_COMMIT},
    (M.CANCELLING, Do.CANCELLED): M.CANCELLED,
    **{(state, Do.FAIL): M.FAILED for state in _BEFORE_COMMIT},
    (M.CANCELLING, Do.FAIL): M.CANCELLED,
    (M.CANCELLING, Do.LOST_CHANNEL): M.POSTCOPY_PAUSED,
    (M.POSTCOPY_ACTIVE, Do.LOST_CHANNEL): M.POSTCOPY_PAUSED,
    (M.POSTCOPY_ACTIVE, Do.FAIL): M.FAILED,
    (M.POSTCOPY_PAUSED, Do.FAIL): M.FAILED,
    (M.POSTCOPY_PAUSED, Do.DONE): M.COMPLETED,
    (M.POSTCOPY_PAUSED, Do.RECOVER): M.POSTCOPY_RECOVER_SETUP,
    (M.POSTCOPY_RECOVER_SETUP, Do.RECOVER_CONNECTED): M.POSTCOPY_RECOVER,
    (M.POSTCOPY_RECOVER_SETUP, Do.LOST_CHANNEL): M.POSTCOPY_PAUSED,
    (M.POSTCOPY_RECOVER, Do.LOST_CHANNEL): M.POSTCOPY_PAUSED,
    (M.POSTCOPY_RECOVER_SETUP, Do.FAIL): M.FAILED,
    (M.POSTCOPY_RECOVER, Do.FAIL): M.FAILED,
    (M.POSTCOPY_RECOVER, Do.RESUMED): M.POSTCOPY_ACTIVE,
}
"""FAIL is not accepted once the guest may run at the destination, except to say that it is lost.
CANCELLING goes over to paused when RUN went out in the moment the user cancelled. Paused is DONE
when the destination's last word was lost with the connection and came by its monitor instead."""

RESTING = frozenset(_RESTING)
"""Statuses in which a new migration may start."""

_State = TypeVar("_State", bound=Enum)
_Input = TypeVar("_Input", bound=Enum)


class StateError(Exception):
    """An input that the present state does not accept. Nothing was changed."""

    def __init__(self, actual: Enum, input_: Enum, required: frozenset[Enum]) -> None:
        wanted = ", ".join(sorted(str(state.value) for state in required)) or "no state at all"
        super().__init__(f"{input_.value!r} in state {actual.value!r}; accepted in {wanted}")
        self.actual = actual
        self.input = input_
        self.required = required


class StateMachine(Generic[_State, _Input]):
    """A state and the one table that moves it. Not thread-safe: its owner holds the lock."""

    def __init__(self, table: Mapping[tuple[_State, _Input], _State], start: _State) -> None:
        self._table = table
        self.state = start

    def accepts(self, input_: _Input) -> bool:
        """Whether :meth:`advance` would go through."""
        return (self.state, input_) in self._table

    def advance(self, input_: _Input) -> _State:
        """Follow the table.

        :returns: the new state.
        :raises StateError: the table has no such row; the state stays.
        """
        try:
            self.state = self._table[self.state, input_]
        except KeyError:
            required: frozenset[Enum] = frozenset(s for s, i in self._table if i is input_)
            raise StateError(self.state, input_, required) from None
        return self.state
