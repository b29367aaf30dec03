"""Every memory type userfaultfd serves, threads that fault on it, and the 2 MiB pool they need."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guestmem.hugejournal import pools_locked
from tests.support.need import need
from uffd import Feature, Mapping, Mode, PageFault, Userfaultfd, kernel_support, touch
from uffd.events import Event

HUGE = 2 << 20
PAGE = os.sysconf("SC_PAGESIZE")
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
TIMEOUT_S = 20.0

MEMORY_TYPES = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
SHARED_TYPES = ("shmem", "hugetlb")


@contextlib.contextmanager
def pool_lock() -> Iterator[None]:
    """Only its holder changes the size of the machine's 2 MiB pool."""
    path = Path(tempfile.gettempdir()) / "postcopy-hugepages.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def pool_count(name: str) -> int:
    """A counter of the 2 MiB pool: ``nr``, ``free``, ``resv``.

    Linux 5.10 lets ``resv`` fall below zero when huge pages are placed: that promises none.
    """
    count = int((POOL / f"{name}_hugepages").read_text())
    return count if count < 1 << 63 else 0


def grow_pool(pages: int) -> int:
    """Add ``pages`` (or take away, negative); the caller holds the lock. Returns how many
    changed.
    """
    with pools_locked():
        before = pool_count("nr")
        (POOL / "nr_hugepages").write_text(str(max(0, before + pages)))
        return pool_count("nr") - before


@contextlib.contextmanager
def hugepages(pages: int) -> Iterator[None]:
    """``pages`` more 2 MiB pages for a while."""
    need(POOL.is_dir(), "this kernel has no 2 MiB huge pages")
    need(os.geteuid() == 0, "the huge page pool needs root", remedy="sudo -E python -m pytest")
    with pool_lock():
        got = grow_pool(pages)
    try:
        need(got == pages, f"only {got} of {pages} huge pages to be had", remedy="free some memory")
        yield
    finally:
        with pool_lock():
            grow_pool(-got)


@contextlib.contextmanager
def memory(kind: str, pages: int = 4) -> Iterator[Mapping]:
    """A fresh mapping of one of :data:`MEMORY_TYPES`, ``pages`` host pages long, all absent."""
    with contextlib.ExitStack() as stack:
        if kind.startswith("hugetlb"):
            stack.enter_context(hugepages(pages + 2))
            mapping = Mapping.memfd(pages * HUGE, hugepage_size=HUGE, shared=kind == "hugetlb")
        elif kind.startswith("shmem"):
            mapping = Mapping.memfd(pages * PAGE, shared=kind == "shmem")
        else:
            mapping = Mapping.anonymous(pages * PAGE)
        yield stack.enter_context(mapping)


@contextlib.contextmanager
def open_uffd(features: Feature = Feature.NONE) -> Iterator[Userfaultfd]:
    """A context that traps kernel faults too, with ``features``; skips where that cannot be had."""
    from uffd import FeatureUnsupported, NotPermitted

    try:
        uffd = Userfaultfd.open(features, user_mode_only=False)
    except FeatureUnsupported as error:
        need(False, str(error))
    except NotPermitted as error:
        need(False, str(error), remedy="sudo -E python -m pytest")
    with uffd:
        yield uffd


def need_feature(feature: Feature) -> None:
    """Skips where the kernel does not report it."""
    missing = feature & ~kernel_support().features
    need(not missing, f"this kernel does not report {missing.name}")


@dataclass
class Sleeper:
    """A thread that does one thing without the interpreter lock, and what came of it."""

    thread: threading.Thread
    result: object = None
    error: BaseException | None = None

    def join(self) -> object:
        """What the action returned. :raises: what it raised."""
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive(), "the thread still sleeps"
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def finished(self) -> bool:
        return not self.thread.is_alive()


def in_thread(action: Callable[[], object]) -> Sleeper:
    """Run ``action`` on a thread; it must release the interpreter lock where it may sleep."""

    def run() -> None:
        try:
            sleeper.result = action()
        except BaseException as error:
            sleeper.error = error

    sleeper = Sleeper(threading.Thread(target=run, daemon=True))
    sleeper.thread.start()
    return sleeper


def loading(address: int) -> Sleeper:
    return in_thread(lambda: touch.load(address))


def storing(address: int, value: int) -> Sleeper:
    return in_thread(lambda: touch.store(address, value))


def next_event(uffd: Userfaultfd) -> Event:
    """The next message; the message is the barrier tests wait on."""
    for event in uffd.events(timeout_s=TIMEOUT_S):
        return event
    raise AssertionError("no event came")


def next_fault(uffd: Userfaultfd) -> PageFault:
    event = next_event(uffd)
    assert isinstance(event, PageFault), event
    return event


def registered(uffd: Userfaultfd, mapping: Mapping, mode: Mode = Mode.MISSING) -> Mapping:
    uffd.register(mapping, mode)
    return mapping


def pattern(mapping: Mapping, index: int = 0, pages: int = 1) -> bytes:
    """Bytes that tell host pages apart: every page starts with its index."""
    body = bytes(range(1, 251))
    one = (body * (mapping.page_size // len(body) + 1))[: mapping.page_size - 1]
    return b"".join(bytes([i + 1]) + one for i in range(index, index + pages))
