"""Which pages of a RAM block a stream brought, and how often: counts, and a map to draw.

One byte of state per target page, held in zero-filled memory the kernel only provides where it is
touched. The sum of all maps has a bound; blocks past it are counted but not mapped, so a stream
that claims absurd blocks costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag

from migration.wire.ram_setup import MappedRamHeader, RamSetupBlock

PAGE_MAP_BYTES_MAX = 256 << 20
"""One byte per page: page maps for 1 TiB of guest RAM with 4 KiB pages."""


class PageState(IntFlag):
    """What is known of one target page."""

    ABSENT = 0
    ZERO = 1
    """Last sent as a zero page."""
    DATA = 2
    """Last sent with data."""
    RESENT = 4
    """Sent more than once."""
    DISCARDED = 8
    """Dropped by RAM_DISCARD since it was last sent."""


# Plain numbers: these are needed once per record.
_SENT = int(PageState.ZERO | PageState.DATA)
_RESENT = int(PageState.RESENT)


@dataclass(slots=True)
class PageCounts:
    """Records per kind. ``resent`` counts those of all kinds whose page had been sent before."""

    normal: int = 0
    zero: int = 0
    resent: int = 0
    xbzrle: int = 0
    compressed: int = 0
    multifd: int = 0
    """How many of ``normal`` and ``zero`` came over multifd channels."""
    discarded: int = 0
    """Pages of all RAM_DISCARD ranges."""
    holes: int = 0
    """Pages of all X_RAM_ZERO ranges: zero, and never sent."""


@dataclass(slots=True)
class BlockState:
    """One RAM block as seen so far.

    :ivar states: a :class:`PageState` per target page; None when the block is past the bound.
    """

    idstr: str
    used_length: int
    page_size: int
    target_page_bytes: int
    gpa: int | None = None
    mapped_ram: MappedRamHeader | None = None
    counts: PageCounts = field(default_factory=PageCounts)
    states: bytearray | None = None

    @property
    def page_count(self) -> int:
        """Target pages, a last partial one counted whole."""
        return -(-self.used_length // self.target_page_bytes)

    def sent(self, index: int, kind: PageState) -> None:
        """A record for page ``index`` (already checked against the block)."""
        states = self.states
        if states is None:
            return
        before = states[index]
        if before & _SENT:
            self.counts.resent += 1
            states[index] = int(kind) | _RESENT
        else:
            states[index] = kind

    def discard(self, first: int, count: int) -> None:
        """Pages ``first`` .. ``first + count - 1`` (already checked) were dropped."""
        self.counts.discarded += count
        if self.states is None or self.counts.discarded > _DISCARD_PASSES_MAX * self.page_count:
            return
        part = self.states[first : first + count]
        self.states[first : first + count] = part.translate(_DISCARD)

    def is_zero(self, first: int, count: int) -> None:
        """Pages ``first`` .. ``first + count - 1`` (already checked) are zero and never sent."""
        self.counts.holes += count
        if self.states is not None and self.counts.holes <= self.page_count:
            self.states[first : first + count] = bytes([PageState.ZERO]) * count

    def runs(self) -> Iterator[tuple[int, int, PageState]]:
        """(first page, count, state) for every run of equal state, in order."""
        states = self.states or b""
        start = 0
        for value, length in _runs(states):
            yield start, length, PageState(value)
            start += length


_DISCARD_PASSES_MAX = 4
"""A source discards a page once, at the switch to postcopy. Marking stops after this many times the
block, so that a few bytes of hostile commands cannot buy minutes of work."""

_DISCARD = bytes(
    value | PageState.DISCARDED if value & (PageState.ZERO | PageState.DATA) else value
    for value in range(256)
)


class RamMap:
    """All blocks of one migration, in the order of the block list."""

    def __init__(self) -> None:
        self._blocks: dict[str, BlockState] = {}
        self._map_bytes = 0
        self.target_page_bytes = 0

    def __iter__(self) -> Iterator[BlockState]:
        return iter(self._blocks.values())

    def get(self, idstr: str) -> BlockState | None:
        """The block of that name, if the stream listed it."""
        return self._blocks.get(idstr)

    def start(self, target_page_bytes: int) -> None:
        """A block list comes; its blocks have target pages of this size."""
        self.target_page_bytes = target_page_bytes

    def add(self, block: RamSetupBlock) -> BlockState:
        """Take over one entry of the block list."""
        state = BlockState(
            block.idstr,
            block.used_length,
            block.page_size or self.target_page_bytes,
            self.target_page_bytes,
            block.gpa,
            block.mapped_ram,
        )
        if self._map_bytes + state.page_count <= PAGE_MAP_BYTES_MAX:
            self._map_bytes += state.page_count
            state.states = bytearray(state.page_count)
        self._blocks[block.idstr] = state
        return state


def _runs(states: bytes | bytearray) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(states):
        value = states[at]
        # strip() runs at memory speed, a Python loop over a quarter of a million pages does not.
        rest = len(states) - at
        step = 4 << 10
        end = at
        while end < len(states):
            part = states[end : end + step]
            same = len(part) - len(part.lstrip(bytes([value])))
            end += same
            if same < len(part):
                break
            step = min(step * 2, rest)
        yield value, end - at
        at = end
