"""Guests on KVM: their faults are faults of the vCPU's thread, in kernel mode."""

import signal
import threading

from scripts.validate.actors import PATIENCE_S, Sleeper, next_fault
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import Skipped, expect, refused, same
from scripts.validate.host import feature
from scripts.validate.kinds import ANON, PAGE, pattern
from scripts.validate.kvmguest import EXIT_INTR, Guest, wait_signal
from uffd import Advice, Feature, Mapping, Mode, Userfaultfd

_EINTR, _EFAULT = 4, 14
_MCEERR_AR = 4


def _guest() -> tuple[Guest, Mapping]:
    """A guest whose RAM is there; what it reads proves that it runs."""
    memory = ANON.map(4)
    memory.write(0, pattern(memory))
    guest = Guest(memory)
    got = guest.read(5)
    if got != (0, pattern(memory)[5]):
        raise Skipped(f"this KVM does not run user mode: {got}, exit {guest.exit_reason}")
    return guest, memory


def _missing(uffd: Userfaultfd) -> tuple[Guest, Mapping]:
    guest, memory = _guest()
    uffd.register(memory)
    memory.advise(Advice.DONTNEED)
    return guest, memory


@case("gaps", name="12-kvm-fault")
def kvm_fault(bench: Bench) -> None:
    """A guest's access to a missing page is an ordinary message with our address; KVM_RUN waits
    and the guest reads what was placed.
    """
    uffd = bench.open()
    guest, memory = _missing(uffd)
    run = Sleeper(lambda: guest.read(2 * PAGE + 9))
    same(next_fault(uffd).address, memory.page(2), "address of the message")
    uffd.copy(memory.page(2), pattern(memory, 2, 1, salt=1))
    expected = pattern(memory, 2, 1, salt=1)[9]
    same(run.join("KVM_RUN"), (0, expected), "result and byte")


@case("gaps", name="12-kvm-signal")
def kvm_signal(bench: Bench) -> None:
    """A signal gets a vCPU that waits for a page out of KVM_RUN with EINTR; when it runs again the
    fault is reported again.
    """
    signal.signal(signal.SIGUSR1, lambda *_: None)
    uffd = bench.open()
    guest, memory = _missing(uffd)
    run = Sleeper(lambda: guest.read(9))
    next_fault(uffd)
    assert run.thread.ident is not None
    signal.pthread_kill(run.thread.ident, signal.SIGUSR1)
    same(run.join("KVM_RUN with a signal"), (-_EINTR, None), "result")
    same(guest.exit_reason, EXIT_INTR, "exit reason")
    again = Sleeper(guest.resume)
    same(next_fault(uffd).address, memory.address, "address of the repeated message")
    uffd.copy(memory.address, pattern(memory, 0, 1))
    same(again.join("KVM_RUN"), (0, pattern(memory)[9]), "result and byte")


@case("gaps", name="12-kvm-user-mode-only")
def kvm_user_mode_only(bench: Bench) -> None:
    """With a context for user-mode faults only KVM_RUN fails with EFAULT, and nothing is
    reported; so it does with the SIGBUS feature.
    """
    for features, user_only in ((Feature.NONE, True), (Feature.SIGBUS, False)):
        uffd = Userfaultfd.open(features, user_mode_only=user_only)
        guest, memory = _missing(uffd)
        same(guest.read(9), (-_EFAULT, None), f"result, {features!r}")
        same(uffd.read_events(), [], "messages")
        uffd.copy(memory.address, pattern(memory, 0, 1))
        same(guest.resume(), (0, pattern(memory)[9]), "result and byte once the page is there")


@case("gaps", name="12-kvm-poison", needs=[feature(Feature.POISON)])
def kvm_poison(bench: Bench) -> None:
    """A guest's access to a poisoned page: the vCPU's thread gets SIGBUS BUS_MCEERR_AR with the
    page's address, and KVM_RUN returns.
    """
    uffd = bench.open()
    guest, memory = _missing(uffd)
    guest.unblock_while_running(signal.SIGBUS)
    uffd.poison(memory.page(1), PAGE)
    found: list[tuple[object, object, int | None]] = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        result = guest.read(PAGE + 8)
        info = wait_signal(signal.SIGBUS, PATIENCE_S)
        found.append((result, info and info.si_code, info and info.si_signo))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    expect(not thread.is_alive(), "KVM_RUN returns")
    same(found, [((-_EINTR, None), _MCEERR_AR, int(signal.SIGBUS))], "result, si_code, signal")


@case("gaps", name="12-kvm-guest-memfd")
def kvm_guest_memfd(bench: Bench) -> None:
    """guest_memfd memory, where it can be mapped at all, cannot be registered in any mode."""
    guest, _ = _guest()
    fd = guest.guest_memfd(4 * PAGE)
    if fd < 0:
        raise Skipped(f"no guest_memfd that can be mapped (error {-fd}; Linux 6.18)")
    memory = Mapping.of_file(fd, 4 * PAGE)
    uffd = bench.open()
    for mode in (Mode.MISSING, Mode.WP, Mode.MINOR, Mode.MISSING | Mode.MINOR):
        with refused(22, what=f"REGISTER of guest_memfd, {mode!r}"):
            uffd.register(memory, mode)
