"""The run state of a machine, with QEMU's names, and which one may follow which.

Source: the names travel in the ``globalstate`` section (QEMU ``qapi/run-state.json``); the table is
ours and covers what a machine in a migration goes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class RunState(StrEnum):
    """QEMU's ``RunState``. Members compare equal to their wire names."""

    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    COLO = "colo"


_STOPPED = frozenset(
    {
        RunState.DEBUG,
        RunState.INTERNAL_ERROR,
        RunState.IO_ERROR,
        RunState.PAUSED,
        RunState.POSTMIGRATE,
        RunState.PRELAUNCH,
        RunState.RESTORE_VM,
        RunState.SAVE_VM,
        RunState.SHUTDOWN,
        RunState.SUSPENDED,
        RunState.WATCHDOG,
        RunState.GUEST_PANICKED,
        RunState.COLO,
    }
)

_GOES = frozenset({RunState.RUNNING, RunState.FINISH_MIGRATE})

TRANSITIONS: Mapping[RunState, frozenset[RunState]] = {
    # A stopped guest may go on, be migrated away, or be stopped for another reason. Whoever loads a
    # machine puts it into the state it had at the source, whatever that was.
    **dict.fromkeys(_STOPPED, _STOPPED | _GOES),
    # A machine that never ran, or gave its guest away, may take one in.
    RunState.PRELAUNCH: _STOPPED | _GOES | {RunState.INMIGRATE},
    RunState.POSTMIGRATE: _STOPPED | _GOES | {RunState.INMIGRATE},
    RunState.RUNNING: _STOPPED | {RunState.FINISH_MIGRATE},
    RunState.INMIGRATE: _STOPPED | {RunState.RUNNING},
    # A failed migration gives the guest back in the state it had.
    RunState.FINISH_MIGRATE: _STOPPED | {RunState.RUNNING},
}


class RunStateError(ValueError):
    """A state that does not exist, or that may not follow the one there is.

    :ivar actual: the state the machine is in.
    :ivar wanted: the state asked for.
    """

    def __init__(self, actual: RunState, wanted: str, why: str) -> None:
        super().__init__(f"run state {actual.value!r} cannot become {wanted!r}: {why}")
        self.actual = actual
        self.wanted = wanted


def advance(actual: RunState, wanted: str) -> RunState:
    """``wanted`` as a :class:`RunState` when it may follow ``actual`` (staying is always allowed).

    :raises RunStateError: it may not.
    """
    try:
        state = RunState(wanted)
    except ValueError:
        raise RunStateError(actual, wanted, "no such state") from None
    if state is not actual and state not in TRANSITIONS[actual]:
        raise RunStateError(actual, wanted, "not from there")
    return state
