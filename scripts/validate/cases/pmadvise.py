"""process_madvise: advice to oneself and to another process, through a pidfd."""

import os
import struct

from scripts.validate import raw
from scripts.validate.actors import Channel, Subject
from scripts.validate.bench import Bench, entry, present
from scripts.validate.case import case
from scripts.validate.check import expect, refused, refuses, same
from scripts.validate.folios import anon_huge_bytes
from scripts.validate.host import root, swap, thp
from scripts.validate.kinds import ANON, HUGE, PAGE, aligned, pattern
from uffd import Advice, pidfd_open, process_madvise

_UNKNOWN_ADVICE = 9999


@case("pmadvise", needs=[swap()], name="basic")
def basic(bench: Bench) -> None:
    """Several ranges of another process in one call: exactly these are paged out, contents stay."""

    def body(channel: Channel) -> None:
        memory = ANON.map(6)
        memory.write(0, pattern(memory))
        channel.say(memory.address)
        channel.hear()
        same(present(memory), [True, False, True, True, False, False], "pages present")
        same(memory.read(0, memory.length), pattern(memory), "contents")

    subject = Subject(body)
    start = subject.channel.hear()
    assert isinstance(start, int)
    pidfd = pidfd_open(subject.pid)
    ranges = [(start + PAGE, PAGE), (start + 4 * PAGE, 2 * PAGE)]
    same(process_madvise(pidfd, ranges, Advice.PAGEOUT), 3 * PAGE, "bytes advised")
    subject.channel.say("done")
    subject.result()


@case("pmadvise", needs=[thp()], name="remote-collapse")
def remote_collapse(bench: Bench) -> None:
    """Another process's memory is collapsed into a huge page, contents stay."""

    def body(channel: Channel) -> None:
        memory = aligned(HUGE, HUGE)
        memory.advise(Advice.NOHUGEPAGE)
        memory.write(0, pattern(memory))
        memory.advise(Advice.HUGEPAGE)
        same(anon_huge_bytes(memory.address), 0, "mapped by huge pages before")
        channel.say(memory.address)
        channel.hear()
        same(anon_huge_bytes(memory.address), HUGE, "mapped by huge pages after")
        same(memory.read(0, HUGE), pattern(memory), "contents")

    subject = Subject(body)
    start = subject.channel.hear()
    assert isinstance(start, int)
    pidfd = pidfd_open(subject.pid)
    same(process_madvise(pidfd, [(start, HUGE)], Advice.COLLAPSE), HUGE, "bytes advised")
    subject.channel.say("done")
    subject.result()


@case("pmadvise", name="dead-process")
def dead_process(bench: Bench) -> None:
    """The pidfd of a process that is gone: ESRCH."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pidfd = pidfd_open(pid)
    os.waitpid(pid, 0)
    with refused(3, what="advice to a dead process"):
        process_madvise(pidfd, [(PAGE, PAGE)], Advice.COLD)


@case("pmadvise", name="bad-pidfd")
def bad_pidfd(bench: Bench) -> None:
    """No fd, and an fd that is no pidfd: EBADF."""
    memory = ANON.map(1)
    with refused(9, what="fd -1"):
        process_madvise(-1, [(memory.address, PAGE)], Advice.COLD)
    with refused(9, what="a pipe"):
        process_madvise(os.pipe()[0], [(memory.address, PAGE)], Advice.COLD)


@case("pmadvise", name="bad-vector")
def bad_vector(bench: Bench) -> None:
    """A vector longer than the system's limit: EINVAL; at an unreadable address: EFAULT."""
    pidfd = pidfd_open(os.getpid())
    memory = ANON.map(1)
    vector = struct.pack("<QQ", memory.address, PAGE) * 1025
    got = raw.syscall(raw.SYS_PROCESS_MADVISE, pidfd, vector, 1025, int(Advice.COLD), 0)
    refuses(got, 22, "1025 ranges")
    got = raw.syscall(raw.SYS_PROCESS_MADVISE, pidfd, 8, 1, int(Advice.COLD), 0)
    refuses(got, 14, "a vector at an unreadable address")


@case("pmadvise", name="bad-flags")
def bad_flags(bench: Bench) -> None:
    """Flags other than none: EINVAL."""
    pidfd = pidfd_open(os.getpid())
    memory = ANON.map(1)
    vector = struct.pack("<QQ", memory.address, PAGE)
    for flags in (1, 1 << 31):
        got = raw.syscall(raw.SYS_PROCESS_MADVISE, pidfd, vector, 1, int(Advice.COLD), flags)
        refuses(got, 22, f"flags {flags:#x}")


@case("pmadvise", name="bad-advice-of-nothing")
def bad_advice_of_nothing(bench: Bench) -> None:
    """Unknown advice about zero bytes: accepted by 6.18, refused before and after. About bytes:
    refused.
    """
    pidfd = pidfd_open(os.getpid())
    memory = ANON.map(1)

    def advise(length: int) -> int:
        vector = struct.pack("<QQ", memory.address, length)
        return raw.syscall(raw.SYS_PROCESS_MADVISE, pidfd, vector, 1, _UNKNOWN_ADVICE, 0)

    refuses(advise(PAGE), 22, "unknown advice about a page")
    answer = {0: "accepted", -22: "EINVAL"}.get(advise(0), "?")
    bench.either(
        "unknown advice about nothing", answer, in_6_18="accepted", in_6_12_and_from_7_3="EINVAL"
    )


@case("pmadvise", needs=[root()], name="another-process-limits")
def another_process_limits(bench: Bench) -> None:
    """What would destroy another process's memory is refused; one's own pidfd takes DONTNEED."""

    def body(channel: Channel) -> None:
        memory = ANON.map(1)
        memory.write(0, pattern(memory))
        channel.say(memory.address)
        channel.hear()
        same(memory.read(0, PAGE), pattern(memory), "contents")

    subject = Subject(body)
    start = subject.channel.hear()
    assert isinstance(start, int)
    pidfd = pidfd_open(subject.pid)
    for advice in (Advice.DONTNEED, Advice.FREE, Advice.GUARD_INSTALL, Advice.POPULATE_WRITE):
        with refused(22, 1, what=f"{advice.name} in another process"):
            process_madvise(pidfd, [(start, PAGE)], advice)
    subject.channel.say("done")
    subject.result()
    memory = ANON.map(1)
    memory.store(0, 1)
    try:
        process_madvise(pidfd_open(os.getpid()), [(memory.address, PAGE)], Advice.DONTNEED)
    except OSError as error:
        same(error.errno, 22, "DONTNEED through one's own pidfd")
        bench.remark("DONTNEED through one's own pidfd: refused (before 6.13)")
        return
    expect(not entry(memory.address).is_present, "the page is gone")
    bench.remark("DONTNEED through one's own pidfd: taken")
