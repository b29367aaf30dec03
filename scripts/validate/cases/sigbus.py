"""The SIGBUS feature: no messages, the faulting thread resolves its own faults."""

from scripts.validate import raw
from scripts.validate.actors import Channel, Subject, in_child, next_event
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, refuses, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL, Kind, pattern
from uffd import Feature, Fork, Mapping, Mode, Userfaultfd, touch
from uffd.touch import AccessFault, Resolver

_SIGBUS, _ADRERR = 7, 2
_PAGES = 3


def _stopped(action: object, address: int, what: str) -> None:
    """The access must raise SIGBUS for exactly ``address``."""
    assert callable(action)
    try:
        action()
    except AccessFault as fault:
        same((fault.signal, fault.code, fault.address), (_SIGBUS, _ADRERR, address), what)
    else:
        expect(False, f"{what}: the access went through")


def _touch_all(uffd: Userfaultfd, memory: Mapping, kind: Kind) -> None:
    """First touches: one SIGBUS each, resolved in the handler; second touches: none."""
    for i in range(_PAGES):
        contents = bytearray(pattern(memory, i, 1))
        fix = Resolver(uffd.fileno(), kind.page_size, raw.buffer_address(contents))
        value, hits = touch.guarded_load(memory.page(i) + 9, fix)
        same((value, hits), (contents[9], 1), f"first touch of page {i}: byte, signals")
        same(touch.guarded_load(memory.page(i) + 9), (contents[9], 0), "second touch")


@case("unit", on=ALL, needs=[feature(Feature.SIGBUS)], needs_of=mode(Mode.MISSING))
def sigbus(bench: Bench) -> None:
    """Each first touch raises SIGBUS at the exact byte; the handler copies the page and the access
    is retried with success, once per page; system calls get EFAULT; the reader sees no message.
    """
    uffd, memory = bench.registered(features=Feature.SIGBUS, pages=_PAGES + 1)
    with touch.guarded_accesses():
        _touch_all(uffd, memory, bench.kind)
        last = memory.page(_PAGES) + 77
        _stopped(lambda: touch.guarded_load(last), last, "touch without a resolver")
    same(memory.read(0, _PAGES * memory.page_size), pattern(memory, 0, _PAGES), "contents")
    with open("/dev/zero", "rb") as zeros:
        got = raw.syscall(raw.SYS_READ, zeros.fileno(), last, 1)
        refuses(got, 14, "read(2) into a missing page")
    same(uffd.read_events(), [], "messages")


@case(
    "unit",
    on=ALL,
    needs=[feature(Feature.SIGBUS | Feature.EVENT_FORK)],
    needs_of=mode(Mode.MISSING),
)
def sigbus_fork(bench: Bench) -> None:
    """In a fork child (fork event) every touch of a missing page raises SIGBUS; the monitor sees
    the fork and no page fault.
    """

    def body(channel: Channel) -> None:
        uffd, memory = bench.registered(features=Feature.SIGBUS | Feature.EVENT_FORK, pages=_PAGES)
        channel.say("uffd", [uffd.fileno()])

        def child() -> None:
            with touch.guarded_accesses():
                for i in range(_PAGES):
                    at = memory.page(i) + i
                    _stopped(lambda at=at: touch.guarded_load(at), at, f"touch of page {i}")

        in_child(child)

    subject = Subject(body)
    uffd = subject.uffd()
    event = next_event(uffd)
    expect(isinstance(event, Fork), f"a fork message, not {event}")
    assert isinstance(event, Fork)
    subject.result()
    same(event.child.read_events() + uffd.read_events(), [], "page-fault messages")


@case("unit", on=ALL, needs=[feature(Feature.SIGBUS)], needs_of=mode(Mode.MISSING, Mode.WP))
def sigbus_wp(bench: Bench) -> None:
    """With write protection: the write to a protected page raises SIGBUS too, reads pass, and
    unprotecting clears it.
    """
    uffd, memory = bench.registered(Mode.MISSING | Mode.WP, Feature.SIGBUS, pages=_PAGES)
    with touch.guarded_accesses():
        _touch_all(uffd, memory, bench.kind)
        uffd.write_protect(memory)
        for i in range(_PAGES):
            at = memory.page(i) + 11
            expected = pattern(memory, i, 1)[11]
            same(touch.guarded_load(at), (expected, 0), "read of a protected page")
            _stopped(lambda at=at: touch.guarded_store(at, 1), at, "write to a protected page")
            uffd.write_unprotect(memory.page(i), memory.page_size)
            same(touch.guarded_store(at, 1), 0, "signals of a write once unprotected")
    same([memory.load(i * memory.page_size + 11) for i in range(_PAGES)], [1] * _PAGES, "bytes")
    same(uffd.read_events(), [], "messages")
