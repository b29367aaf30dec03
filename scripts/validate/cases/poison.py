"""POISON: pages that raise SIGBUS when touched."""

import os

from scripts.validate import raw
from scripts.validate.actors import running
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL
from uffd import Advice, Feature, Mode, PageFault, Userfaultfd, touch
from uffd.events import Event
from uffd.touch import AccessFault

_SIGBUS, _ADRERR, _MCEERR_AR = 7, 2, 4
_PAGES = 6


def _signal_at(address: int) -> AccessFault | None:
    try:
        touch.guarded_load(address)
    except AccessFault as fault:
        return fault
    return None


@case("unit", on=ALL, needs=[feature(Feature.POISON)], needs_of=mode(Mode.MISSING))
def poison(bench: Bench) -> None:
    """The handler poisons every other page and copies the rest: SIGBUS for exactly the poisoned
    half, right contents for the others.
    """
    uffd, memory = bench.registered(pages=_PAGES)
    size = memory.page_size

    def answer(context: Userfaultfd, event: Event) -> None:
        assert isinstance(event, PageFault)
        index = (event.address - memory.address) // size
        if index % 2:
            same(context.poison(event.address, size), size, "bytes poisoned")
        else:
            context.copy(event.address, bench.page(index))

    with touch.guarded_accesses(), running(uffd, answer):
        for i in range(_PAGES):
            fault = _signal_at(memory.page(i) + 3)
            expect((fault is not None) == bool(i % 2), f"SIGBUS for page {i} iff poisoned")
            if fault is None:
                bench.holds(memory, i, bench.page(i))
                continue
            same((fault.signal, fault.address), (_SIGBUS, memory.page(i) + 3), "signal")
            expect(fault.code in (_ADRERR, _MCEERR_AR), f"si_code {fault.code} is known")
    code = "BUS_ADRERR" if fault is not None and fault.code == _ADRERR else "BUS_MCEERR_AR"
    bench.remark(f"si_code of a poisoned page: {code}")


@case("unit", on=ALL, needs=[feature(Feature.POISON)], needs_of=mode(Mode.MISSING))
def poison_cleared(bench: Bench) -> None:
    """A COPY onto a poisoned page and DONTNEED clear the poison; system calls on it fail with
    EFAULT; POISON where anything is says that it exists.
    """
    uffd, memory = bench.registered()
    size = memory.page_size
    uffd.poison(memory)
    _, writer = os.pipe()
    same(raw.write(writer, memory.address, 8), -14, "write(2) of a poisoned page")
    same(raw.readv(os.getpid(), memory.address, 8)[0], -14, "process_vm_readv of a poisoned page")
    words = (memory.address, size, 0)
    got = raw.place(uffd.fileno(), raw.POISON, words)
    same(got, raw.Placed(17, -17), "POISON of a poisoned page")
    same(uffd.copy(memory.address, bench.page(0)), size, "COPY onto a poisoned page")
    bench.holds(memory, 0, bench.page(0))
    memory.advise(Advice.DONTNEED, size, size)
    same(uffd.copy(memory.page(1), bench.page(1)), size, "COPY after DONTNEED")
    bench.holds(memory, 1, bench.page(1))
    with touch.guarded_accesses():
        expect(_signal_at(memory.page(2)) is not None, "the others are poisoned still")
