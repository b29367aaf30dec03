"""What machine this is, as far as it explains the figures measured on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from . import native

_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@dataclass(frozen=True, slots=True)
class Machine:
    """The host at the time of the bench. Unknown strings are empty."""

    kernel: str
    cpu_model: str
    cpu_count: int
    cpus: tuple[int, ...]  # used by the pinned rows, near one first
    is_virtual: bool
    ram_bytes: int
    ram_available_bytes: int
    hugepages_2m_free: int
    has_free_page_reporting: bool  # the host takes free memory back: first touches are slow
    clocksource: str
    clock_read_ns: float
    load_1min: float

    def to_json(self) -> dict[str, Any]:
        """The first record of ``--json``."""
        return {"record": "machine", **asdict(self), "cpus": list(self.cpus)}


@dataclass(frozen=True, slots=True)
class Processors:
    """Which processors pinned rows use.

    :ivar near: where the vCPU (or toucher, or sender) sits, and everything in "same" placements.
    :ivar far: the other one for "cross" and "split"; ``None`` when only one may be used.
    """

    near: int
    far: int | None

    @property
    def as_tuple(self) -> tuple[int, ...]:
        """Near one first."""
        return (self.near,) if self.far is None else (self.near, self.far)


def choose_processors(cpus: Sequence[int] | None = None) -> Processors:
    """The first two of ``cpus`` in the given order, or the two highest-numbered usable ones.

    :raises ValueError: empty, or a processor this process may not use.
    """
    usable = os.sched_getaffinity(0)
    order = sorted(usable, reverse=True) if cpus is None else list(dict.fromkeys(cpus))
    if not order:
        raise ValueError("no processors named")
    for cpu in order:
        if cpu not in usable:
            raise ValueError(f"cpu {cpu} is not among {sorted(usable)}, which this process may use")
    return Processors(order[0], order[1] if len(order) > 1 else None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _cpuinfo(field: str) -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _has_free_page_reporting() -> bool:
    """Feature bit 5 of a virtio balloon (virtio specification: VIRTIO_BALLOON_F_REPORTING)."""
    devices = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
    return any(_text(str(path))[5:6] == "1" for path in devices)


def free_hugepages_2m() -> int:
    """Free 2 MiB pages of the pool that nobody has reserved."""
    free = _text(str(_HUGEPAGES / "free_hugepages"))
    reserved = _text(str(_HUGEPAGES / "resv_hugepages"))
    return int(free or 0) - int(reserved or 0)


def describe(processors: Processors) -> Machine:
    """Look at this host; takes a few milliseconds, most of it reading the clock many times."""
    memory = psutil.virtual_memory()
    return Machine(
        kernel=platform.release(),
        cpu_model=_cpuinfo("model name"),
        cpu_count=os.cpu_count() or 1,
        cpus=processors.as_tuple,
        is_virtual="hypervisor" in _cpuinfo("flags").split(),
        ram_bytes=memory.total,
        ram_available_bytes=memory.available,
        hugepages_2m_free=free_hugepages_2m(),
        has_free_page_reporting=_has_free_page_reporting(),
        clocksource=_text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        clock_read_ns=round(native.clock_cost_ns(), 1),
        load_1min=round(os.getloadavg()[0], 2),
    )
