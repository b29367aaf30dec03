"""What a toy VM is made of, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from guestmem import TARGET_PAGE_BYTES, Backing, MemoryBackend
from migration.wire.compat import CompatProperty

from ._native import lib
from .compat import MACHINES

MACHINE_TYPES = (*MACHINES.names, "none")
"""Names on the wire, newest first. ``none`` is QEMU's: RAM, timer and globalstate only."""


class Workload(StrEnum):
    """What the vCPUs do all day."""

    SEQUENTIAL = "seq"
    RANDOM = "random"
    ZIPF = "zipf"
    CHASE = "chase"


class VCpuKind(StrEnum):
    """Who the vCPUs are."""

    THREAD = "thread"
    KVM = "kvm"


class TrackerChoice(StrEnum):
    """Who finds out what the guest wrote."""

    AUTO = "auto"
    """KVM's own for KVM vCPUs (the ring if the VM has one), else write protection, asynchronous
    where this kernel has that."""
    WP_ASYNC = "wp-async"
    WP_SYNC = "wp-sync"
    KVM_LOG = "kvm-log"
    KVM_RING = "kvm-ring"


DIRTY_RING_SIZES = (1 << 10, 1 << 16)
"""Least and most entries of a dirty ring; QEMU's range."""
DEFAULT_DIRTY_RING_SIZE = 1 << 12


class OptionError(ValueError):
    """The options ask for a machine that cannot be."""


