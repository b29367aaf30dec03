"""What the kernel's own tests leave out: signals, debuggers, and who else touches the memory."""

import os
import signal
import threading
import time

from scripts.validate import raw
from scripts.validate.actors import (
    Channel,
    Sleeper,
    Subject,
    loading,
    next_event,
    next_fault,
)
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.gaps import waiters
from scripts.validate.check import Skipped, expect, refused, same
from scripts.validate.host import feature
from scripts.validate.kinds import ANON, PAGE, pattern
from uffd import Advice, BufferSource, FaultHandler, Feature, PageFault, Served, Userfaultfd
from uffd.events import Event

_SYS_PTRACE, _ATTACH, _DETACH, _PEEKDATA = 101, 16, 17, 2
_BURNT_S = 0.05


def _signalled(sleeper: Sleeper) -> None:
    ident = sleeper.thread.ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGUSR1)


@case("gaps", name="07-signal-repeats-the-fault")
def signal_repeats_the_fault(bench: Bench) -> None:
    """A signal handler runs in a thread that waits for a page; then the thread faults anew: the
    same fault is reported again.
    """
    signal.signal(signal.SIGUSR1, lambda *_: None)
    memory, uffd = ANON.map(1), bench.open(Feature.THREAD_ID)
    uffd.register(memory)
    reader = loading(memory.address)
    first = next_fault(uffd)
    _signalled(reader)
    second = next_fault(uffd)
    same(second, first, "the repeated message")
    same(waiters(uffd), 1, "waiters")
    uffd.copy(memory.address, pattern(memory))
    same(reader.join(), pattern(memory)[0], "byte read")


@case("gaps", name="07-kernel-waiter-with-a-signal")
@case("traps", name="12-kernel-waiter-with-a-signal")
def kernel_waiter_with_a_signal(bench: Bench) -> None:
    """A system call that waits for a page does not return for a signal: it retries over and over
    (up to 7.3: burning processor time) and is served all the same.
    """
    signal.signal(signal.SIGUSR1, lambda *_: None)
    memory, uffd = ANON.map(1), bench.open()
    uffd.register(memory)
    reader, writer = os.pipe()
    # As a C call: Python's own write would retry it after the signal in any case.
    sleeper = Sleeper(lambda: raw.write(writer, memory.address, 16))
    next_fault(uffd)
    before = time.process_time()
    _signalled(sleeper)
    until = time.monotonic() + 1.0
    while time.process_time() - before < _BURNT_S and time.monotonic() < until:
        threading.Event().wait(0.02)  # our own thread must not be what burns
    spins = time.process_time() - before >= _BURNT_S
    bench.either(
        "a waiting system call with a signal pending",
        "spins" if spins else "sleeps",
        up_to_7_3="spins",
        fixed="sleeps",
    )
    uffd.copy(memory.address, pattern(memory))
    same(sleeper.join("the system call"), 16, "bytes written")
    same(os.read(reader, 16), pattern(memory)[:16], "what it wrote")


def _attached(bench: Bench) -> tuple[Subject, Userfaultfd, int]:
    """A process with one missing page, its context, and the page's address."""

    def body(channel: Channel) -> None:
        memory, uffd = ANON.map(2), bench.open()
        uffd.register(memory)
        uffd.copy(memory.page(1), pattern(memory, 1, 1))
        channel.say("uffd", [uffd.fileno()])
        channel.say(memory.address)
        channel.hear()

    subject = Subject(body)
    uffd = subject.uffd()
    address = subject.channel.hear()
    assert isinstance(address, int)
    return subject, uffd, address


@case("gaps", name="08-debuggers-see-nothing")
@case("traps", name="09-debuggers-see-nothing")
def debuggers_see_nothing(bench: Bench) -> None:
    """/proc/PID/mem and ptrace fail at once on a missing page, without any message; present pages
    they can read.
    """
    subject, uffd, address = _attached(bench)
    memory = os.open(f"/proc/{subject.pid}/mem", os.O_RDONLY)
    with refused(5, what="/proc/PID/mem of a missing page"):
        os.pread(memory, 8, address)
    expected = pattern(ANON.map(2), 1, 1)[:8]
    same(os.pread(memory, 8, address + PAGE), expected, "/proc/PID/mem of a present page")
    if raw.syscall(_SYS_PTRACE, _ATTACH, subject.pid, 0, 0) < 0:
        raise Skipped("ptrace is not allowed", "run as root")
    os.waitpid(subject.pid, 0)
    into = bytearray(8)
    at = raw.buffer_address(into)
    same(raw.syscall(_SYS_PTRACE, _PEEKDATA, subject.pid, address, at), -5, "ptrace, missing page")
    same(raw.syscall(_SYS_PTRACE, _PEEKDATA, subject.pid, address + PAGE, at), 0, "ptrace, present")
    same(bytes(into), expected, "what ptrace saw")
    raw.syscall(_SYS_PTRACE, _DETACH, subject.pid, 0, 0)
    same(uffd.read_events(), [], "messages")
    subject.channel.say("done")
    subject.result()


