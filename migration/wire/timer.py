"""Section ``timer`` (version 2): the offsets that let the guest's clocks go on where they stopped.

be64 cpu_ticks_offset, 8 unused bytes, be64 cpu_clock_offset (since version 2). QEMU sends further
subsections only when it counts instructions (``-icount``); such a stream is refused, naming the
subsection.

Source: QEMU ``softmmu/cpu-timers.c`` (``system/cpu-timers.c`` since 9.0).
"""

from __future__ import annotations

from dataclasses import dataclass

from .vmstate import I64, Unused, VMStateDescription


@dataclass(slots=True)
class TimerState:
    """What the section holds. Register it with :data:`TIMER`, first of all devices as QEMU does.

    :ivar cpu_ticks_offset: added to the host's tick counter (TSC) to give the guest's.
    :ivar cpu_clock_offset: added to the host's monotonic clock to give the virtual clock, ns.
    While the guest stands
        still both hold the value itself.
    """

    cpu_ticks_offset: int = 0
    cpu_clock_offset: int = 0


TIMER = VMStateDescription(
    name="timer",
    version_id=2,
    minimum_version_id=1,
    fields=(I64("cpu_ticks_offset"), Unused(8), I64("cpu_clock_offset", version_id=2)),
)
