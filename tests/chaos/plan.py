"""What one run does, drawn from its seed alone: guest, network, fault and moment."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from enum import StrEnum

MIB = 1 << 20
MBIT = 1_000_000


class Phase(StrEnum):
    """Where in a migration the fault strikes: found by what passes on the wire, not by a clock."""

    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"  # discards, package, devices being loaded
    ACKNOWLEDGED = "acknowledged"  # from the package's acknowledgement to RUN
    POSTCOPY = "postcopy"
    END = "end"  # end of stream and SHUT
    RECOVERY = "recovery"
    FILE = "file"  # a file is the target: no wire


class Fault(StrEnum):
    """What happens there."""

    NONE = "none"
    LINK_FLAP = "link down and up"
    LINK_DOWN = "link down"  # until somebody does something about it
    RESET = "connection reset"
    CLOSE = "connection closed"
    HICCUP = "short stall"
    STALL = "stall"  # until somebody does something about it
    FLIP_PAGE = "page byte flipped"
    FLIP_FRAMING = "framing byte flipped"
    KILL_SOURCE = "source killed"
    KILL_DESTINATION = "destination killed"
    FREEZE_SOURCE = "source stopped and continued"
    FREEZE_DESTINATION = "destination stopped and continued"
    CANCEL = "cancelled"
    PAUSE = "paused by hand"
    QUIT_SOURCE = "source quits"
    QUIT_DESTINATION = "destination quits"
    DISK_FULL = "disk full"
    NO_HUGEPAGES = "no huge pages left"


_ANYWHERE = (
    Fault.LINK_FLAP, Fault.LINK_DOWN, Fault.RESET, Fault.CLOSE, Fault.HICCUP, Fault.STALL,
    Fault.FLIP_FRAMING, Fault.KILL_SOURCE, Fault.KILL_DESTINATION, Fault.FREEZE_SOURCE,
    Fault.FREEZE_DESTINATION, Fault.CANCEL, Fault.QUIT_SOURCE, Fault.QUIT_DESTINATION,
)  # fmt: skip
POSSIBLE: dict[Phase, tuple[Fault, ...]] = {
    Phase.SETUP: _ANYWHERE,
    Phase.ACTIVE: (*_ANYWHERE, Fault.FLIP_PAGE),
    Phase.DEVICE: _ANYWHERE,
    Phase.ACKNOWLEDGED: _ANYWHERE,
    Phase.POSTCOPY: (*_ANYWHERE, Fault.FLIP_PAGE, Fault.PAUSE, Fault.NO_HUGEPAGES, Fault.NONE),
    Phase.END: _ANYWHERE,
    Phase.RECOVERY: (*_ANYWHERE, Fault.PAUSE),
    Phase.FILE: (Fault.DISK_FULL, Fault.CANCEL, Fault.KILL_SOURCE, Fault.QUIT_SOURCE, Fault.NONE),
}
#: How often each phase is drawn.
_WEIGHTS = {
    Phase.SETUP: 3, Phase.ACTIVE: 3, Phase.DEVICE: 5, Phase.ACKNOWLEDGED: 5, Phase.POSTCOPY: 6,
    Phase.END: 3, Phase.RECOVERY: 5, Phase.FILE: 2,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One run. Everything that is left to chance is decided here.

    :ivar is_postcopy: the guest moves before its memory; else after all of it.
    :ivar at_once: postcopy before the first page was sent; else after :attr:`precopy_pages`.
    :ivar moment: which of the phase's moments (see :mod:`.moments`), modulo how many there are.
    :ivar nth: which of the moment's matches.
    :ivar at_source: which end of the link goes down, who pauses, in whose namespace the proxy is.
    :ivar again: what follows when the source kept its guest: migrate once more, or just check it.
    :ivar strike: a number for the details of the fault.
    """

    seed: int
    phase: Phase
    fault: Fault
    is_postcopy: bool
    at_once: bool
    precopy_pages: int
    moment: int
    nth: int
    at_source: bool
    again: bool
    strike: int
    ram_bytes: int
    smp: int
    backing: str
    vcpu: str
    workload: str
    rate: int
    write_share: float
    fill_share: float
    ring_pages: int
    disk_bytes: int
    rate_bits: int
    capabilities: tuple[str, ...]
    parameters: tuple[tuple[str, int | bool], ...]
    mapped: bool

    def as_json(self) -> dict[str, object]:
        """For a report."""
        return {**asdict(self), "parameters": dict(self.parameters)}

    @property
    def checksums(self) -> bool:
        """Both ends put checksums on everything."""
        return dict(self.parameters).get("x-checksum", True) is True

    @property
    def shape(self) -> dict[str, object]:
        """The guest, for :class:`migration.toyvm.ToyOptions`; backings by name."""
        return {
            "ram_bytes": self.ram_bytes,
            "smp": self.smp,
            "backing": self.backing,
            "vcpu": self.vcpu,
            "workload": self.workload,
            "rate": self.rate,
            "write_share": self.write_share,
            "fill_share": self.fill_share,
            "ring_pages": self.ring_pages,
            "disk_bytes": self.disk_bytes,
            "seed": self.seed % (1 << 32),
        }


