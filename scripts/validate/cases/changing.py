"""While an event waits to be read, every operation that would place pages says "again"."""

from scripts.validate import raw
from scripts.validate.actors import PATIENCE_S, Sleeper, next_event
from scripts.validate.bench import Bench, marked
from scripts.validate.case import case
from scripts.validate.check import expect, refused, same
from scripts.validate.host import feature, mode
from scripts.validate.kinds import ALL
from scripts.validate.raw import Placed
from uffd import Advice, Feature, Mode, Remove

_EAGAIN = 11


_Operation = tuple[int, tuple[int, ...]]


def _operations(bench: Bench, target: int, source: int, size: int) -> dict[str, _Operation]:
    """Number and input words of each operation that this memory and kernel have."""
    found: dict[str, _Operation] = {
        "COPY": (raw.COPY, (target, source, size, 0)),
    }
    if not bench.kind.is_hugetlb:
        found["ZEROPAGE"] = (raw.ZEROPAGE, (target, size, 0))
    if Feature.POISON in bench.features:
        found["POISON"] = (raw.POISON, (target, size, 0))
    if bench.kind.has_minor and bench.kind.minor_feature in bench.features:
        found["CONTINUE"] = (raw.CONTINUE, (target, size, 0))
    if Feature.MOVE in bench.features:
        found["MOVE"] = (raw.MOVE, (target, source, size, 0))
    return found


@case("unit", on=ALL, needs=[feature(Feature.EVENT_REMOVE)], needs_of=mode(Mode.MISSING))
def mmap_changing(bench: Bench) -> None:
    """While a DONTNEED waits for its remove event to be read, COPY, ZEROPAGE, MOVE, POISON and
    CONTINUE each fail with "again" and write that same code into their output field, whatever it
    held before; once it is read they work.
    """
    uffd, memory = bench.registered(features=Feature.EVENT_REMOVE)
    source = bench.map(1)
    source.write(0, bench.page(0))
    size = memory.page_size
    uffd.copy(memory.page(3), bench.page(3))
    remover = Sleeper(lambda: memory.advise(Advice.DONTNEED, 3 * size, size))
    expect(uffd.wait(PATIENCE_S), "the remove message waits to be read")
    for name, (number, words) in _operations(bench, memory.address, source.address, size).items():
        for preset in (0, raw.PRESET, -1, size):
            got = raw.place(uffd.fileno(), number, words, preset)
            expected = Placed(_EAGAIN, -_EAGAIN)
            same(got, expected, f"{name} with output preset to {preset}")
    expect(remover.is_asleep, "DONTNEED waits for the reading of its message")
    same(next_event(uffd), Remove(memory.page(3), memory.page(3) + size), "message")
    remover.join("DONTNEED")
    same(uffd.copy(memory.address, bench.page(0)), size, "COPY afterwards")
    bench.holds(memory, 0, bench.page(0))


@case("unit", on=ALL, needs=[feature(Feature.EVENT_REMOVE)], needs_of=mode(Mode.WP))
def mmap_changing_wp(bench: Bench) -> None:
    """The same for WRITEPROTECT: "again", and nothing was done."""
    uffd, memory = bench.registered(Mode.WP, Feature.EVENT_REMOVE, pages=2)
    size = memory.page_size
    memory.write(0, bench.page(0) + bench.page(1))
    remover = Sleeper(lambda: memory.advise(Advice.DONTNEED, size, size))
    expect(uffd.wait(PATIENCE_S), "the remove message waits to be read")
    with refused(_EAGAIN, what="WRITEPROTECT while an event waits"):
        uffd.write_protect(memory.address, size)
    same(marked(memory)[0], False, "mark")
    next_event(uffd)
    remover.join("DONTNEED")
    uffd.write_protect(memory.address, size)
    same(marked(memory)[0], True, "mark afterwards")
