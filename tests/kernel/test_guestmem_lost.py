"""A page that will never come: accessors raise, the process lives, other signals are not ours."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestmem import GuestMemoryError, GuestMemoryLost, RAMBlock
from tests.support.guestmem_faults import MissingWatch, Toucher
from tests.support.guestmem_memory import BASE, KINDS, Kind, kind_of_memory
from tests.support.need import need
from uffd._native import lib

pytestmark = pytest.mark.kernel

FEATURE_POISON = 1 << 14  # Linux 6.6


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of memory in turn."""
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


def poison(watch: MissingWatch, block: RAMBlock, page: int) -> None:
    address = block.host + page * block.page_size
    done = lib.uffd_poison(watch.fd, address, block.page_size, 0)
    need(done != -errno.ENOTTY, "this kernel has no UFFDIO_POISON (Linux 6.6)")
    assert done == block.page_size, os.strerror(-done)
    assert lib.uffd_wake(watch.fd, address, block.page_size) == 0


ACCESSES: dict[str, Callable[[RAMBlock, int], object]] = {
    "read": lambda block, at: block.read(at, 8),
    "write": lambda block, at: block.write(at, b"x" * 8),
    "fill": lambda block, at: block.fill(at, 64, 1),
    "move to": lambda block, at: block.move(at, 0, 8),
    "move from": lambda block, at: block.move(0, at, 8),
    "is_zero": lambda block, at: block.is_zero(at, 8),
    "load": lambda block, at: block.load_u64(at),
    "store": lambda block, at: block.store_u64(at, 1),
    "add": lambda block, at: block.fetch_add_u64(at, 1),
}


def test_every_access_says_what_was_lost(kind: Kind) -> None:
    """Again and again on one thread: the signal is not left blocked. Neighbours stay usable."""
    with kind.block(pages=3) as block:
        block.write(0, b"before")
        block.write(2 * block.page_size, b"after")
        watch = MissingWatch(block, features=FEATURE_POISON)
        try:
            poison(watch, block, 1)
            for name, access in ACCESSES.items():
                for offset in (block.page_size, block.page_size + 4096 - 512):
                    with pytest.raises(GuestMemoryLost, match="given up") as caught:
                        access(block, offset)
                    assert caught.value.idstr == block.idstr, name
                    assert caught.value.offset == offset, name
                    assert isinstance(caught.value, GuestMemoryError)
            assert block.read(0, 1) in (b"b", b"\0")  # "move from" may not have changed it
            assert block.read(2 * block.page_size, 5) == b"after"
        finally:
            watch.close()


def test_it_stops_where_the_lost_page_begins(kind: Kind) -> None:
    """A long access has done what lies before; the error names the first byte it could not do."""
    with kind.block(pages=2) as block:
        block.write(0, b"before")
        watch = MissingWatch(block, features=FEATURE_POISON)
        try:
            poison(watch, block, 1)
            with pytest.raises(GuestMemoryLost) as caught:
                block.fill(0, 2 * block.page_size, 7)
            assert block.page_size <= caught.value.offset < block.page_size + 64
            assert block.read(0, block.page_size) == b"\7" * block.page_size
        finally:
            watch.close()


def test_a_sleeper_is_woken_by_poison(kind: Kind) -> None:
    """The case it is for: a reader asleep on a missing page when the migration is given up."""
    with kind.block(pages=1) as block:
        watch = MissingWatch(block, features=FEATURE_POISON)
        try:

            def read() -> object:
                try:
                    return block.read(16, 4)
                except GuestMemoryLost as error:
                    return error

            sleeper = Toucher(read)
            assert watch.wait_fault() == block.host
            poison(watch, block, 0)
            error = sleeper.join()
            assert isinstance(error, GuestMemoryLost), error
            assert error.offset == 16
        finally:
            watch.close()


def test_discarding_makes_it_a_page_again(kind: Kind) -> None:
    """A block that was given up can take in the next migration."""
    with kind.block(pages=2) as block:
        watch = MissingWatch(block, features=FEATURE_POISON)
        try:
            poison(watch, block, 0)
        finally:
            watch.close()
        block.discard(0, 2 * block.page_size)
        assert block.read(0, 8) == bytes(8)
        block.write(0, b"alive")
        assert block.read(0, 5) == b"alive"


def test_a_file_cut_short(tmp_path: Path) -> None:
    """The kernel cannot provide the page: the same error, another cause. A memfd of ours is sealed
    against it; a file has no such protection."""
    with kind_of_memory("tmpfs-file", tmp_path) as kind, kind.block(pages=2) as block:
        assert block.fd is not None
        os.ftruncate(block.fd, BASE)
        with pytest.raises(GuestMemoryLost, match="exhausted") as caught:
            block.read(BASE, 1)
        assert caught.value.offset == BASE


@pytest.mark.parametrize("order", ["guard first", "guard last", "guard gone again"])
def test_beside_the_guard_of_vcpus(order: str) -> None:
    """The toy VM catches SIGBUS for its vCPUs; both handlers serve their own threads."""
    toyvm = pytest.importorskip("migration.toyvm._native")
    if order == "guard first":
        assert toyvm.lib.guard_install() == 0
    block = RAMBlock.allocate("ram", BASE)
    if order != "guard first":
        assert toyvm.lib.guard_install() == 0
    if order == "guard gone again":
        toyvm.lib.guard_uninstall()
    watch = MissingWatch(block, features=FEATURE_POISON)
    try:
        poison(watch, block, 0)
        for _ in range(2):
            with pytest.raises(GuestMemoryLost):
                block.read(0, 1)
    finally:
        watch.close()
        block.close()
        if order != "guard gone again":
            toyvm.lib.guard_uninstall()


CHILD = """
import mmap, os, signal, sys
from guestmem import RAMBlock
handled = []
if "python" in sys.argv:
    signal.signal(signal.SIGBUS, lambda *_: handled.append(1))
block = RAMBlock.allocate("ram", 4096)
if "sent" in sys.argv:
    os.kill(os.getpid(), signal.SIGBUS)
    print("lives", handled, flush=True)
else:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 4096)
    view = mmap.mmap(fd, 4096)
    os.ftruncate(fd, 0)
    print(view[0])
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [((), -signal.SIGBUS), (("sent",), -signal.SIGBUS), (("sent", "python"), 0)],
)
def test_other_signals_go_where_they_went(words: tuple[str, ...], status: int) -> None:
    """A SIGBUS of anybody else ends the process as ever, or reaches its handler."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done
    if status == 0:
        assert done.stdout == "lives [1]\n"


def test_the_handler_goes_with_the_last_block() -> None:
    """Nothing of ours stays behind in the process. (Python's signal module does not see C handlers,
    so the kernel is asked.)"""

    def catches_sigbus() -> bool:
        status = Path("/proc/self/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGBUS - 1) & 1)

    before = catches_sigbus()
    first, second = (RAMBlock.allocate(name, mmap.PAGESIZE) for name in ("a", "b"))
    first.close()
    assert catches_sigbus()
    second.close()
    second.close()
    assert catches_sigbus() == before
