"""Small pages made huge in place, on the real kernel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem import Collapser, CollapseReport, CollapseState, RAMBlock
from tests.support.guestmem_memory import BASE, HUGE, Kind, kind_of_memory
from tests.support.guestmem_writer import Writer, build_writer
from tests.support.need import need

pytestmark = pytest.mark.kernel

REGIONS = 4


@pytest.fixture(params=["anon", "memfd"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


@pytest.fixture
def block(kind: Kind) -> Iterator[RAMBlock]:
    """Four regions of small pages, each with its own byte, placed while huge ones were off."""
    with kind.block(pages=REGIONS * HUGE // BASE) as block:
        block.set_thp(False)
        for page in range(block.page_count):
            block.fill(page * BASE, BASE, page % 251)
        yield block


def collapse(*blocks: RAMBlock) -> CollapseReport:
    """All of it, to its end."""
    ended = threading.Event()
    collapser = Collapser(blocks, lambda report: ended.set())
    collapser.start()
    assert ended.wait(60)
    collapser.stop()
    return collapser.report()


def need_done(report: CollapseReport) -> None:
    need(
        report.state is not CollapseState.UNSUPPORTED,
        f"no MADV_COLLAPSE for this memory: {report.reason}",
        remedy="Linux 6.1; for shared memory transparent_hugepage/shmem_enabled must not be 'deny'",
    )
    assert report.state is CollapseState.DONE, report


def huge_bytes(block: RAMBlock) -> list[int]:
    """Mapped by large entries, per mapping."""
    return [each.anon_huge_pages + each.shmem_pmd_mapped for each in block.reports()]


def test_all_pages_become_huge_and_keep_their_bytes(block: RAMBlock) -> None:
    assert huge_bytes(block) == [0]
    block.set_thp(True)
    report = collapse(block)
    need_done(report)
    assert (report.region_count, report.collapsed) == (REGIONS, REGIONS)
    assert huge_bytes(block) == [REGIONS * HUGE]
    for page in range(block.page_count):
        assert block.read(page * BASE, BASE) == bytes([page % 251]) * BASE


def test_aliases_get_their_large_entries_too(tmp_path: Path) -> None:
    with (
        kind_of_memory("memfd", tmp_path) as kind,
        kind.block(pages=REGIONS * HUGE // BASE) as block,
    ):
        block.add_alias()
        block.set_thp(False)
        block.fill(0, block.used_length, 7)
        assert all("nh" in each.vm_flags for each in block.reports())
        block.set_thp(True)
        report = collapse(block)
        need_done(report)
        assert report.collapsed == report.region_count == 2 * REGIONS
        assert huge_bytes(block) == [REGIONS * HUGE] * 2


def test_memory_told_not_to_have_huge_pages_is_left_alone(block: RAMBlock) -> None:
    """Skipped, with the reason, and nothing has changed."""
    report = collapse(block)
    assert report.state is CollapseState.UNSUPPORTED
    assert (report.collapsed, report.reason) == (0, "Invalid argument")
    assert huge_bytes(block) == [0]


def test_huge_pages_from_a_pool_are_not_touched(tmp_path: Path) -> None:
    with kind_of_memory("hugetlb", tmp_path) as kind, kind.block(pages=2) as block:
        report = collapse(block)
        assert (report.state, report.region_count) == (CollapseState.DONE, 0)


def test_a_guest_that_writes_meanwhile_loses_nothing(block: RAMBlock, tmp_path: Path) -> None:
    """The kernel copies under the writer; each counter only ever grows, so a lost write shows as a
    page that holds another value than the last one written."""
    writer = Writer(build_writer(tmp_path), block)
    block.set_thp(True)
    reports = [collapse(block) for _ in range(5)]
    assert writer.stop() > 0
    need_done(reports[0])
    assert sum(report.collapsed for report in reports) > 0
    for page in range(block.page_count):
        rest = block.read(page * BASE + 8, BASE - 8)
        assert rest == bytes([page % 251]) * (BASE - 8)


def test_it_stops_when_told(block: RAMBlock) -> None:
    block.set_thp(True)
    collapser = Collapser([block])
    collapser.stop()  # before it began
    collapser.start()
    collapser.stop()
    report = collapser.report()
    assert report.state in (CollapseState.STOPPED, CollapseState.UNSUPPORTED)
    assert report.collapsed == 0
