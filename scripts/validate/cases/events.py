"""Events of a process that forks, remaps and removes, served by a monitor in another process."""

from dataclasses import dataclass, field

from scripts.validate.actors import Channel, Subject, in_child, running
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL, page_bytes
from uffd import (
    Advice,
    Feature,
    Fork,
    Mapping,
    Mode,
    PageAlreadyPresent,
    PageFault,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
)
from uffd.events import Event

_EVENTS = Feature.EVENT_FORK | Feature.EVENT_REMAP | Feature.EVENT_REMOVE | Feature.EVENT_UNMAP
_PAGES = 4


def _touch_half(memory: Mapping, first: int, write: bool) -> None:
    """Read (and write) half of the pages; each must hold what the monitor gives."""
    size = memory.page_size
    for i in range(first, first + _PAGES // 2):
        expected = page_bytes(i, size)
        same(memory.read(i * size, size), expected, f"contents of page {i}")
        if write:
            memory.store(i * size + 5, 0xEE)
            same(memory.load(i * size + 5), 0xEE, f"byte written to page {i}")


def _life(memory: Mapping, write: bool) -> None:
    """What the forked process does with its inherited range."""
    _touch_half(memory, 0, write)
    memory = memory.remap()
    _touch_half(memory, _PAGES // 2, write)
    same(memory.load(memory.length - 1), page_bytes(_PAGES - 1, memory.page_size)[-1], "last byte")
    if memory.is_shared:
        memory.advise(Advice.REMOVE)  # DONTNEED would keep a shared file's pages
    else:
        memory.advise(Advice.DONTNEED)


@dataclass
class Monitor:
    """Where the range is now, as the events tell, and how to answer the faults of every process."""

    kind_page: int
    starts: dict[int, int]
    protect: bool
    zeros: bool = False
    removes: list[Remove] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    protected: list[int] = field(default_factory=list)

    def place(self, uffd: Userfaultfd, fault: PageFault) -> None:
        size = self.kind_page
        start = self.starts[uffd.fileno()]
        index = (fault.address - start) // size
        expect(0 <= index < _PAGES, f"a fault inside the range, not at {fault.address:#x}")
        if fault.is_write_protect:
            self.protected.append(index)
            uffd.write_unprotect(fault.address, size)
            return
        if self.removes:
            uffd.copy(fault.address, bytes(size))
            return
        self.missing.append(index)
        try:
            uffd.copy(fault.address, page_bytes(index, size), write_protect=self.protect)
        except PageAlreadyPresent:
            expect(False, f"page {index} is asked for once")


def _serve(bench: Bench, protect: bool) -> None:
    size = bench.kind.page_size
    wanted = _EVENTS | (Feature.PAGEFAULT_FLAG_WP if protect else Feature.NONE)
    register = Mode.MISSING | (Mode.WP if protect else Mode(0))

    def body(channel: Channel) -> None:
        uffd, memory = bench.registered(register, wanted, pages=_PAGES)
        channel.say("uffd", [uffd.fileno()])
        channel.say(memory.address)
        expect(channel.hear() == "go", "the monitor is ready")
        in_child(lambda: _child(memory))

    def _child(memory: Mapping) -> None:
        _life(memory, protect)

    subject = Subject(body)
    uffd = subject.uffd()
    start = subject.channel.hear()
    assert isinstance(start, int)
    monitor = Monitor(size, {uffd.fileno(): start}, protect)
    children: list[Userfaultfd] = []
    moves: list[Remap] = []
    gone: list[Unmap] = []

    def answer(context: Userfaultfd, event: Event) -> None:
        match event:
            case Fork(child):
                children.append(child)
                monitor.starts[child.fileno()] = start
                server.add(child)
            case Remap():
                moves.append(event)
                monitor.starts[context.fileno()] = event.destination
            case Remove():
                monitor.removes.append(event)
            case Unmap():
                gone.append(event)
            case PageFault():
                monitor.place(context, event)

    with running(uffd, answer) as server:
        subject.channel.say("go")
        subject.result()
    same(len(children), 1, "fork messages")
    length = _PAGES * size
    same([(m.source, m.length) for m in moves], [(start, length)], "remap messages")
    where = moves[0].destination
    same([(r.start, r.end) for r in monitor.removes], [(where, where + length)], "remove messages")
    same((gone[0].start, gone[0].end), (start, start + length), "the unmap that follows a remap")
    same(sorted(monitor.missing), list(range(_PAGES)), "missing faults, one per page")
    if protect:
        same(sorted(monitor.protected), list(range(_PAGES)), "write-protect faults")


@case("unit", on=ALL, needs=[feature(_EVENTS)], needs_of=mode(Mode.MISSING))
def events(bench: Bench) -> None:
    """A forked process touches half its range, moves it elsewhere, touches the rest and removes
    everything; a monitor serves all of it: one message for each, as many missing faults as pages.
    """
    _serve(bench, protect=False)


@case("unit", on=ALL, needs=[feature(_EVENTS)], needs_of=mode(Mode.MISSING, Mode.WP))
def events_wp(bench: Bench) -> None:
    """The same, with pages that arrive protected: every write gives a WP message first."""
    _serve(bench, protect=True)


@case("unit", on=ALL, needs=[feature(_EVENTS)], needs_of=mode(Mode.MISSING))
def events_zeros(bench: Bench) -> None:
    """What was removed faults as missing again and reads as the zeros the monitor gives; munmap
    reports the whole range.
    """
    size = bench.kind.page_size

    def body(channel: Channel) -> None:
        uffd, memory = bench.registered(Mode.MISSING, _EVENTS, pages=2)
        channel.say("uffd", [uffd.fileno()])
        same(memory.read(size, size), page_bytes(1, size), "contents of page 1")
        memory.advise(Advice.REMOVE if memory.is_shared else Advice.DONTNEED)
        same(memory.read(0, 2 * size), bytes(2 * size), "contents after the removal")
        memory.close()

    subject = Subject(body)
    uffd = subject.uffd()
    seen: list[Event] = []

    def answer(context: Userfaultfd, event: Event) -> None:
        seen.append(event)
        if isinstance(event, PageFault):
            removed = any(isinstance(e, Remove) for e in seen)
            context.copy(event.address, bytes(size) if removed else page_bytes(1, size))

    with running(uffd, answer):
        subject.result()
    names = [type(event).__name__ for event in seen]
    same(names, ["PageFault", "Remove", "PageFault", "PageFault", "Unmap"], "messages in order")
    last = seen[-1]
    assert isinstance(last, Unmap)
    same(last.length, 2 * size, "length unmapped")
