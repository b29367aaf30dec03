"""Real memory under random operations, each checked against the model as it happens.

One driver thread decides everything from the seed; the threads only sleep and wake. What happens at
the same time (waiters, two COPYs to one page, a removal that waits for its message) has one
outcome in the model, so a seed replays the same steps on every kernel.
"""

import random
from collections.abc import Callable
from functools import partial

from scripts.validate.actors import PATIENCE_S, Sleeper, in_child, next_event, next_fault
from scripts.validate.bench import entry
from scripts.validate.check import CheckFailed, expect, refused, same
from scripts.validate.kinds import ANON, Kind, page_bytes
from scripts.validate.stress.model import Asleep, Model
from uffd import (
    Advice,
    Feature,
    Mapping,
    Mode,
    PageAlreadyPresent,
    Remove,
    Userfaultfd,
    touch,
)

_EAGAIN, _EBUSY = 11, 16
_TRACE_SHOWN = 25


class World:
    """Memory of one kind, its context, the model, and the pool of pages to move in."""

    def __init__(self, kind: Kind, features: Feature, rng: random.Random, threads: int) -> None:
        self.kind, self.rng, self.threads = kind, rng, threads
        self.size = kind.page_size
        pages, pool = (4, 0) if kind.is_hugetlb else (24, 8)
        self.memory = kind.map(pages)
        self.pool: Mapping | None = ANON.map(pool) if self._can_move(features) and pool else None
        self.model = Model.of(pages, pool if self.pool else 0)
        wanted = features & Feature.EVENT_REMOVE
        self.uffd = Userfaultfd.open(wanted, user_mode_only=False)
        self.has_wp = kind.wp_feature in features
        self.mode = Mode.MISSING | (Mode.WP if self.has_wp else Mode(0))
        self.uffd.register(self.memory, self.mode)
        self.trace: list[str] = []
        self._sleepers: dict[int, Sleeper] = {}
        self._salt = 0

    def _can_move(self, features: Feature) -> bool:
        return Feature.MOVE in features and not self.kind.is_file

    def fresh(self) -> bytes:
        """Contents that no other page had."""
        self._salt += 1
        return page_bytes(self.rng.randrange(251), self.size, self._salt)

    def note(self, text: str) -> None:
        self.trace.append(text)

    # -- sleeping and waking ----------------------------------------------------------------------

    def _release(self, index: int, awake: list[Asleep]) -> None:
        """Who goes on must: loads see the page, stores change it; the others are told of again."""
        contents = self.model.pages[index].contents
        assert contents is not None
        for sleeper in (s for s in awake if s.value is None):
            got = self._sleepers.pop(sleeper.token).join(f"a load of page {index}")
            # A store of another waiter may come first.
            written = {s.value for s in awake if s.offset == sleeper.offset}
            expect(got in {contents[sleeper.offset], *written}, f"load of page {index}: {got}")
        for sleeper in (s for s in awake if s.value is not None):
            self._sleepers.pop(sleeper.token).join(f"a store to page {index}")
        for sleeper in (s for s in awake if s.value is not None):
            self.model.store(sleeper)
        for _ in self.model.sleepers_on(index):
            self._expect_fault(index, is_write=True, is_protect=True)
        self._check_page(index)

    def _expect_fault(self, index: int, *, is_write: bool, is_protect: bool) -> None:
        fault = next_fault(self.uffd)
        got = (fault.address, fault.is_write, fault.is_write_protect)
        same(got, (self.memory.page(index), is_write, is_protect), f"message of page {index}")

    def _check_page(self, index: int) -> None:
        contents = self.model.pages[index].contents
        assert contents is not None
        got = self.memory.read(index * self.size, self.size)
        same(got, bytes(contents), f"contents of page {index}")

    # -- operations -------------------------------------------------------------------------------

    def copy(self) -> None:
        """COPY, protected or not, to any page."""
        index = self.rng.randrange(self.memory.page_count)
        self._copy(index)

    def _copy(self, index: int) -> None:
        data = self.fresh()
        protect = self.has_wp and self.rng.random() < 0.3
        self.note(f"copy page {index}{' protected' if protect else ''}")
        if self.model.pages[index].contents is not None:
            self._must_exist(index, lambda: self.uffd.copy(self.memory.page(index), data))
            return
        placed = self.uffd.copy(self.memory.page(index), data, write_protect=protect)
        same(placed, self.size, "bytes placed")
        self._release(index, self.model.arrive(index, data, protected=protect))

    def _must_exist(self, index: int, action: Callable[[], object]) -> None:
        """The binding wakes the page's sleepers then; a writer sleeps on, and is told of again."""
        try:
            action()
        except PageAlreadyPresent:
            for _ in self.model.sleepers_on(index):
                self._expect_fault(index, is_write=True, is_protect=True)
            return
        raise CheckFailed("placing a page that is there succeeded")

    def zeropage(self) -> None:
        """ZEROPAGE to any page."""
        index = self.rng.randrange(self.memory.page_count)
        self.note(f"zeropage page {index}")
        if self.model.pages[index].contents is not None:
            self._must_exist(index, lambda: self.uffd.zeropage(self.memory.page(index), self.size))
            return
        same(self.uffd.zeropage(self.memory.page(index), self.size), self.size, "bytes placed")
        self._release(index, self.model.arrive(index, bytes(self.size)))

    def move(self) -> None:
        """Fill a page of the pool if need be, and MOVE it to a missing page."""
        absent = self.model.absent()
        assert self.pool is not None
        if not absent:
            return
        index, source = self.rng.choice(absent), self.rng.randrange(len(self.model.pool))
        contents = self.model.pool[source]
        if contents is None or (not self.model.is_exclusive[source] and self.rng.random() < 0.5):
            contents = self.fresh()
            self.pool.write(source * self.size, contents)
            self.model.pool[source], self.model.is_exclusive[source] = contents, True
        addresses = self.memory.page(index), self.pool.page(source), self.size
        self.note(f"move page {index} from {source}")
        if not self.model.is_exclusive[source]:
            with refused(_EBUSY, what="MOVE of a page shared by a fork"):
                self.uffd.move(*addresses)
            return
        same(self.uffd.move(*addresses), self.size, "bytes moved")
        expect(not entry(self.pool.page(source)).is_present, "the source is a hole")
        self.model.pool[source] = None
        self._release(index, self.model.arrive(index, contents))

    def protect(self) -> None:
        """Write-protect a page that is there, or allow writes again."""
        present = self.model.present()
        if not present:
            return
        index = self.rng.choice(present)
        address = self.memory.page(index)
        if self.model.pages[index].is_protected:
            self.note(f"unprotect page {index}")
            self.uffd.write_unprotect(address, self.size)
            self._release(index, self.model.unprotect(index))
        else:
            self.note(f"protect page {index}")
            self.uffd.write_protect(address, self.size)
            self.model.pages[index].is_protected = True

    def touch(self) -> None:
        """A thread loads or stores a byte anywhere; it sleeps if the model says so."""
        index = self.rng.randrange(self.memory.page_count)
        offset = self.rng.randrange(self.size)
        value = self.rng.randrange(256) if self.rng.random() < 0.5 else None
        page = self.model.pages[index]
        sleeps = page.contents is None or (page.is_protected and value is not None)
        if sleeps and len(self.model.asleep) >= self.threads:
            self.answer()
            return
        self.note(f"{'load' if value is None else 'store'} page {index}")
        address = self.memory.page(index) + offset
        asleep = Asleep(len(self.trace), index, offset, value)
        if value is None:
            sleeper = Sleeper(lambda: touch.load(address))
        else:
            sleeper = Sleeper(lambda: touch.store(address, value))
        if sleeps:
            protect = page.contents is not None
            self._expect_fault(index, is_write=value is not None, is_protect=protect)
            self.model.asleep.append(asleep)
            self._sleepers[asleep.token] = sleeper
            return
        assert page.contents is not None
        got = sleeper.join("an access to a page that is there")
        if value is None:
            same(got, page.contents[offset], f"byte {offset:#x} of page {index}")
        else:
            self.model.store(asleep)

    def answer(self) -> None:
        """Let one of the sleepers go on."""
        if not self.model.asleep:
            return
        index = self.rng.choice(self.model.asleep).page
        if self.model.pages[index].contents is None:
            self._copy(index)
        else:
            self.note(f"unprotect page {index} for its writer")
            self.uffd.write_unprotect(self.memory.page(index), self.size)
            self._release(index, self.model.unprotect(index))

    def race(self) -> None:
        """Two threads COPY different contents to one missing page: exactly one wins."""
        absent = self.model.absent()
        if not absent:
            return
        index = self.rng.choice(absent)
        address, offers = self.memory.page(index), [self.fresh(), self.fresh()]
        self.note(f"race for page {index}")

        def offer(data: bytes) -> bool:
            try:
                return self.uffd.copy(address, data) == self.size
            except PageAlreadyPresent:
                return False

        racers = [Sleeper(partial(offer, data)) for data in offers]
        won = [racer.join("a racing COPY") for racer in racers]
        same(sorted(map(bool, won)), [False, True], "one of two COPYs to one page wins")
        self._release(index, self.model.arrive(index, offers[won.index(True)]))

    def remove(self) -> None:
        """madvise some pages away; until the event is read nothing can be placed."""
        first = self.rng.randrange(self.memory.page_count)
        count = self.rng.randint(1, min(4, self.memory.page_count - first))
        touched = range(first, first + count)
        if any(self.model.sleepers_on(i) for i in touched if i in self.model.present()):
            return  # a writer asleep on a protected page would have to be woken by hand
        start, length = self.memory.page(first), count * self.size
        self.note(f"remove pages {first}+{count}")
        if self.kind.is_file:
            # Their protection would stay behind as markers.
            for i in touched:
                if self.model.pages[i].is_protected:
                    self.uffd.write_unprotect(self.memory.page(i), self.size)
        advice = Advice.REMOVE if self.kind.is_shared else Advice.DONTNEED
        remover = Sleeper(lambda: self.memory.advise(advice, first * self.size, length))
        if Feature.EVENT_REMOVE in self.uffd.features:
            expect(self.uffd.wait(PATIENCE_S), "the removal is reported")
            with refused(_EAGAIN, what="COPY while the removal waits to be read"):
                self.uffd.copy(self.memory.address, bytes(self.size))
            same(next_event(self.uffd), Remove(start, start + length), "message of the removal")
        remover.join("the removal")
        for i in touched:
            self.model.forget(i)

    def fork(self) -> None:
        """A child (unregistered) sees every page that is there, may write, and changes nothing."""
        self.note("fork")
        present = self.model.present()
        absent = [] if self.kind.is_file else self.model.absent()

        def child() -> None:
            for i in present:
                self._check_page(i)
            for i in absent[:4]:
                got = self.memory.read(i * self.size, self.size)
                same(got, bytes(self.size), f"missing page {i} in the child")
            if present and not self.kind.is_shared and not self.kind.is_hugetlb:
                self.memory.store(present[0] * self.size, 0x77)

        in_child(child)
        self.model.fork()

    def mremap(self) -> None:
        """Move everything elsewhere and register it again: contents stay, protection goes."""
        if self.model.asleep:
            return
        self.note("mremap")
        self.memory = self.memory.remap()
        self.uffd.register(self.memory, self.mode)
        for page in self.model.pages:
            page.is_protected = False

    # -- all of it --------------------------------------------------------------------------------

    def operations(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [self.copy, self.touch, self.touch, self.touch]
        found += [self.answer, self.race, self.remove, self.fork, self.mremap]
        if not self.kind.is_hugetlb:
            found.append(self.zeropage)
        if self.pool is not None:
            found += [self.move, self.move]
        if self.has_wp:
            found += [self.protect, self.protect]
        return found

    def check(self) -> None:
        """Page tables and the queue against the model."""
        for i, page in enumerate(self.model.pages):
            got = entry(self.memory.page(i))
            expected = (page.contents is not None, page.is_protected)
            same((got.is_present, got.is_write_protected), expected, f"page table of page {i}")
        same(self.uffd.queue_depth().total, len(self.model.asleep), "threads asleep")
        same(self.uffd.read_events(), [], "messages nobody expects")

    def run(self, steps: int) -> None:
        """:raises CheckFailed: with the last steps in its text."""
        try:
            for _ in range(steps):
                self.rng.choice(self.operations())()
                self.check()
            while self.model.asleep:
                self.answer()
            for i in self.model.present():
                self._check_page(i)
        except (CheckFailed, OSError) as error:
            shown = "\n  ".join(self.trace[-_TRACE_SHOWN:])
            raise CheckFailed(f"{error}\nlast steps:\n  {shown}") from error
