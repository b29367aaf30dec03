"""What this host has, and the things a case may need of it: each with a reason and a remedy.

What has to be set up for a case is set up by the runner and taken down again by it: huge pages
when the first case needs them, swap and folio sizes for each case. A case that dies leaves nothing
behind.
"""

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guestmem.errors import GuestMemoryError
from guestmem.hugejournal import HugepageJournal
from guestmem.pools import HugepagePool
from scripts.validate import folios, zram
from scripts.validate.check import Skipped
from scripts.validate.kinds import GIGANTIC, HUGE, KINDS
from uffd import Feature, Mode, NotPermitted, UffdError, Userfaultfd, kernel_support


class Host:
    """Facts of this host, and what the runner holds for the cases. Closed by the runner."""

    def __init__(
        self, *, hugepages: int = 24, journal: Path | None = None, gigantic: bool = False
    ) -> None:
        """:param gigantic: take a 1 GiB page for the cases about one."""
        self.takes_gigantic = gigantic
        self.release = platform.release()
        self.machine = platform.machine()
        self.is_root = os.geteuid() == 0
        self._wanted_hugepages = hugepages
        self._journal = journal
        self._held = contextlib.ExitStack()
        self._held_for_case = contextlib.ExitStack()
        self._answers: dict[str, Skipped | None] = {}
        self._swap_device: str | None = None
        self.features, self.refusal = _features()

    def ask(self, key: str, provide: Callable[[], Skipped | None]) -> Skipped | None:
        """``provide`` once; its answer from then on."""
        if key not in self._answers:
            self._answers[key] = provide()
        return self._answers[key]

    def hold(self, thing: contextlib.AbstractContextManager[object]) -> None:
        """Enter it now; leave it at :meth:`close`."""
        self._held.enter_context(thing)

    def hold_for_case(self, thing: contextlib.AbstractContextManager[object]) -> None:
        """Enter it now; leave it at :meth:`end_case`."""
        self._held_for_case.enter_context(thing)

    def end_case(self) -> None:
        """Back to how the host was: what one case needs must not change another's answer."""
        self._held_for_case.close()

    def swap_device(self) -> str:
        """The swap device of this run. :raises OSError: there is no zram, or we must not."""
        if self._swap_device is None:
            self._swap_device = self._held.enter_context(zram.device())
        return self._swap_device

    def take_hugepages(self) -> Skipped | None:
        """So many 2 MiB pages more in the pool, through the journal, so that a crash loses none."""
        pool, pages = HugepagePool(HUGE), self._wanted_hugepages
        remedy = f"{shlex.quote(sys.executable)} -m guestmem.hugepages reserve {pages}"
        if not pool.exists:
            return Skipped("this kernel has no 2 MiB huge pages")
        if self.is_root and pages:
            try:
                self.hold(HugepageJournal(self._journal).taken(pages, HUGE))
                return None
            except GuestMemoryError as error:
                return Skipped(f"no huge pages: {error}", remedy)
        if pool.state().available >= pages > 0:
            return None
        return Skipped(f"fewer than {pages} free 2 MiB huge pages", remedy)

    def take_gigantic(self) -> Skipped | None:
        """One 1 GiB page, for the length of the case."""
        try:
            self.hold_for_case(HugepageJournal(self._journal).taken(1, GIGANTIC))
        except GuestMemoryError as error:
            # Not enough memory in one piece cannot be helped here; rights can.
            return Skipped(f"no 1 GiB page: {error}", None if self.is_root else "run as root")
        return None

    def close(self) -> None:
        self._held_for_case.close()
        self._held.close()


def _features() -> tuple[Feature | None, str]:
    try:
        Userfaultfd.open(user_mode_only=False).close()
        return kernel_support().features, ""
    except (NotPermitted, UffdError) as error:
        return None, str(error)


@dataclass(frozen=True)
class Need:
    """Something a case needs; ``missing`` sets it up if it can, and says why not if it cannot."""

    name: str
    missing: Callable[[Host], Skipped | None]


def need(name: str, ok: Callable[[Host], bool], reason: str, remedy: str | None = None) -> Need:
    return Need(name, lambda host: None if ok(host) else Skipped(reason, remedy))


def traps_kernel_faults() -> Need:
    """A userfaultfd that reports faults of system calls too."""

    def missing(host: Host) -> Skipped | None:
        if host.features is not None:
            return None
        return Skipped(f"no userfaultfd: {host.refusal}", "run as root")

    return Need("userfaultfd", missing)


def feature(wanted: Feature) -> Need:
    """The kernel reports it. No remedy: another kernel is another host."""

    def missing(host: Host) -> Skipped | None:
        absent = Feature(int(wanted) & ~int(host.features or 0))
        return Skipped(f"the kernel does not report {absent.name}") if absent else None

    return Need(str(wanted.name), missing)


def root() -> Need:
    return need("root", lambda host: host.is_root, "needs root", "run as root")


def hugepages() -> Need:
    """Some 2 MiB pages of our own."""
    return Need("hugepages", lambda host: host.ask("hugepages", host.take_hugepages))


def gigantic() -> Need:
    """A 1 GiB page: taken for the case only when that was asked for, as it takes much memory."""

    def missing(host: Host) -> Skipped | None:
        pool = HugepagePool(GIGANTIC)
        if not pool.exists:
            return Skipped("this processor has no 1 GiB pages")
        if pool.state().available:
            return None
        remedy = f"{shlex.quote(sys.executable)} -m guestmem.hugepages reserve 1 --size 1G"
        if not host.takes_gigantic:
            return Skipped("no free 1 GiB huge page, and --gigantic was not asked for", remedy)
        return host.take_gigantic()

    return Need("gigantic", missing)


def swap() -> Need:
    """Swap of our own, in compressed memory, for the length of the case."""

    def missing(host: Host) -> Skipped | None:
        if not host.is_root:
            return Skipped("setting up swap needs root", "run as root")
        try:
            host.hold_for_case(zram.swapping_to(host.swap_device()))
        except OSError as error:
            return Skipped(f"no swap: {error}", "modprobe zram")
        return None

    return Need("swap", missing)


def folio(size: int, *, of_file: bool = False) -> Need:
    """The kernel may allocate folios of ``size`` bytes where it is advised to, for the case."""

    def missing(host: Host) -> Skipped | None:
        try:
            host.hold_for_case(folios.allowed(size, of_file=of_file))
        except OSError as error:
            return Skipped(
                f"no folios of {size >> 10} KiB: {error}",
                None if isinstance(error, FileNotFoundError) else "run as root",
            )
        return None

    return Need("folio", missing)


def thp() -> Need:
    """Transparent huge pages of 2 MiB for advised anonymous memory."""
    return folio(HUGE)


def mode(*modes: Mode) -> Callable[[str], list[Need]]:
    """Needs of a variant whose memory is registered with these modes."""

    def needs(variant: str) -> list[Need]:
        kind = KINDS[variant.split(":")[0]]
        wanted = kind.missing_feature
        wanted |= kind.wp_feature if Mode.WP in modes else Feature.NONE
        wanted |= kind.minor_feature if Mode.MINOR in modes else Feature.NONE
        return [feature(wanted)] if wanted else []

    return needs