@dataclass(frozen=True)
class ToyOptions:
    """A toy VM's shape. Source and destination must agree on everything that shapes RAM and
    devices; ``backing``, ``path``, ``incoming`` and (for threads) ``rate`` are each side's own.

    :ivar ram_bytes: the main block; positive multiple of the target page.
    :ivar extra_blocks: further blocks as (idstr, bytes).
    :ivar smp: vCPUs, 0..64 (0: RAM without anybody in it).
    :ivar path: ``Backing.FILE``: a directory or file, QEMU's ``--mem-path``.
    :ivar hugepage_size: bytes of a huge page for ``Backing.HUGETLB``, 2 MiB unless told; with
        ``Backing.FILE`` insist on such pages.
    :ivar backends: memory of single blocks, by idstr, where ``backing``, ``path`` and
        ``hugepage_size`` do not hold.
    :ivar working_set_bytes: how much of the filled RAM the vCPUs touch; ``None`` is all of it.
    :ivar rate: operations per second, all vCPUs together; 0 = as fast as they can.
    :ivar write_share: part of the operations that write, 0..1.
    :ivar fill_share: part of RAM that holds oracle pages, 0..1; the rest is zero.
    :ivar seed: of page contents and of the vCPUs' random sequences.
    :ivar ring_pages: pages of the descriptor ring at the end of RAM; 0 (none) or at least 64.
    :ivar ring_rate: descriptors the ring device rewrites per second; 0 = as fast as it can.
    :ivar disk_bytes: size of the block disk, a multiple of 64 KiB; 0 = none.
    :ivar disk_path: file behind the disk; ``None`` keeps it in memory.
    :ivar window_pages: pages of RAM the movable window maps; 0 = no such device.
    :ivar global_properties: the user's own device properties (``-global``), set after those of the
        machine type.
    :ivar dirty_ring_size: entries of each KVM vCPU's dirty ring, a power of two; 0: the VM has a
        dirty log instead. Chosen before the first vCPU exists.
    :ivar dirty_tracker: who finds out what the guest wrote. ``KVM_RING`` without a size makes rings
        of :data:`DEFAULT_DIRTY_RING_SIZE`.
    :ivar uuid: of the VM; compared by migrations where both sides have one.
    :ivar incoming: RAM is left zero for a migration to fill, and the run state is ``inmigrate``.
    """

    ram_bytes: int = 256 << 20
    smp: int = 1
    machine_type: str = MACHINE_TYPES[0]
    backing: Backing = Backing.ANON
    path: str | None = None
    hugepage_size: int | None = None
    backends: Mapping[str, MemoryBackend] = field(default_factory=dict)
    extra_blocks: tuple[tuple[str, int], ...] = ()
    vcpu: VCpuKind = VCpuKind.THREAD
    workload: Workload = Workload.RANDOM
    working_set_bytes: int | None = None
    rate: int = 0
    write_share: float = 0.5
    fill_share: float = 1.0
    seed: int = 1
    ring_pages: int = 64
    ring_rate: int = 20_000
    disk_bytes: int = 0
    disk_path: str | None = None
    window_pages: int = 0
    global_properties: tuple[CompatProperty, ...] = ()
    dirty_ring_size: int = 0
    dirty_tracker: TrackerChoice = TrackerChoice.AUTO
    uuid: UUID | None = None
    incoming: bool = False

    def __post_init__(self) -> None:
        if self.machine_type not in MACHINE_TYPES:
            raise OptionError(
                f"machine type {self.machine_type!r}, known: {', '.join(MACHINE_TYPES)}"
            )
        if not 0 <= self.smp <= lib.TOY_MAX_SMP:
            raise OptionError(f"{self.smp} vCPUs, 0..{lib.TOY_MAX_SMP} are possible")
        for share in (self.write_share, self.fill_share):
            if not 0 <= share <= 1:
                raise OptionError(f"a share of {share}, 0..1 is possible")
        if self.rate < 0 or self.ring_rate < 0 or not 0 <= self.seed < 1 << 64:
            raise OptionError("rates and the seed are not negative, the seed has 64 bits")
        if self.ring_pages and self.ring_pages < 64:
            raise OptionError(f"a ring of {self.ring_pages} pages, 0 or at least 64 are possible")
        self._check_blocks()
        if self.is_bare and (self.disk_bytes or self.window_pages):
            raise OptionError("machine type none has no disk and no windows")
        if self.disk_bytes < 0 or self.disk_bytes % (64 << 10):
            raise OptionError(f"a disk of {self.disk_bytes} bytes: whole chunks of 64 KiB please")
        if not 0 <= self.window_pages * TARGET_PAGE_BYTES <= self.ram_bytes:
            raise OptionError(f"windows of {self.window_pages} pages do not fit into RAM")
        if self.is_bare and self.smp and self.write_share:
            # The vCPUs' log of writes is device state, and `none` has no device to carry it.
            raise OptionError("machine type none: vCPUs may only read (write_share=0), or smp=0")

        self._check_tracker()

    def _check_tracker(self) -> None:
        size, choice = self.dirty_ring_size, self.dirty_tracker
        least, most = DIRTY_RING_SIZES
        if size and (not least <= size <= most or size & (size - 1)):
            raise OptionError(
                f"a dirty ring of {size} entries: a power of two from {least} to {most} please"
            )
        if size and self.vcpu is not VCpuKind.KVM:
            raise OptionError("a dirty ring is KVM's: it needs vcpu=kvm")
        is_kvms = choice in (TrackerChoice.KVM_LOG, TrackerChoice.KVM_RING)
        if is_kvms and self.vcpu is not VCpuKind.KVM:
            raise OptionError(f"tracker {choice.value} sees KVM vCPUs only: it needs vcpu=kvm")
        if size and choice is TrackerChoice.KVM_LOG:
            raise OptionError("a VM with a dirty ring has no dirty log: no tracker kvm-log")

    @property
    def ring_entries(self) -> int:
        """Of each vCPU's dirty ring, 0: none."""
        if self.dirty_tracker is TrackerChoice.KVM_RING and not self.dirty_ring_size:
            return DEFAULT_DIRTY_RING_SIZE
        return self.dirty_ring_size

    def _check_blocks(self) -> None:
        if 1 + len(self.extra_blocks) > lib.TOY_MAX_BLOCKS:
            raise OptionError(f"more than {lib.TOY_MAX_BLOCKS} RAM blocks")
        for idstr, length in self.blocks:
            if length <= 0 or length % TARGET_PAGE_BYTES:
                raise OptionError(f"block {idstr!r} of {length} bytes: whole pages please")
        if self.has_ring and self.blocks[-1][1] < self.ring_pages * TARGET_PAGE_BYTES:
            raise OptionError(f"no room for {self.ring_pages} ring pages in {self.blocks[-1][0]!r}")
        names = {idstr for idstr, _ in self.blocks}
        if len(names) < len(self.blocks):
            raise OptionError("two RAM blocks have one name")
        if stray := sorted(self.backends.keys() - names):
            raise OptionError(f"memory for block {stray[0]!r}, which there is not")

    def backend_of(self, idstr: str) -> MemoryBackend:
        """What the memory of that block is to be like."""
        common = MemoryBackend(self.backing, self.path, self.hugepage_size)
        return self.backends.get(idstr, common)

    @property
    def is_bare(self) -> bool:
        """Machine type ``none``: nothing but RAM, timer and globalstate."""
        return self.machine_type == "none"

    @property
    def has_ring(self) -> bool:
        """The machine has the descriptor ring, at the end of its last block."""
        return not self.is_bare and self.ring_pages > 0

    @property
    def blocks(self) -> tuple[tuple[str, int], ...]:
        """All RAM blocks as (idstr, bytes). A bare machine's is QEMU's: ``ram``."""
        return ((main_block(is_bare=self.is_bare), self.ram_bytes), *self.extra_blocks)


def main_block(*, is_bare: bool) -> str:
    """Name of the first block. A bare machine's is QEMU's."""
    return "ram" if is_bare else "toy.ram"
