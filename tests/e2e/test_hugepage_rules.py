"""The rules of huge pages in a migration: several kinds of memory at once, refusals by their cause,
pages of 1 GiB, what a shortage says, and nothing smaller behind anybody's back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing, GuestMemoryError, MemoryBackend
from guestmem.hugejournal import HugepageJournal
from guestmem.pools import HugepagePool
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import HUGE, more_hugepages, mounted, pool_lock
from tests.support.monitor_process import run_postcopy
from tests.support.need import need
from tests.support.pair import MIB, Side, pair
from uffd import Feature, KernelSupport, opening

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

GIANT = 1 << 30
MIXED = (("toy.small", 4 * MIB), ("toy.shared", 4 * MIB), ("toy.file", 4 * MIB))


def migrate(source: Side, target: Side, uri: str) -> None:
    source.machine.start()
    target.service.migrate_incoming(uri)
    migrate_by_postcopy(source.service, uri)
    assert source.service.wait(120) == "completed", source.service.query()
    assert target.service.wait(120) == "completed", target.service.query()
    target.assert_sweep_clean()


def test_every_kind_of_memory_in_one_guest(tmp_path: Path) -> None:
    """2 MiB pages from a memfd and from a mounted file system, anonymous and shared small ones."""
    with (
        more_hugepages(2 * (8 + 4) * MIB // HUGE, tmp_path / "journal"),
        mounted("hugetlbfs", "pagesize=2M", tmp_path / "huge") as directory,
        nothing_left(),
    ):
        backends = {
            "toy.ram": MemoryBackend(Backing.HUGETLB),
            "toy.small": MemoryBackend(Backing.ANON),
            "toy.shared": MemoryBackend(Backing.MEMFD),
            "toy.file": MemoryBackend(Backing.FILE, str(directory), HUGE, prealloc_threads=2),
        }
        shape: dict[str, Any] = {"ram_bytes": 8 * MIB, "extra_blocks": MIXED, "backends": backends}
        with pair(smp=2, **shape) as (source, target):
            sizes = [block.page_size for block in target.machine.ram]
            assert sizes == [HUGE, 4096, 4096, HUGE]
            migrate(source, target, f"unix:{tmp_path}/m")
            assert target.figures["page-requests"] > 0


def test_each_side_may_have_another_kind_of_the_same_page_size(tmp_path: Path) -> None:
    with (
        nothing_left(),
        pair(ram_bytes=8 * MIB, backing=Backing.ANON, destination={"backing": Backing.MEMFD}) as (
            source,
            target,
        ),
    ):
        migrate(source, target, f"unix:{tmp_path}/m")


def test_sizes_that_differ_in_one_block_only_name_it(tmp_path: Path) -> None:
    """Both sides have the same sizes in sum, but not block by block."""
    huge, small = MemoryBackend(Backing.HUGETLB), MemoryBackend(Backing.ANON)
    extra = (("toy.more", 4 * MIB),)
    with (
        more_hugepages(2 * 4 * MIB // HUGE, tmp_path / "journal"),
        nothing_left(),
        pair(
            ram_bytes=4 * MIB,
            extra_blocks=extra,
            backends={"toy.ram": small, "toy.more": huge},
            destination={"backends": {"toy.ram": huge, "toy.more": small}},
        ) as (source, target),
    ):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(30) == "failed"
        assert target.service.wait(30) == "failed"
        error = str(target.service.query()["error-desc"])
        assert "mismatched RAM page size of toy.ram: 4096 bytes at the source" in error
        assert "2097152 here" in error
        assert source.machine.run_state == "running"


def test_a_kernel_without_userfault_on_hugepages_refuses_at_advise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feature is taken out of what the kernel reports; the rest is the kernel's own."""
    real = opening.handshake

    def masked(fd: int, features: Feature) -> KernelSupport:
        support = real(fd, features)
        return KernelSupport(support.features & ~Feature.MISSING_HUGETLBFS, support.ioctls)

    monkeypatch.setattr(opening, "handshake", masked)
    with (
        more_hugepages(2 * 4 * MIB // HUGE, tmp_path / "journal"),
        nothing_left(),
        pair(ram_bytes=4 * MIB, backing=Backing.HUGETLB) as (source, target),
    ):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(30) == "failed"
        assert target.service.wait(30) == "failed"
        error = str(target.service.query()["error-desc"])
        assert "postcopy is not possible here" in error
        assert "MISSING_HUGETLBFS" in error
        assert source.machine.run_state == "running"
        assert target.machine.run_state == "inmigrate"


def test_small_pages_instead_of_huge_ones_are_never_silent(tmp_path: Path) -> None:
    """``--mem-path`` on an ordinary file system: told, and with a size asked for an error."""
    done = run_postcopy(*("run", "-m", "4M", "--mem-path", str(tmp_path), "--hugepage-size", "2M"))
    assert done.returncode == 1
    assert "has pages of 4 KiB, not the 2 MiB asked for" in done.stderr
    with pair(ram_bytes=4 * MIB, backing=Backing.FILE, path=str(tmp_path)) as (source, _):
        from migration.commands.vm_memory import warnings

        (text,) = warnings(source.machine)
    assert "on no file system of huge pages, its pages are 4 KiB" in text


def test_prealloc_finds_the_lack_before_the_guest_does(tmp_path: Path) -> None:
    """No promise was asked for, and the pool has too few: an error at the start, not a SIGBUS."""
    with more_hugepages(2, tmp_path / "journal"), pool_lock():
        pages = HugepagePool(HUGE).state().obtainable + 4
        need(pages < 1 << 14, "a pool too large to exhaust")
        done = run_postcopy(
            *("run", "-m", f"{pages * HUGE}B", "--memory-backend", "a", "--object"),
            f"memory-backend-memfd,id=a,size={pages * HUGE}B,hugetlb=on,reserve=off,prealloc=on",
        )
    assert done.returncode == 1, done
    assert "huge pages of 2 MiB" in done.stderr
    assert "postcopy hugepages reserve" in done.stderr


def test_pages_nobody_promised_are_looked_for_before_advise(tmp_path: Path) -> None:
    """``reserve=off`` at the destination, and what the source holds leaves too few: refused with
    the numbers, and the guest stays where it is."""
    with more_hugepages(4, tmp_path / "journal"), nothing_left(), pool_lock():
        pages = HugepagePool(HUGE).state().obtainable // 2 + 1
        need(pages < 1 << 12, "a pool too large to exhaust")
        unpromised = MemoryBackend(Backing.HUGETLB, is_reserved=False)
        with pair(
            ram_bytes=pages * HUGE,
            backing=Backing.HUGETLB,
            fill_share=0.05,
            ring_pages=0,
            destination={"backends": {"toy.ram": unpromised}},
        ) as (source, target):
            source.machine.start()
            target.service.migrate_incoming(f"unix:{tmp_path}/m")
            migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
            assert source.service.wait(60) == "failed"
            assert target.service.wait(60) == "failed"
            error = str(target.service.query()["error-desc"])
            assert f"RAM block 'toy.ram' needs {pages} huge pages of 2 MiB" in error
            assert "postcopy hugepages reserve" in error
            assert "x-memory-guard off" in error
            assert source.machine.run_state == "running"


@contextlib.contextmanager
def giant_pages(count: int, journal: Path) -> Iterator[None]:
    """Pages of 1 GiB, if this host can find so much memory in one piece."""
    need(HugepagePool(GIANT).exists, "this kernel (or processor) has no 1 GiB pages")
    takings = HugepageJournal(journal)
    free = HugepagePool(GIANT).state().available
    if free >= count:
        yield
        return
    try:
        taking = takings.take(count - free, GIANT, owned=True)
    except GuestMemoryError as error:
        need(False, f"no {count} pages of 1 GiB: {error}")
    try:
        yield
    finally:
        takings.give_back(taking.id)


@pytest.mark.timeout(240)
def test_pages_of_1_gib(tmp_path: Path) -> None:
    """Ours to ours: one page, one fault, and a warning that says what it costs."""
    with giant_pages(2, tmp_path / "journal"), nothing_left():
        backend = MemoryBackend(Backing.HUGETLB, hugepage_size=GIANT)
        with pair(ram_bytes=GIANT, backends={"toy.ram": backend}, fill_share=0.05, smp=1) as (
            source,
            target,
        ):
            assert [block.page_size for block in target.machine.ram] == [GIANT]
            migrate(source, target, f"unix:{tmp_path}/m")
            assert target.figures["page-requests"] == 1
            for side in (source, target):
                (text,) = side.figures["warnings"]
                assert "RAM block toy.ram has pages of 1 GiB" in text
                assert "about 1.1 s at 1 GB/s" in text


def test_the_demo_with_memory_of_several_kinds(tmp_path: Path) -> None:
    with more_hugepages(2 * 4 * MIB // HUGE, tmp_path / "journal"):
        done = run_postcopy(
            *("demo", "-m", "8M", "--postcopy-after", "0.1", "--json"),
            *("--object", "memory-backend-memfd,id=huge,size=4M,hugetlb=on,prealloc=on"),
            *("--object", "memory-backend-memfd,id=shared,size=4M"),
        )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["oracle"]["errors"] == 0
    assert result["oracle"]["pages_checked"] == 16 * MIB // 4096
