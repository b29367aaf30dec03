"""The PC keyboard controller (i8042): section ``pckbd``, version 3.

The ISA device wraps the controller, and both descriptions are called ``pckbd``: the outer one has
nothing but the inner one as a nested struct, and the subsections belong to the inner one. A
machine type older than 6.0 sets the property ``extended-state`` to off; then the pending flags
travel in an older, coarser form and the subsection is not sent.

Source: QEMU ``hw/input/pckbd.c``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

from ..vmstate import U8, U32, Struct, VMStateDescription


class Status(IntFlag):
    """Bits of the status register that the state depends on."""

    OUTPUT_FULL = 0x01
    MOUSE_OUTPUT_FULL = 0x20


class Pending(IntFlag):
    """What waits to be put into the output buffer. The first two are the older, coarser form."""

    KEYBOARD_COMPAT = 0x01
    MOUSE_COMPAT = 0x02
    CONTROLLER_KEYBOARD = 0x04
    CONTROLLER_MOUSE = 0x08
    KEYBOARD = 0x10
    MOUSE = 0x20


class OutputSource(IntFlag):
    """Who filled the output buffer."""

    KEYBOARD = 0x01
    MOUSE = 0x02
    CONTROLLER = 0x04


_OUTPORT_IDLE = 0xCF  # reset line high, A20 on, unused bits one
_OUTPORT_OUTPUT_FULL = 0x10
_OUTPORT_MOUSE_FULL = 0x20
_KNOWN_PENDING = (
    Pending.CONTROLLER_KEYBOARD | Pending.CONTROLLER_MOUSE | Pending.KEYBOARD | Pending.MOUSE
)
_TIMER_PENDING = 0x01


@dataclass(slots=True)
class KeyboardController:
    """The controller's registers.

    :ivar extended_state: property ``extended-state``: send the subsection (off for machine types
    before 6.0).
    :ivar outport_present: the output port came in its subsection.
    :ivar throttle_pending: the timer that spaces key codes is armed.
    """

    write_cmd: int = 0
    status: int = 0
    mode: int = 0
    outport: int = _OUTPORT_IDLE
    pending: int = 0
    obsrc: int = 0
    obdata: int = 0
    cbdata: int = 0
    extended_state: bool = True
    throttle_pending: bool = False
    outport_present: bool = False
    extended_state_loaded: bool = False
    pending_tmp: int = 0
    migration_flags: int = 0

    def outport_default(self) -> int:
        """What the output port reads when nobody wrote it: idle, and the two interrupt lines as
        in the status.
        """
        value = _OUTPORT_IDLE
        if self.status & Status.OUTPUT_FULL:
            value |= _OUTPORT_OUTPUT_FULL
        if self.status & Status.MOUSE_OUTPUT_FULL:
            value |= _OUTPORT_MOUSE_FULL
        return value


@dataclass(slots=True)
class IsaKeyboard:
    """The ISA device around the controller."""

    kbd: KeyboardController = field(default_factory=KeyboardController)


def _pre_save(kbd: KeyboardController) -> None:
    if kbd.extended_state:
        kbd.pending_tmp = kbd.pending
        return
    kbd.pending_tmp = 0
    if kbd.pending & Pending.KEYBOARD:
        kbd.pending_tmp |= Pending.KEYBOARD_COMPAT
    if kbd.pending & Pending.MOUSE:
        kbd.pending_tmp |= Pending.MOUSE_COMPAT


def _pre_load(kbd: KeyboardController) -> None:
    kbd.outport_present = False
    kbd.extended_state_loaded = False


def _post_load(kbd: KeyboardController, version_id: int) -> None:
    if not kbd.outport_present:
        kbd.outport = kbd.outport_default()
    kbd.pending = kbd.pending_tmp
    if not kbd.extended_state_loaded:
        kbd.obsrc = _guess_source(kbd.status)
        if kbd.pending & Pending.KEYBOARD_COMPAT:
            kbd.pending |= Pending.KEYBOARD
        if kbd.pending & Pending.MOUSE_COMPAT:
            kbd.pending |= Pending.MOUSE
    kbd.pending &= _KNOWN_PENDING


def _guess_source(status: int) -> int:
    if not status & Status.OUTPUT_FULL:
        return 0
    return OutputSource.MOUSE if status & Status.MOUSE_OUTPUT_FULL else OutputSource.KEYBOARD


def _mark_outport(kbd: KeyboardController, version_id: int) -> None:
    kbd.outport_present = True


def _extended_pre_save(kbd: KeyboardController) -> None:
    kbd.migration_flags = _TIMER_PENDING if kbd.throttle_pending else 0


def _extended_post_load(kbd: KeyboardController, version_id: int) -> None:
    kbd.throttle_pending = bool(kbd.migration_flags & _TIMER_PENDING)
    kbd.extended_state_loaded = True


KEYBOARD_CONTROLLER = VMStateDescription(
    name="pckbd",
    version_id=3,
    minimum_version_id=3,
    pre_save=_pre_save,
    pre_load=_pre_load,
    post_load=_post_load,
    fields=(U8("write_cmd"), U8("status"), U8("mode"), U8("pending_tmp")),
    subsections=(
        VMStateDescription(
            name="pckbd_outport",
            version_id=1,
            minimum_version_id=1,
            needed=lambda kbd: kbd.outport != kbd.outport_default(),
            post_load=_mark_outport,
            fields=(U8("outport"),),
        ),
        VMStateDescription(
            name="pckbd/extended_state",
            needed=lambda kbd: kbd.extended_state,
            pre_save=_extended_pre_save,
            post_load=_extended_post_load,
            fields=(U32("migration_flags"), U32("obsrc"), U8("obdata"), U8("cbdata")),
        ),
    ),
)

PCKBD = VMStateDescription(
    name="pckbd",
    version_id=3,
    minimum_version_id=3,
    fields=(Struct("kbd", KEYBOARD_CONTROLLER),),
)
"""Register this one, with an :class:`IsaKeyboard`."""
