"""RAM under userfaultfd on the destination, from LISTEN to END, and the check of it at ADVISE."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from guestmem import RAMBlock, RAMList
from migration.native import lib
from uffd import Feature, Mode, PendingFaults, UffdError, Userfaultfd, Watchdog

from ..errors import MigrationError
from ..machine import Machine
from .ram import DestinationRam

WATCHDOG_STALE_MS = 3000


def _features(ram: RAMList) -> Feature:
    """What the kernel must offer for these kinds of memory."""
    wanted = Feature.NONE
    for block in ram:
        if block.is_hugetlb:
            wanted |= Feature.MISSING_HUGETLBFS
        elif block.is_shared:
            wanted |= Feature.MISSING_SHMEM
    return wanted


def open_for(machine: Machine) -> Userfaultfd:
    """A context that can serve this machine's RAM.

    :raises MigrationError: no permission, or the kernel lacks a feature; says which and the remedy.
    """
    try:
        return Userfaultfd.open(
            _features(machine.ram),
            optional=Feature.THREAD_ID,
            user_mode_only=False if machine.needs_kernel_faults else None,
        )
    except UffdError as error:
        raise MigrationError(
            f"postcopy is not possible here: {error}; see 'postcopy probe --for qemu-postcopy'"
        ) from error


def _register(uffd: Userfaultfd, block: RAMBlock) -> None:
    """MISSING; shared memory also MINOR, since the file may have the page while this mapping has
    not."""
    mode = Mode.MISSING
    support = uffd.support.features if uffd.support else Feature.NONE
    minor = Feature.MINOR_HUGETLBFS if block.is_hugetlb else Feature.MINOR_SHMEM
    if block.is_shared and minor in support:
        mode |= Mode.MINOR
    try:
        uffd.register(block.host, block.placed_length, mode)
    except UffdError as error:
        raise MigrationError(
            f"RAM block {block.idstr!r} ({block.backing.value}) cannot be registered: {error}"
        ) from error


class Sensitised:
    """One context for every block, and the watchdog over whoever sleeps on it.

    Made at ADVISE, while the guest still runs at the source: what would fail fails then, and the
    switchover does not pay for it. :meth:`arm` at LISTEN. Closing it with pages missing shows their
    sleepers zeros: :meth:`give_up` comes before.
    """

    def __init__(self, machine: Machine, ram: DestinationRam) -> None:
        """Open, and try a registration of every block.

        :raises MigrationError: postcopy would fail later; the message says why.
        """
        self._ram = ram
        self._machine = machine
        self._lock = threading.Lock()
        self._is_armed = False
        self._is_poisoned = False
        self.pending = PendingFaults()
        with ExitStack() as stack:
            self.uffd = open_for(machine)
            stack.callback(self.uffd.close)
            self.arm()
            self._disarm()
            # Reports a thread that sleeps with the GIL held; ends the process once nobody brings
            # pages.
            self.watchdog = Watchdog(stale_ms=WATCHDOG_STALE_MS)
            self._watch = self.watchdog.watch(self.pending)
            self.watchdog.start()
            stack.pop_all()

    def arm(self) -> None:
        """Register: from now on a touch of a missing page is a fault for us."""
        for block in self._machine.ram:
            _register(self.uffd, block)
        self._is_armed = True

    def _disarm(self) -> None:
        for block in self._machine.ram:
            self.uffd.unregister(block.host, block.placed_length)
        self._is_armed = False

    @property
    def is_armed(self) -> bool:
        """Between :meth:`arm` and :meth:`close`."""
        return self._is_armed

    @property
    def fd(self) -> int:
        return self.uffd.fileno()

    def give_up(self) -> int:
        """Poison what is missing and wake its sleepers, who get SIGBUS; target pages poisoned.

        :raises MigrationError: this kernel has no POISON (before 6.6): the process must end
            instead.
        """
        with self._lock:
            if not self._is_armed:
                return 0
            poisoned = int(lib.dst_poison_missing(self._ram.native))
        if poisoned < 0:
            raise MigrationError(
                f"missing pages cannot be poisoned on this kernel (errno {-poisoned}); "
                "end the process rather than let its threads read zeros"
            )
        self._is_poisoned = True
        return poisoned

    def close(self, *, is_complete: bool) -> None:
        """Unregister and close.

        :param is_complete: nothing is missing, or what is was agreed to be zero. Otherwise pages
            must have been poisoned by :meth:`give_up`. Where the kernel cannot (before 6.6), RAM
            stays registered until the process ends: a sleeper then waits rather than reads zeros.
        """
        self._watch.close()
        self.watchdog.close()
        if self._is_armed and not (is_complete or self._is_poisoned):
            self.uffd.detach()
            return
        if self._is_armed:
            self._disarm()
        self.uffd.close()


class SensitiveRam:
    """Guest RAM of one incoming migration.

    :ivar sensitised: from ADVISE to the end; None before and after.
    """

    def __init__(self, machine: Machine, ram: DestinationRam) -> None:
        self._machine = machine
        self._ram = ram
        self.sensitised: Sensitised | None = None

    def prepare(self) -> None:
        """ADVISE. :raises MigrationError: postcopy would fail later; the message says why."""
        self.sensitised = Sensitised(self._machine, self._ram)

    def arm(self) -> Sensitised:
        """LISTEN, behind ADVISE."""
        assert self.sensitised is not None
        self.sensitised.arm()
        return self.sensitised

    @property
    def is_armed(self) -> bool:
        """Pages may be missing: closing now would show zeros to whoever still looks."""
        return self.sensitised is not None and self.sensitised.is_armed

    def pages_come_again(self) -> None:
        """Whoever sleeps on one need not be ended any more."""
        if self.sensitised is not None:
            self.sensitised.watchdog.end_process = False

    def give_up(self) -> None:
        """Never to be finished: poison what is missing, so that its sleepers are woken by SIGBUS
        and nobody reads zeros. The vCPUs must have been stopped.

        :raises MigrationError: see :meth:`Sensitised.give_up`.
        """
        if self.sensitised is not None:
            self.sensitised.give_up()

    def close(self, *, is_complete: bool) -> None:
        """See :meth:`Sensitised.close`."""
        if self.sensitised is not None:
            self.sensitised.close(is_complete=is_complete)
            self.sensitised = None
