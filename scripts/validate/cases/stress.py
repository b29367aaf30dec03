"""Racing threads over memory that changes place: faults inside lock code, a background copier."""

import os
import random
import select
import threading
from dataclasses import dataclass, field

from scripts.validate import raw
from scripts.validate.actors import PATIENCE_S
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import Tally, expect, same
from scripts.validate.host import mode
from scripts.validate.kinds import ALL
from uffd import (
    Advice,
    Mapping,
    Mode,
    PageAlreadyPresent,
    PageFault,
    Userfaultfd,
    punch_hole,
    touch,
)

# What a page holds: an unlocked mutex (zeros), a counter, and a copy of it that the counter is
# checked against; the rest is filler that must arrive with them.
_MUTEX, _COUNTER, _FILLER = 0, 64, 128
_SEED = 20231
_BOUNCES = 3


@dataclass
class Arena:
    """Two areas that change places; ``counters`` is what each page must have counted."""

    source: Mapping
    target: Mapping
    uffd: Userfaultfd
    protect: bool
    counters: list[int] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)
    duplicates: int = 0
    wp_faults: int = 0
    is_over: bool = False
    failure: BaseException | None = None

    def place(self, index: int) -> None:
        """Copy a page from the other area, whoever is first."""
        size = self.target.page_size
        address = self.target.page(index)
        try:
            self.uffd.copy(address, self.source.page(index), size, write_protect=self.protect)
        except PageAlreadyPresent:
            self.duplicates += 1
            return
        self.arrived.add(index)
        try:
            self.uffd.copy(address, self.source.page(index), size)
        except PageAlreadyPresent:
            Tally.made += 1
            return
        expect(False, f"a second COPY to page {index} says that it exists")


def _guarded(arena: Arena, body: object) -> threading.Thread:
    assert callable(body)

    def run() -> None:
        try:
            body()
        except BaseException as error:
            arena.failure = arena.failure or error
            arena.is_over = True

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _count(arena: Arena, rng: random.Random, lock: threading.Lock, in_order: bool) -> None:
    """Lock the mutex inside a page, check its counter, add one; until every page was seen."""
    pages = arena.target.page_count
    order = list(range(pages)) if in_order else [rng.randrange(pages) for _ in range(2 * pages)]
    for index in order + [rng.randrange(pages) for _ in range(pages // 2)]:
        if arena.is_over:
            return
        at = arena.target.page(index)
        raw.mutex_lock(at + _MUTEX)
        value = touch.load_u64(at + _COUNTER)
        with lock:
            same(value, arena.counters[index], f"counter in page {index}")
            arena.counters[index] += 1
        touch.store_u64(at + _COUNTER, value + 1)
        raw.mutex_unlock(at + _MUTEX)


def _serve(arena: Arena, stop: int, by_poll: bool) -> None:
    while not arena.is_over:
        poller = select.poll()
        poller.register(stop, select.POLLIN)
        poller.register(arena.uffd.fileno(), select.POLLIN)
        ready = [fd for fd, _ in poller.poll()]
        if stop in ready:
            return
        for event in arena.uffd.read_events(64 if by_poll else 1):
            expect(isinstance(event, PageFault), f"a page fault, not {event}")
            assert isinstance(event, PageFault)
            if event.is_write_protect:
                arena.wp_faults += 1
                arena.uffd.write_unprotect(event.address, arena.target.page_size)
                continue
            arena.place((event.address - arena.target.address) // arena.target.page_size)


def _bounce(arena: Arena, bounce: int, rng: random.Random) -> None:
    pages = arena.target.page_count
    arena.uffd.register(arena.target, Mode.MISSING | (Mode.WP if arena.protect else Mode(0)))
    arena.arrived.clear()
    lock, stop = threading.Lock(), os.eventfd(0)
    server = _guarded(arena, lambda: _serve(arena, stop, by_poll=bool(bounce & 1)))
    seeds = [rng.random() for _ in range(os.cpu_count() or 1)]
    in_order = bool(bounce & 2)
    counters = [
        _guarded(arena, lambda s=s: _count(arena, random.Random(s), lock, in_order)) for s in seeds
    ]

    def copy_all() -> None:
        for index in range(pages):
            arena.place(index)

    copier = _guarded(arena, copy_all)
    for thread in (*counters, copier):
        thread.join(PATIENCE_S)
        if arena.failure is None:
            expect(not thread.is_alive(), "every thread goes on")
    os.eventfd_write(stop, 1)
    server.join(PATIENCE_S)
    if arena.failure is not None:
        raise arena.failure
    same(arena.arrived, set(range(pages)), "pages that arrived")


def _settle(arena: Arena) -> None:
    """Check the whole area, then empty the old one and let them change places."""
    size = arena.target.page_size
    for index, expected in enumerate(arena.counters):
        got = arena.target.read(index * size, size)
        same(int.from_bytes(got[_COUNTER : _COUNTER + 8], "little"), expected, f"page {index}")
        same(got[_FILLER:], bytes([index % 251 + 1]) * (size - _FILLER), f"filler of {index}")
    arena.uffd.unregister(arena.target)
    _empty(arena.source)
    arena.source, arena.target = arena.target, arena.source


def _empty(memory: Mapping) -> None:
    """Make every page missing again; a private file mapping has pages in its file too (the first
    write put them there before it copied them).
    """
    if not memory.is_shared:
        memory.advise(Advice.DONTNEED)
    if memory.fd is not None:
        punch_hole(memory.fd, 0, memory.length)


def _stress(bench: Bench, *, protect: bool) -> None:
    rng = random.Random(_SEED)
    pages = 4 if bench.kind.is_hugetlb else 128
    arena = Arena(bench.map(pages), bench.map(pages), bench.open(), protect)
    size = arena.source.page_size
    for index in range(pages):
        filler = bytes([index % 251 + 1]) * (size - _FILLER)
        arena.source.write(index * size, bytes(_FILLER) + filler)
    arena.counters = [0] * pages
    for bounce in range(_BOUNCES + 1):
        _bounce(arena, bounce, rng)
        _settle(arena)
    written = sum(arena.counters)
    expect(written >= 2 * pages, f"the threads counted ({written})")
    if protect:
        expect(arena.wp_faults > 0, "writes to protected pages were reported")


@case("stress", on=ALL, needs_of=mode(Mode.MISSING), timeout_s=60)
def stress(bench: Bench) -> None:
    """One thread per processor locks a mutex inside a random page and counts, one serves faults
    (polling and reading by turns), one copies everything in the background; then the areas change
    places. No count and no byte is lost; a second COPY always says that the page exists.
    """
    _stress(bench, protect=False)


@case("stress", on=ALL, needs_of=mode(Mode.MISSING, Mode.WP), timeout_s=60)
def stress_wp(bench: Bench) -> None:
    """The same with every page arriving protected: the first write to each is reported too."""
    _stress(bench, protect=True)
