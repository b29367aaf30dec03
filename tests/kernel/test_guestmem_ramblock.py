"""RAMBlocks on every kind of memory: contents, bounds, mappings, residency, discard."""

from __future__ import annotations

import errno
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestmem import (
    TARGET_PAGE_BYTES,
    Backing,
    GuestMemoryError,
    HugepagesShort,
    PageSizeMismatch,
    RAMBlock,
    RAMList,
)
from guestmem.pools import HugepagePool
from guestmem.smaps import report
from tests.support.guestmem_faults import Toucher, missing_watch
from tests.support.guestmem_memory import (
    BASE,
    HUGE,
    KINDS,
    Kind,
    kind_of_memory,
    mapped_ranges,
    more_hugepages,
    mounted,
    open_fds,
)

pytestmark = pytest.mark.kernel

SHARED_KINDS = [name for name in KINDS if name != "anon"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of memory in turn."""
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


@pytest.fixture(params=SHARED_KINDS)
def shared_kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of memory that can be mapped twice."""
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


def test_geometry_and_flags(kind: Kind) -> None:
    with kind.block(pages=4) as block:
        assert block.page_size == kind.page_size
        assert block.used_length == block.max_length == 4 * kind.page_size
        assert block.page_count == block.used_length // TARGET_PAGE_BYTES
        assert block.host % kind.page_size == 0
        assert block.is_shared == (block.fd is not None) == (kind.name != "anon")
        assert block.is_hugetlb == kind.name.startswith("hugetlb")
        (found,) = block.reports()
        assert found.kernel_page_size == kind.page_size
        assert {"dc", "dd"} <= found.vm_flags  # not copied by fork, not dumped
        assert ("ht" in found.vm_flags) == block.is_hugetlb
        if block.fd is not None:
            assert not os.get_inheritable(block.fd)


def test_contents(kind: Kind) -> None:
    with kind.block() as block:
        end = block.used_length
        assert block.read(0, 16) == bytes(16)
        block.write(end - 5, b"hello")
        assert block.read(end - 7, 7) == b"\0\0hello"
        block.fill(3, 10, 0xAB)
        assert block.read(2, 12) == b"\0" + b"\xab" * 10 + b"\0"
        block.move(5, 3, 10)
        assert block.read(3, 13) == b"\xab" * 12 + b"\0"
        block.store_u64(BASE, 2**64 - 1)
        assert block.load_u64(BASE) == 2**64 - 1
        assert block.fetch_add_u64(BASE, 3) == 2**64 - 1
        assert block.load_u64(BASE) == 2
        assert not block.is_zero(BASE, 8)
        assert block.is_zero(BASE + 8, 100)
        view = block.unsafe_view()
        assert len(view) == end
        view[end - 5] = ord("j")
        assert block.read(end - 5, 5) == b"jello"


def test_touching_outside_is_refused(kind: Kind) -> None:
    with kind.block(idstr="pc.ram", pages=1) as block:
        end = block.used_length
        touches: list[Callable[[], object]] = [
            lambda: block.read(end, 1),
            lambda: block.read(-1, 1),
            lambda: block.read(0, end + 1),
            lambda: block.read(0, -1),
            lambda: block.write(end - 1, b"ab"),
            lambda: block.fill(end - 1, 2, 0),
            lambda: block.move(1, 0, end),
            lambda: block.load_u64(end),
            lambda: block.store_u64(-8, 1),
            lambda: block.is_resident(end),
            lambda: block.is_zero(2**64 - 1, 2),
        ]
        for touch in touches:
            with pytest.raises(ValueError, match=r"pc\.ram"):
                touch()
        for offset in (1, 4, end - 9):
            with pytest.raises(ValueError, match="multiple of 8"):
                block.load_u64(offset)
        assert block.read(end, 0) == b""


def test_a_closed_block_refuses_everything() -> None:
    block = RAMBlock.allocate("ram", BASE)
    block.close()
    block.close()
    touches: list[Callable[[], object]] = [
        lambda: block.read(0, 1),
        lambda: block.write(0, b"x"),
        lambda: block.fd,
        lambda: block.discard(0, BASE),
        lambda: block.unsafe_view(),
        lambda: block.set_thp(False),
        lambda: block.populated(),
    ]
    for touch in touches:
        with pytest.raises(ValueError, match="closed"):
            touch()


def test_residency_is_seen_without_touching(kind: Kind) -> None:
    with kind.block(pages=3) as block:
        page = kind.page_size
        assert [block.is_resident(i * page) for i in range(3)] == [False] * 3
        block.write(page + 5, b"x")
        assert [block.is_resident(i * page) for i in range(3)] == [False, True, False]
        populated = block.populated()
        if kind.name == "hugetlbfs-file":
            assert populated.count() == block.page_count  # others may have filled the file
        else:
            per_page = page // TARGET_PAGE_BYTES
            assert list(populated.runs()) == [(per_page, per_page)]
        assert [block.is_resident(i * page) for i in range(3)] == [False, True, False]


def test_reading_a_hole_of_private_memory_populates_nothing() -> None:
    with RAMBlock.allocate("ram", 8 * BASE) as block:
        block.read(0, 8 * BASE)  # maps the shared zero page
        block.write(BASE, b"x")
        assert list(block.populated().runs()) == [(1, 1)]


def test_a_discarded_page_reads_as_zero(kind: Kind) -> None:
    with kind.block(pages=4) as block:
        page = kind.page_size
        block.fill(0, block.used_length, 0x5A)
        block.discard(page, 2 * page)
        assert [block.is_resident(i * page) for i in range(4)] == [True, False, False, True]
        assert block.read(page - 1, 2) == b"\x5a\0"
        assert block.read(3 * page - 1, 2) == b"\0\x5a"


def test_a_discarded_page_faults_again(kind: Kind) -> None:
    """The proof that a discard is real: a userfaultfd sees the next touch as a missing page."""
    with kind.block(pages=2) as block:
        page = kind.page_size
        block.fill(0, block.used_length, 0x5A)
        with missing_watch(block) as watch:
            block.discard(page, page)
            toucher = Toucher(lambda: block.read(page + 7, 1))
            address = watch.wait_fault()
            assert address == block.host + page
            watch.place(address, b"\x33" * page)
            assert toucher.join() == b"\x33"
        assert block.read(page - 1, 1) == b"\x5a"


def test_a_sleeping_reader_leaves_the_gil_free() -> None:
    """The reader sleeps in the kernel while this very thread, in Python, places its page."""
    with RAMBlock.allocate("ram", 2 * BASE) as block, missing_watch(block) as watch:
        touchers = [
            Toucher(lambda: block.read(0, 4)),
            Toucher(lambda: block.fetch_add_u64(BASE, 1)),
        ]
        for _ in touchers:
            address = watch.wait_fault()
            watch.place(address, b"\x01" * BASE)
        assert touchers[0].join() == b"\x01" * 4
        assert touchers[1].join() == 0x0101010101010101
        assert block.load_u64(BASE) == 0x0101010101010102


def test_a_discard_reaches_every_alias(shared_kind: Kind) -> None:
    with shared_kind.block(pages=2) as block:
        alias = block.add_alias()
        ram = RAMList([block])
        block.write(0, b"one")
        page = shared_kind.page_size
        assert ram.find(alias.host + page + 3) == (block, page + 3)
        assert ram.find(block.host + 1) == (block, 1)
        with pytest.raises(LookupError, match="no RAM block"):
            ram.find(alias.host + alias.length)
        with missing_watch(block) as watch:  # watches the alias too
            block.discard(0, page)
            toucher = Toucher(lambda: block.read(0, 3))
            address = watch.wait_fault()
            watch.place(address, b"t" * page)
            assert toucher.join() == b"ttt"
        block.remove_alias(alias)
        assert len(block.mappings) == 1
        with pytest.raises(ValueError, match="no alias"):
            block.remove_alias(alias)


def test_private_memory_has_no_alias() -> None:
    with RAMBlock.allocate("ram", BASE) as block, pytest.raises(ValueError, match="private"):
        block.add_alias()


def test_discards_that_would_do_less_are_refused(kind: Kind) -> None:
    with kind.block(pages=2) as block:
        page = kind.page_size
        block.fill(0, 2 * page, 1)
        for offset, length in [(0, page // 2), (page // 2, page), (1, page), (0, 1)]:
            with pytest.raises(ValueError, match="whole host pages"):
                block.discard(offset, length)
        for offset, length in [(0, 3 * page), (-page, page), (2 * page, page), (page, -page)]:
            with pytest.raises(ValueError, match="outside"):
                block.discard(offset, length)
        block.discard(0, 0)
        assert block.read(0, 1) == block.read(2 * page - 1, 1) == b"\x01"
        with pytest.raises(ValueError, match="discard"):
            block.advise(mmap.MADV_DONTNEED)


def test_a_discard_of_huge_pages_keeps_the_promise(tmp_path: Path) -> None:
    """Discarded huge pages go to the pool but nobody else can have them."""
    with kind_of_memory("hugetlb", tmp_path, hugepages=4) as kind, kind.block(pages=4) as block:
        block.fill(0, block.used_length, 1)
        before = HugepagePool(HUGE).state()
        block.discard(0, block.used_length)
        after = HugepagePool(HUGE).state()
        assert after.free - before.free == after.reserved - before.reserved == 4
        with pytest.raises(HugepagesShort):
            kind.block(idstr="greedy", pages=after.available + 1)
        block.fill(0, block.used_length, 2)


def test_an_empty_pool_is_a_clear_error() -> None:
    fds, short = open_fds(), HugepagePool(HUGE).state().available + 1_000_000
    with pytest.raises(HugepagesShort) as caught:
        RAMBlock.allocate("pc.ram", short * HUGE, backing=Backing.HUGETLB)
    error = caught.value
    assert error.errno == errno.ENOMEM
    assert (error.pages_needed, error.page_size) == (short, HUGE)
    assert error.pages_free < short
    for word in ("pc.ram", str(short), str(error.pages_free), "2 MiB", "reserve", "--size 2M"):
        assert word in str(error)
    assert open_fds() == fds


def test_a_page_size_without_pool_is_a_clear_error() -> None:
    with pytest.raises(GuestMemoryError, match="no huge pages of 8 MiB"):
        RAMBlock.allocate("ram", 8 << 20, backing=Backing.HUGETLB, hugepage_size=8 << 20)


def test_small_pages_are_not_taken_for_huge_ones(tmp_path: Path) -> None:
    target = tmp_path / "ram"
    for path in (tmp_path, target):
        with pytest.raises(PageSizeMismatch, match="hugetlbfs") as caught:
            RAMBlock.allocate("ram", HUGE, backing=Backing.FILE, path=str(path), hugepage_size=HUGE)
        assert (caught.value.wanted, caught.value.found) == (HUGE, BASE)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_path_that_is_a_file(tmp_path: Path) -> None:
    """A missing file is made and stays; a file's contents are guest RAM; a short one is refused."""
    with mounted("tmpfs", "size=1M", tmp_path / "fs") as directory:
        path = directory / "ram"
        with RAMBlock.allocate("ram", 4 * BASE, backing=Backing.FILE, path=str(path)) as block:
            block.write(BASE, b"kept")
        assert path.stat().st_size == 4 * BASE
        with RAMBlock.allocate("ram", 2 * BASE, backing=Backing.FILE, path=str(path)) as block:
            assert block.read(BASE, 4) == b"kept"
        assert path.stat().st_size == 4 * BASE
        with pytest.raises(GuestMemoryError, match="needs") as caught:
            RAMBlock.allocate("ram", 8 * BASE, backing=Backing.FILE, path=str(path))
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(GuestMemoryError, match="the file system has") as caught:
            RAMBlock.allocate("ram", 64 << 20, backing=Backing.FILE, path=str(directory))
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(GuestMemoryError, match="open"):
            RAMBlock.allocate("ram", BASE, backing=Backing.FILE, path=f"{directory}/no/such")


def test_a_huge_file_learns_its_page_size(tmp_path: Path) -> None:
    with kind_of_memory("hugetlbfs-file", tmp_path) as kind:
        block = RAMBlock.allocate(
            "ram", 3 * TARGET_PAGE_BYTES, backing=Backing.FILE, path=kind.path
        )
        with block:
            assert (block.page_size, block.max_length) == (HUGE, HUGE)
            assert block.used_length == 3 * TARGET_PAGE_BYTES
            with pytest.raises(ValueError, match="outside"):
                block.read(3 * TARGET_PAGE_BYTES, 1)
            block.discard(0, HUGE)


@pytest.mark.parametrize("name", ["anon", "memfd", "hugetlb"])
def test_resizing(name: str, tmp_path: Path) -> None:
    with kind_of_memory(name, tmp_path) as kind:
        page = kind.page_size
        backing = kind.backing
        with RAMBlock.allocate("ram", page, max_length=3 * page, backing=backing) as block:
            assert block.max_length == 3 * page
            block.resize(3 * page)
            block.fill(0, 3 * page, 0x77)
            block.resize(page)
            assert block.page_count == page // TARGET_PAGE_BYTES
            with pytest.raises(ValueError, match="outside"):
                block.read(page, 1)
            block.resize(3 * page)
            assert block.read(page - 1, 3) == b"\x77\0\0"
            for wrong in (0, 1, 4 * page, page + 1):
                with pytest.raises(ValueError, match="of at most"):
                    block.resize(wrong)


@pytest.mark.parametrize("name", ["anon", "memfd"])
def test_thp_on_every_mapping(name: str, tmp_path: Path) -> None:
    with kind_of_memory(name, tmp_path) as kind:
        block = kind.block(pages=3 * HUGE // BASE)
        with block:
            assert block.host % HUGE == 0
            if name == "memfd":
                block.add_alias()
            block.set_thp(True)
            assert all("hg" in found.vm_flags for found in block.reports())
            block.set_thp(False)
            assert all("nh" in found.vm_flags for found in block.reports())
            if name == "memfd":
                alias = block.add_alias()
                assert "nh" in report(alias.host, alias.length).vm_flags


def test_huge_pages_form_when_allowed_and_only_then() -> None:
    with RAMBlock.allocate("ram", 4 * HUGE) as block:
        block.set_thp(False)
        block.fill(0, HUGE, 1)
        (found,) = block.reports()
        assert found.anon_huge_pages == 0
        enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        if "[never]" in enabled:
            pytest.skip("transparent huge pages are switched off")
        block.discard(0, 4 * HUGE)
        block.set_thp(True)
        block.fill(0, 4 * HUGE, 1)
        (found,) = block.reports()
        assert found.anon_huge_pages > 0


def test_nothing_leaks(kind: Kind) -> None:
    gc.collect()
    fds, maps = open_fds(), mapped_ranges()
    for _ in range(3):
        with kind.block() as block:
            block.write(0, b"x")
            if block.is_shared:
                block.add_alias()
            host, length = block.host, block.max_length
        assert report(host, length).vma_count == 0
    assert (open_fds(), mapped_ranges()) == (fds, maps)


def test_a_failed_mapping_leaks_nothing(tmp_path: Path) -> None:
    with more_hugepages(2, tmp_path / "journal"):
        fds, maps = open_fds(), mapped_ranges()
        too_many = HugepagePool(HUGE).state().available + 1
        for _ in range(3):
            with pytest.raises(HugepagesShort):
                RAMBlock.allocate("ram", too_many * HUGE, backing=Backing.HUGETLB)
        assert (open_fds(), mapped_ranges()) == (fds, maps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"idstr": "", "length": BASE},
        {"idstr": "x" * 256, "length": BASE},
        {"idstr": "ü" * 128, "length": BASE},
        {"idstr": "ram", "length": 0},
        {"idstr": "ram", "length": BASE + 1},
        {"idstr": "ram", "length": 2 * BASE, "max_length": BASE},
        {"idstr": "ram", "length": BASE, "path": "/tmp"},
        {"idstr": "ram", "length": BASE, "backing": Backing.FILE},
        {"idstr": "ram", "length": BASE, "backing": Backing.HUGETLB, "hugepage_size": 3},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - a plain argument error, as documented
        RAMBlock.allocate(**arguments)  # type: ignore[arg-type]


def test_a_list_of_blocks() -> None:
    blocks = [RAMBlock.allocate(name, BASE * size) for name, size in (("b", 1), ("a", 2))]
    with RAMList(blocks) as ram:
        assert [block.idstr for block in ram] == ["b", "a"]
        assert len(ram) == 2
        assert ram.total_length == 3 * BASE
        assert ram.by_idstr("a") is blocks[1]
        assert ram.find(blocks[1].host + 9) == (blocks[1], 9)
        with pytest.raises(KeyError):
            ram.by_idstr("c")
        with pytest.raises(ValueError, match="two RAM blocks"):
            ram.add(blocks[0])
    with pytest.raises(ValueError, match="closed"):
        blocks[0].read(0, 1)