def draw(
    seed: int,
    *,
    phase: Phase | None = None,
    fault: Fault | None = None,
    has_hugepages: bool = True,
    has_limits: bool = True,
    has_kvm: bool = True,
) -> Plan:
    """The plan of a seed; the same on every host that has the same.

    :param phase, fault: fixed instead of drawn.
    :param has_hugepages, has_limits, has_kvm: what the host offers; plans that need what it has
        not are drawn with something else.
    """
    rng = random.Random(seed)
    drawn_phase = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    phase = phase or drawn_phase
    dries = has_hugepages and has_limits
    possible = [f for f in POSSIBLE[phase] if dries or f is not Fault.NO_HUGEPAGES]
    drawn_fault = rng.choice(possible)
    fault = fault or drawn_fault
    only_postcopy = phase in (Phase.POSTCOPY, Phase.RECOVERY)
    is_postcopy = (rng.random() < 0.75 or only_postcopy) and phase is not Phase.FILE
    backing = rng.choice(
        ["anon", "anon", "memfd", "hugetlb"] if has_hugepages else ["anon", "memfd"]
    )
    vcpu = "kvm" if rng.random() < 0.15 and has_kvm else "thread"
    checksums = rng.random() < 0.75 or fault is Fault.FLIP_PAGE
    capabilities = _capabilities(rng, phase, fault, is_postcopy)
    # Drawn apart: what a seed stood for before this came stays what it was.
    if not is_postcopy and random.Random(f"multifd {seed}").random() < 0.3:
        capabilities += _multifd(phase, capabilities)
    if fault is Fault.NO_HUGEPAGES:
        backing = "hugetlb"
    return Plan(
        seed=seed,
        phase=phase,
        fault=fault,
        is_postcopy=is_postcopy,
        at_once=rng.random() < 0.4 and phase is not Phase.ACTIVE,
        precopy_pages=rng.randrange(1, 300),
        moment=rng.randrange(1 << 16),
        nth=rng.randrange(1 << 16),
        at_source=rng.random() < 0.5,
        again=rng.random() < 0.5,
        strike=rng.randrange(1 << 16),
        ram_bytes=rng.choice([4, 6, 8, 12, 16]) * MIB,
        smp=rng.choice([1, 1, 2, 3]),
        backing=backing,
        vcpu=vcpu,
        workload=rng.choice(["seq", "random", "zipf", "chase"]),
        rate=rng.choice([2_000, 10_000, 30_000]),
        write_share=rng.choice([0.1, 0.5, 0.9]),
        fill_share=rng.choice([0.6, 0.9, 1.0]),
        ring_pages=rng.choice([0, 64, 64, 128]),
        disk_bytes=rng.choice([0, 0, 256 << 10]),
        rate_bits=rng.choice([100, 200, 400, 800]) * MBIT,
        capabilities=capabilities,
        parameters=_parameters(rng, checksums, is_postcopy, only_postcopy),
        mapped=rng.random() < 0.5,
    )


def _capabilities(
    rng: random.Random, phase: Phase, fault: Fault, is_postcopy: bool
) -> tuple[str, ...]:
    def maybe(name: str, share: float) -> list[str]:
        return [name] if rng.random() < share else []

    chosen = maybe("xbzrle", 0.15) + maybe("auto-converge", 0.15)
    preempt, blocktime = maybe("postcopy-preempt", 0.3), maybe("postcopy-blocktime", 0.3)
    release = maybe("release-ram", 0.1)
    if phase is Phase.FILE:
        return ()
    if is_postcopy:
        chosen += preempt + blocktime
        # What was released cannot be recovered, which is documented: no place to look for it here.
        if phase in (Phase.SETUP, Phase.ACTIVE):
            chosen += release
    return tuple(chosen)


def _multifd(phase: Phase, beside: tuple[str, ...]) -> tuple[str, ...]:
    """Its pages pass on channels of their own, where no moment is looked for; no xbzrle there."""
    is_excluded = phase in (Phase.ACTIVE, Phase.FILE) or "xbzrle" in beside
    return () if is_excluded else ("multifd",)


def _parameters(
    rng: random.Random, checksums: bool, is_postcopy: bool, needs_time: bool
) -> tuple[tuple[str, int | bool], ...]:
    chosen: dict[str, int | bool] = {"x-checksum": checksums}
    # A postcopy that is to be hit in its middle must have one.
    small = rng.choice([2 * MIB, 4 * MIB] if needs_time else [0, 0, 4 * MIB, 16 * MIB])
    chosen["max-bandwidth"] = rng.choice([8 * MIB, 32 * MIB, 0])
    if is_postcopy:
        chosen["max-postcopy-bandwidth"] = small
        chosen["x-postcopy-sndbuf"] = rng.choice([16 << 10, 64 << 10, 1 << 20])
    else:
        chosen["downtime-limit"] = rng.choice([2000, 20000])
    return tuple(chosen.items())
