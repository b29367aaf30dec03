"""Section ``globalstate`` (version 1): the run state the machine had before the source stopped it.

be32 size (length of the name + 1), then 100 bytes. Up to QEMU 8.2 they are one NUL-padded name;
since 9.0 they are declared as 32 bytes of name, two bytes about a guest suspended to RAM, and 66
unused ones. A reader of either form understands both, because the name ends at its NUL.

A precopy destination starts the guest when the state is ``running`` or the section is missing,
and otherwise takes the state over; after a postcopy the state is not looked at (the guest runs).

Source: QEMU ``migration/global_state.c``.
"""

from __future__ import annotations

from .vmstate import U8, U32, Buffer, VMStateDescription

RUN_STATES = frozenset(
    (
        *("debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate"),
        *("prelaunch", "finish-migrate", "restore-vm", "running", "save-vm", "shutdown"),
        *("suspended", "watchdog", "guest-panicked", "colo", "preconfig"),
    )
)
"""Names a QEMU may send (``preconfig`` only older ones)."""

_NAME_BYTES = 32
_UNUSED_BYTES = 66
_OLD_NAME_BYTES = 100


class GlobalState:
    """What the section holds. Register it with :data:`GLOBALSTATE`, last of all devices as QEMU
    does.

    :ivar run_state: source: set it to the state the guest had **before** it was stopped;
    destination: the state
        received.
    :ivar vm_was_suspended: the guest was suspended to RAM when it was stopped (QEMU 9.0 and newer).
    :ivar received: a section was loaded; without one the guest is to be started.
    :ivar always_send: False leaves the section out for ``running`` and ``paused``, as machine
    types before 2.4 do.
    """

    def __init__(self, run_state: str = "running") -> None:
        self.run_state = run_state
        self.vm_was_suspended = False
        self.received = False
        self.always_send = True
        self.size = 0
        self.runstate = b""
        self.has_vm_was_suspended = 1
        self.unused = bytes(_UNUSED_BYTES)

    def start_on_load(self) -> bool:
        """Whether a precopy destination starts the guest."""
        return not self.received or self.run_state == "running"


def _needed(state: GlobalState) -> bool:
    return state.always_send or state.run_state not in ("running", "paused")


def _pre_load(state: GlobalState) -> None:
    state.has_vm_was_suspended = 0
    state.vm_was_suspended = False


def _prepare(state: GlobalState, length: int) -> None:
    if state.run_state not in RUN_STATES:
        raise ValueError(f"{state.run_state!r} is not a run state")
    name = state.run_state.encode("ascii")
    state.size = len(name) + 1
    state.runstate = name.ljust(length, b"\0")
    state.has_vm_was_suspended = 1
    state.unused = bytes(_UNUSED_BYTES)


def _pre_save(state: GlobalState) -> None:
    _prepare(state, _NAME_BYTES)


def _pre_save_old(state: GlobalState) -> None:
    _prepare(state, _OLD_NAME_BYTES)


def _post_load(state: GlobalState, version_id: int) -> None:
    name = state.runstate.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
    if name not in RUN_STATES:
        raise ValueError(f"{name!r} is not a run state")
    state.run_state = name
    # A source of 8.2 or older does not know the flag and sends zeros.
    flagged = bool(state.has_vm_was_suspended and state.vm_was_suspended)
    state.vm_was_suspended = flagged or name == "suspended"
    state.received = True


GLOBALSTATE = VMStateDescription(
    name="globalstate",
    version_id=1,
    minimum_version_id=1,
    needed=_needed,
    pre_save=_pre_save,
    pre_load=_pre_load,
    post_load=_post_load,
    fields=(
        U32("size"),
        Buffer("runstate", _NAME_BYTES),
        U8("has_vm_was_suspended"),
        U8("vm_was_suspended"),
        Buffer("unused", _UNUSED_BYTES),
    ),
)
"""As declared since QEMU 9.0."""

GLOBALSTATE_BEFORE_9_0 = VMStateDescription(
    name="globalstate",
    version_id=1,
    minimum_version_id=1,
    needed=_needed,
    pre_save=_pre_save_old,
    pre_load=_pre_load,
    post_load=_post_load,
    fields=(U32("size"), Buffer("runstate", _OLD_NAME_BYTES)),
)
"""As declared up to QEMU 8.2; writes zeros where the newer one has its flags."""