@case("gaps", name="08-process-vm-readv-blocks")
def process_vm_readv_blocks(bench: Bench) -> None:
    """process_vm_readv of another process's missing page waits for it and then reads it."""
    subject, uffd, address = _attached(bench)
    reader = Sleeper(lambda: raw.readv(subject.pid, address, 8))
    fault = next_fault(uffd)
    same((fault.address, fault.is_write), (address, False), "message")
    data = bytes(range(1, 9)) * (PAGE // 8)
    uffd.copy(address, data)
    same(reader.join("process_vm_readv"), (8, data[:8]), "result and bytes")
    subject.channel.say("done")
    subject.result()


@case("gaps", name="09-manager-in-another-process", needs=[feature(Feature.MOVE)])
def manager_in_another_process(bench: Bench) -> None:
    """A manager process registers, fills (from its own memory), wakes and unregisters ranges of
    another one; MOVE is refused there.
    """

    def body(channel: Channel) -> None:
        memory, uffd = ANON.map(3), bench.open()
        channel.say("uffd", [uffd.fileno()])
        channel.say(memory.address)
        channel.hear()
        same(memory.read(0, PAGE), bytes([9]) * PAGE, "page of the manager's memory")
        channel.say("read")
        channel.hear()
        same(memory.read(2 * PAGE, PAGE), bytes(PAGE), "page after UNREGISTER")

    subject = Subject(body)
    uffd = subject.uffd()
    address = subject.channel.hear()
    assert isinstance(address, int)
    uffd.register(address, 3 * PAGE)
    subject.channel.say("go")
    same(next_fault(uffd).address, address, "address of the fault")
    source = ANON.map(1)
    source.write(0, bytes([9]) * PAGE)
    with refused(22, what="MOVE from another process"):
        uffd.move(address, source.address, PAGE)
    same(uffd.copy(address, source.address, PAGE), PAGE, "COPY from another process")
    same(subject.channel.hear(), "read", "the page arrived")
    uffd.unregister(address, 3 * PAGE)
    subject.channel.say("go")
    subject.result()


@case("traps", name="10-reading-into-missing-memory")
def reading_into_missing_memory(bench: Bench) -> None:
    """read(2) into missing registered memory waits in the kernel for the page: the thread that
    serves faults must never do it.
    """
    memory, uffd = ANON.map(1), bench.open()
    uffd.register(memory)
    reader, writer = os.pipe()
    os.write(writer, b"hello")
    sleeper = Sleeper(lambda: raw.syscall(raw.SYS_READ, reader, memory.address, 5))
    fault = next_fault(uffd)
    expect(fault.is_write, "the kernel wants to write to the page")
    expect(sleeper.is_asleep, "read(2) waits")
    uffd.zeropage(memory)
    same(sleeper.join("read(2)"), 5, "bytes read")
    same(memory.read(0, 5), b"hello", "contents")


@case("traps", name="11-interpreter-lock")
def interpreter_lock(bench: Bench) -> None:
    """A Python thread that touches a missing page through a memoryview sleeps with the interpreter
    lock held; a native handler serves it all the same.
    """
    memory, uffd = ANON.map(4), bench.open()
    uffd.register(memory)
    data = pattern(memory)
    view = memory.unsafe_view()
    with FaultHandler(uffd, [Served(memory, BufferSource(data))]) as handler:
        # Its thread needs the lock once, to get into native code; a page served proves that it is.
        same(memory.load(0), data[0], "byte read without the lock")
        same(bytes(view), data, "contents through a memoryview")
        # The last page wakes us before it is counted.
        expect(handler.statistics().missing >= 3, "every page was missing")


@case("traps", name="13-populating-a-registered-range")
def populating_a_registered_range(bench: Bench) -> None:
    """MADV_POPULATE_READ of a registered range reports every page and waits for each."""
    memory, uffd = ANON.map(4), bench.open()
    uffd.register(memory)
    populating = Sleeper(lambda: memory.advise(Advice.POPULATE_READ))
    seen: list[Event] = []
    for i in range(4):
        event = next_event(uffd)
        assert isinstance(event, PageFault)
        seen.append(event)
        same(event.address, memory.page(i), "page asked for")
        uffd.copy(event.address, pattern(memory, i, 1))
    populating.join("MADV_POPULATE_READ")
    same(memory.read(0, memory.length), pattern(memory), "contents")
