"""The oracle can fail: damage done on the way between two real processes is found, page by page.

Without checksums QEMU's stream cannot tell a changed page from a right one: the guest's own oracle
must. With them the damage never gets that far.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.e2e_demo import TamperedDemo, tampered_demo
from tests.support.stream_elements import TARGET_PAGE_BYTES, Kind, Phase
from tests.support.tamper import DropPage, FlipPageByte, ReplayStale, SwapPages, Tamper

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

RAM_BYTES = 4 << 20
PAGES = RAM_BYTES // TARGET_PAGE_BYTES
RING_BYTES = 64 * TARGET_PAGE_BYTES  # at the end of RAM, rewritten all the time
MISHAPS: dict[str, Callable[[], Tamper]] = {
    "flipped": lambda: FlipPageByte(nth=3, at=1234, mask=0x40),
    "flipped-in-the-counter": lambda: FlipPageByte(nth=10),
    "swapped": lambda: SwapPages(nth=5),
    "stale": lambda: ReplayStale(nth=2),
    "dropped": lambda: DropPage(nth=4),
}
DAMAGED_PAGES = {"flipped": 1, "flipped-in-the-counter": 1, "swapped": 2, "stale": 1}


def mishap(name: str) -> Tamper:
    """The tamper, kept off the ring: what is damaged there its device may write anew."""
    tamper = MISHAPS[name]()
    strikes = tamper.where
    tamper.where = lambda e: strikes(e) and e.page_offset < RAM_BYTES - RING_BYTES
    return tamper


def run(demo: TamperedDemo, *, checksum: bool) -> None:
    """A guest that writes all the time, looked at twice before the switch."""
    demo.prepare(checksum=checksum)
    demo.migrate(passes=2)


def test_without_damage_it_is_clean(tmp_path: Path) -> None:
    """As a measure: the same way, the same proxy, nothing done."""
    with tampered_demo(tmp_path) as demo:
        run(demo, checksum=False)
        result = demo.verdict()
        assert result["result"] == "ok", result
        assert result["oracle"] == {"pages_checked": PAGES, "errors": 0}
        assert demo.proxy.seen[Phase.POSTCOPY, Kind.PAGE] > 0


@pytest.mark.parametrize("name", DAMAGED_PAGES)
def test_damage_is_found_page_by_page(tmp_path: Path, name: str) -> None:
    """No checksums: the migration completes, and the oracle counts exactly the damaged pages."""
    tamper = mishap(name)
    with tampered_demo(tmp_path, tamper) as demo:
        run(demo, checksum=False)
        result = demo.verdict()
    assert tamper.hits == 1
    assert result["result"] == "failed"
    assert result["oracle"]["errors"] == DAMAGED_PAGES[name]
    assert any("damaged pages" in reason for reason in result["failures"])


def test_a_dropped_page_is_an_error_of_the_stream(tmp_path: Path) -> None:
    """A page that never came would read as zero after the end. So the end is not accepted: the
    destination pauses with the page still missing, and nobody ever reads it, the oracle neither.
    """
    tamper = mishap("dropped")
    with tampered_demo(tmp_path, tamper) as demo:
        run(demo, checksum=False)
        result = demo.verdict()
        info = demo.target.execute("query-migrate")
    assert tamper.hits == 1
    assert info["status"] == "postcopy-paused"
    assert "1 target pages (4 KiB) never sent" in info["error-desc"]
    assert info["x-postcopy"]["missing-pages"] == 1
    assert result["result"] == "failed"
    assert any("never sent" in reason for reason in result["failures"])
    assert any("pages are missing" in reason for reason in result["failures"])
    assert result["oracle"]["pages_checked"] == 0


@pytest.mark.parametrize("name", MISHAPS)
def test_with_checksums_damage_is_an_error_that_names_the_batch(tmp_path: Path, name: str) -> None:
    """The frame is refused before any of it is used. Struck before RUN, the guest goes on at the
    source, intact; later the destination pauses with those pages missing, and none is wrong.
    """
    tamper = mishap(name)
    with tampered_demo(tmp_path, tamper) as demo:
        run(demo, checksum=True)
        result = demo.verdict()
        info = demo.target.execute("query-migrate")
        machine = demo.target.execute("x-query-machine")
    assert tamper.hits == 1
    assert result["result"] == "failed"
    assert re.search(r"stream offset 0x[0-9a-f]+.*frame \d+ ", info["error-desc"])
    assert any("frame" in reason for reason in result["failures"])
    assert info["x-postcopy"]["missing-pages"] >= 1
    assert machine["touch_errors"] == result["oracle"]["errors"] == 0
    is_at_source = info["status"] == "failed"
    assert is_at_source or info["status"] == "postcopy-paused"
    assert result["oracle"]["pages_checked"] == (PAGES if is_at_source else 0)
