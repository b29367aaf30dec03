"""The GIL rule's other half: nobody brings the page any more, and its sleeper holds the GIL.

No Python can run in that process again, so nothing in Python can say so. The watchdog does: a
report that names thread and address on stderr, then the end of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from guestmem import Backing
from tests.e2e.test_gil_served import OPTIONS, RAM_BYTES, ROM_BYTES
from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import more_hugepages
from tests.support.pair import Side, side
from tests.support.proxy import Proxy
from tests.support.tamper import StallAt, message
from uffd.watchdog import EXIT_STATUS

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

PAGE = 1234


@contextmanager
def held(tmp_path: Path, backing: str = "anon") -> Iterator[tuple[Side, Child, Proxy]]:
    """The guest runs at the destination, and nothing comes there but what is asked for."""
    uri = f"unix:{tmp_path}/m"
    with (
        nothing_left(),
        side(backing=Backing(backing), **OPTIONS) as source,
        child(incoming=True, backing=backing, **OPTIONS) as destination,
        Proxy(uri) as proxy,
    ):
        source.service.set_capabilities({"postcopy-ram": True})
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        migrate_by_postcopy(source.service, proxy.uri)
        destination.wait_event("RESUME")
        yield source, destination, proxy


def assert_reported(destination: Child, touching: dict[str, int], size: int = 4096) -> None:
    """Ended by the watchdog, with a report for people that names the page and its sleeper."""
    address = touching["host"] + ((PAGE << 12) & -size)
    assert destination.wait_exit() == EXIT_STATUS
    report = destination.stderr
    assert f"missing page at address {address:#x}" in report, report
    assert f"thread {touching['tid']} " in report
    assert "ending the process" in report
    assert "touch_pages" in report  # the Python stack of the thread, by faulthandler


def assert_source_keeps_off(source: Side) -> None:
    """RUN went out: whatever becomes of the destination, the guest never starts here by itself."""
    assert source.service.wait(30) == "postcopy-paused", source.service.query()
    assert source.machine.run_state == "finish-migrate"
    assert ("RESUME", {}) not in source.events


@pytest.mark.parametrize("backing", ["anon", "memfd", "hugetlb"])
def test_touched_after_the_loss(tmp_path: Path, backing: str) -> None:
    """The destination is paused; then a thread touches what will not come."""
    pages = 2 * (RAM_BYTES + ROM_BYTES) >> 21 if backing == "hugetlb" else 0
    with ExitStack() as stack:
        if pages:
            stack.enter_context(more_hugepages(pages, tmp_path / "journal"))
        source, destination, proxy = stack.enter_context(held(tmp_path, backing))
        proxy.cut()
        destination.wait_status("postcopy-paused")
        destination.send("hold_gil", "toy.ram", PAGE)
        touching = destination.wait_event("touching")
        assert_reported(destination, touching, 2 << 20 if backing == "hugetlb" else 4096)
        assert_source_keeps_off(source)


def test_lost_while_it_sleeps(tmp_path: Path) -> None:
    """The thread sleeps on a request the network swallowed; then the connection ends."""
    uri = f"unix:{tmp_path}/m"
    stall = StallAt(message("REQ_PAGES_ID"), nth=0, after=0)
    options = {**OPTIONS, "smp": 0, "ring_pages": 0}
    with (
        nothing_left(),
        side(**options) as source,
        child(incoming=True, **options) as destination,
        Proxy(uri, stall) as proxy,
    ):
        source.service.set_capabilities({"postcopy-ram": True})
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        migrate_by_postcopy(source.service, proxy.uri)
        destination.wait_event("RESUME")
        destination.send("hold_gil", "toy.ram", PAGE)
        touching = destination.wait_event("touching")
        assert stall.struck.wait(30)
        proxy.cut()
        assert_reported(destination, touching)
        assert_source_keeps_off(source)
