"""Preallocation by native threads: every page is there, contents stay, a lack is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestmem import Backing, HugepagesShort, MemoryBackend, RAMBlock, preallocate
from guestmem.pools import HugepagePool
from tests.support.guestmem_memory import HUGE, KINDS, kind_of_memory, more_hugepages, pool_lock
from tests.support.need import need

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_page_exists_and_keeps_its_contents(name: str, threads: int, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with kind_of_memory(name, tmp_path) as kind, kind.block(pages=8) as block:
        block.write(kind.page_size * 3, b"before")
        preallocate(block, threads=threads, progress=lambda *at: seen.append(at))
        assert block.was_preallocated
        assert block.populated().count() == block.page_count
        assert all(block.is_resident(page * kind.page_size) for page in range(8))
        assert block.read(kind.page_size * 3, 6) == b"before"
    done = [at for at, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (8 * kind.page_size, 8 * kind.page_size)


def test_more_parts_than_threads() -> None:
    with RAMBlock.allocate("ram", 200 << 20) as block:
        preallocate(block, threads=3)
        assert block.populated().count() == block.page_count


@pytest.mark.parametrize("threads", [0, 65])
def test_a_number_of_threads_that_makes_no_sense(threads: int) -> None:
    with RAMBlock.allocate("ram", HUGE) as block, pytest.raises(ValueError, match="1 to 64"):
        preallocate(block, threads=threads)
    with pytest.raises(ValueError, match="1 to 64"):
        MemoryBackend(prealloc_threads=65)


def test_an_empty_pool_is_an_error_with_its_remedy_and_no_signal(tmp_path: Path) -> None:
    """Pages that were not promised, and are not there."""
    with more_hugepages(2, tmp_path / "journal"), pool_lock():
        free = HugepagePool(HUGE).state().obtainable
        need(free < 1 << 16, "a pool too large to exhaust")
        length = (free + 3) * HUGE
        with RAMBlock.allocate("ram", length, backing=Backing.HUGETLB, is_reserved=False) as block:
            with pytest.raises(HugepagesShort) as caught:
                preallocate(block, threads=2)
            assert not block.was_preallocated
    assert "huge page" in str(caught.value)
    assert "postcopy hugepages reserve" in str(caught.value)
    assert caught.value.pages_free < caught.value.pages_needed
