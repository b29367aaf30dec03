"""ZEROPAGE."""

import errno

from scripts.validate import raw
from scripts.validate.actors import loading, next_fault, storing
from scripts.validate.bench import Bench, present
from scripts.validate.case import case
from scripts.validate.check import same
from scripts.validate.host import mode
from scripts.validate.kinds import ALL
from scripts.validate.raw import Placed
from uffd import Ioctls, Mode


@case("unit", on=ALL, needs_of=mode(Mode.MISSING))
def zeropage(bench: Bench) -> None:
    """Fills a missing page with zeros and wakes its reader; a second one says that it exists; an
    uneven range reports the partial count. On hugetlb it is not offered, and refused.
    """
    uffd, memory = bench.open(), bench.map(4)
    offered = Ioctls.ZEROPAGE in uffd.register(memory).ioctls
    same(offered, not bench.kind.is_hugetlb, "ZEROPAGE offered")
    size = memory.page_size

    def zero(first: int, count: int) -> Placed:
        words = (memory.page(first), count * size, 0)
        return raw.place(uffd.fileno(), raw.ZEROPAGE, words)

    if not offered:
        same(zero(0, 1).error, errno.EINVAL, "ZEROPAGE on hugetlb")
        same(present(memory), [False] * 4, "pages present")
        return
    sleeper = loading(memory.page(2) + 5)
    same(next_fault(uffd).address, memory.page(2), "address of the fault")
    same(zero(2, 1), Placed(0, size), "ZEROPAGE of a missing page")
    same(sleeper.join(), 0, "byte read")
    same(zero(2, 1), Placed(errno.EEXIST, -errno.EEXIST), "ZEROPAGE again")
    same(zero(0, 4), Placed(errno.EAGAIN, 2 * size), "ZEROPAGE up to a page that is there")
    same(zero(3, 1), Placed(0, size), "ZEROPAGE of the last page")
    same(memory.read(0, memory.length), bytes(memory.length), "contents")


@case("unit", on=ALL, needs_of=mode(Mode.MISSING))
def copy(bench: Bench) -> None:
    """A missing fault of a reader and of a writer is answered by COPY: each message tells address
    and intent, contents arrive whole, COPY on a present page says that it exists.
    """
    uffd, memory = bench.registered()
    last = memory.page(3) + memory.page_size - 1
    reader = loading(memory.page(1) + 100)
    fault = next_fault(uffd)
    same((fault.address, int(fault.flags)), (memory.page(1), 0), "message of a reader")
    same(uffd.copy(memory.page(1), bench.page(1)), memory.page_size, "bytes placed")
    same(reader.join(), bench.page(1)[100], "byte read")
    writer = storing(last, 77)
    fault = next_fault(uffd)
    same((fault.address, int(fault.flags)), (memory.page(3), 1), "message of a writer")
    uffd.copy(memory.page(3), bench.page(3))
    writer.join()
    bench.holds(memory, 1, bench.page(1))
    bench.holds(memory, 3, bench.page(3)[:-1] + bytes([77]))
    buffer = bytearray(bench.page(1, salt=1))
    words = (memory.page(1), raw.buffer_address(buffer), memory.page_size, 0)
    again = raw.place(uffd.fileno(), raw.COPY, words)
    same(again, Placed(errno.EEXIST, -errno.EEXIST), "COPY to a present page")
    bench.holds(memory, 1, bench.page(1))
