"""The memory oracle: fills guest RAM and judges every page of it. The work is ``csrc/oracle.c``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from guestmem import TARGET_PAGE_BYTES, RAMBlock

from ._native import ffi, lib
from .auxmem import AuxMemory

BAD_PAGES_KEPT = 64


class Damage(Enum):
    """What is wrong with a page. Values are the C core's numbers."""

    ZEROED = lib.DAMAGE_ZEROED
    MISPLACED = lib.DAMAGE_MISPLACED
    IDENTITY = lib.DAMAGE_IDENTITY
    CHECK = lib.DAMAGE_CHECK
    TORN = lib.DAMAGE_TORN
    STALE = lib.DAMAGE_STALE
    FUTURE = lib.DAMAGE_FUTURE
    LINK = lib.DAMAGE_LINK
    BODY = lib.DAMAGE_BODY
    NOT_ZERO = lib.DAMAGE_NOT_ZERO
    LOST = lib.DAMAGE_LOST
    RING = lib.DAMAGE_RING
    DISK = -1  # not a page: a chunk of the disk device

    @property
    def text(self) -> str:
        """For people."""
        return _TEXTS[self]


_TEXTS = {
    Damage.ZEROED: "reads as zeros",
    Damage.MISPLACED: "holds another page",
    Damage.IDENTITY: "has no valid identity",
    Damage.CHECK: "counter and check value do not match",
    Damage.TORN: "head and tail are of different ages",
    Damage.STALE: "is older than the guest's last write",
    Damage.FUTURE: "is newer than the guest's last write",
    Damage.LINK: "has a wrong link",
    Damage.BODY: "has a damaged body",
    Damage.NOT_ZERO: "was never filled but is not zero",
    Damage.LOST: "is poisoned",
    Damage.RING: "has a wrong ring descriptor",
    Damage.DISK: "does not hold its generation",
}


@dataclass(frozen=True)
class BadPage:
    """One damaged page.

    :ivar block: name of the RAM block; for :attr:`Damage.DISK` the disk, and ``page`` is the chunk.
    :ivar page: index of the target page within its block. :ivar offset: the same in bytes.
    :ivar expected, found: the values that differ (what they are depends on the damage).
    """

    block: str
    page: int
    damage: Damage
    expected: int
    found: int

    @property
    def offset(self) -> int:
        """Bytes from the start of the block."""
        return self.page * TARGET_PAGE_BYTES

    def __str__(self) -> str:
        return (
            f"{self.block} +{self.offset:#x} {self.damage.text} "
            f"(expected {self.expected:#x}, found {self.found:#x})"
        )


@dataclass(frozen=True)
class SweepReport:
    """The verdict on all pages of all blocks.

    :ivar pages_checked: target pages looked at. :ivar errors: bad pages among them.
    :ivar bad: the first :data:`BAD_PAGES_KEPT` of them.
    """

    pages_checked: int
    errors: int
    bad: tuple[BadPage, ...]

    @property
    def is_clean(self) -> bool:
        """Nothing was found."""
        return self.errors == 0

    def as_json(self) -> dict[str, object]:
        """``pages_checked``, ``errors`` and ``bad`` (objects with the damage's name)."""
        bad = [{**asdict(page), "damage": page.damage.name.lower()} for page in self.bad]
        return {"pages_checked": self.pages_checked, "errors": self.errors, "bad": bad}

    def __add__(self, other: SweepReport) -> SweepReport:
        bad = (self.bad + other.bad)[:BAD_PAGES_KEPT]
        return SweepReport(
            self.pages_checked + other.pages_checked, self.errors + other.errors, bad
        )


@dataclass(frozen=True)
class OwnedRange:
    """Pages a device verifies itself: ``count`` target pages of block number ``block`` from
    ``first``."""

    block: int
    first: int
    count: int


def identity_damage(aux: AuxMemory, block: int, page: int, data: bytes) -> str | None:
    """What is wrong with a page's identity, whatever its age; ``None`` when it is the right page.
    Pages that hold no oracle page are not judged."""
    if page >= aux.layout.filled[block]:
        return None
    number = lib.oracle_judge(aux.layout, block, page, ffi.from_buffer(data), 0)
    damage = Damage(number) if number else None
    wrong = (Damage.ZEROED, Damage.MISPLACED, Damage.IDENTITY, Damage.CHECK, Damage.TORN)
    return damage.text if damage in wrong else None


def block_addresses(blocks: Sequence[RAMBlock]) -> Any:
    """``uint64_t[]`` of the blocks' host addresses."""
    return ffi.new("uint64_t[]", [block.host for block in blocks])


def fill(aux: AuxMemory, blocks: Sequence[RAMBlock]) -> None:
    """Write every oracle page, all counters 0. About half a second per GiB, without the GIL."""
    lib.oracle_fill(aux.layout, block_addresses(blocks))


def sweep(
    aux: AuxMemory,
    blocks: Sequence[RAMBlock],
    owned: Sequence[OwnedRange] = (),
    *,
    nothing_is_missing: bool = False,
) -> SweepReport:
    """Judge every page of every block, less what devices own. The guest must not run.

    Sleeps on missing pages (without the GIL); a poisoned page is an error like others.

    :param nothing_is_missing: no migration is bringing pages: what does not exist is zero, and is
        passed over if it was never filled, so that a sparse guest stays sparse.
    """
    smp = aux.layout.smp
    base = block_addresses(blocks)
    logs = ffi.new("uint64_t[]", [aux.log_address(i) for i in range(smp)] or [0])
    bad = ffi.new("struct toy_bad[]", BAD_PAGES_KEPT)
    skip = ffi.new("struct oracle_range[]", max(1, len(owned)))
    for entry, owned_range in zip(skip, owned, strict=False):
        entry.block, entry.first, entry.count = (
            owned_range.block,
            owned_range.first,
            owned_range.count,
        )
    job = ffi.new("struct oracle_sweep *")
    job.layout, job.base, job.logs, job.bad = aux.layout, base, logs, bad
    job.skip, job.skip_count, job.bad_room = skip, len(owned), BAD_PAGES_KEPT
    populated = [block.populated() for block in blocks] if nothing_is_missing else []
    addresses = ffi.new("uint64_t[]", [bitmap.address for bitmap in populated] or [0])
    job.populated = addresses if populated else ffi.NULL
    errors = lib.oracle_sweep(job)
    return SweepReport(int(job.pages_checked), errors, bad_pages(bad, errors, blocks))


def bad_pages(bad: Any, count: int, blocks: Sequence[RAMBlock]) -> tuple[BadPage, ...]:
    """The first ``count`` of a C array of ``struct toy_bad``."""
    return tuple(
        BadPage(
            blocks[bad[i].block].idstr,
            int(bad[i].page),
            Damage(bad[i].damage),
            int(bad[i].expected),
            int(bad[i].found),
        )
        for i in range(min(count, BAD_PAGES_KEPT))
    )
