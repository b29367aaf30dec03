"""The GIL rule: a Python thread that touches missing pages while holding the GIL is served.

The destination is a process of its own; the thread reads RAM through ``unsafe_view()``, so while it
sleeps no Python runs there at all. Each test is one phase of the migration; what came is compared
with the source's RAM, and the oracle judges all of it at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e_agent import Agent, random_pages, touch_pages
from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_pings import InsertPings
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import more_hugepages
from tests.support.pair import MIB, Side, side
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RAM_BYTES = 16 * MIB
ROM_BYTES = 8 * MIB  # the ring device lives at its end
RAM_PAGES = RAM_BYTES >> 12
#: Readers only: the source's RAM stays what the destination must show.
OPTIONS: dict[str, Any] = {
    "ram_bytes": RAM_BYTES,
    "extra_blocks": (("toy.rom", ROM_BYTES),),
    "smp": 1,
    "working_set_bytes": RAM_BYTES // 2,
    "rate": 2000,
    "write_share": 0.0,
}
SLOW = 24 << 20  # bytes a second: the push outlasts the touches by far
TOUCHES = 200


@pytest.fixture(params=["anon", "memfd", "hugetlb"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind of memory, with huge pages for both sides."""
    if request.param != "hugetlb":
        yield request.param
        return
    pages = 2 * (RAM_BYTES + ROM_BYTES) >> 21
    with more_hugepages(pages, tmp_path / "journal"):
        yield request.param


@contextmanager
def both(backing: str, uri: str, **parameters: Any) -> Iterator[tuple[Side, Child]]:
    """A running source here, a destination that listens at ``uri`` in a child."""
    with (
        nothing_left(),
        side(backing=_backing(backing), **OPTIONS) as source,
        child(incoming=True, backing=backing, **OPTIONS) as destination,
    ):
        source.service.set_capabilities({"postcopy-ram": True})
        source.service.set_parameters({"max-postcopy-bandwidth": SLOW, **parameters})
        if "x-checksum" in parameters:
            destination.call("service", "set_parameters", {"x-checksum": False})
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        yield source, destination


def _backing(name: str) -> Any:
    from guestmem import Backing

    return Backing(name)


def touch(source: Side, destination: Child, pages: list[int]) -> int:
    """Touch through a raw view and compare; how many of the pages were missing."""
    destination.call("touch", "toy.ram", pages)
    return check_touched(source, destination, pages)


def check_touched(source: Side, destination: Child, pages: list[int]) -> int:
    seen = destination.wait_event("touched")
    assert seen["sums"] == touch_pages(source, "toy.ram", pages)[0]
    missing = seen["missing"]
    assert isinstance(missing, int)
    assert missing > 0
    return missing


def finish(source: Side, destination: Child) -> dict[str, Any]:
    """Let the rest come at full speed; both ends completed, the oracle clean. The figures there."""
    source.service.set_parameters({"max-postcopy-bandwidth": 0, "x-hold-background": False})
    assert source.service.wait(30) == "completed", source.service.query()
    assert destination.call("service", "wait", 30) == "completed"
    figures: dict[str, Any] = destination.call("service", "query")["x-postcopy"]
    report = destination.call("sweep")
    assert report["errors"] == 0, report
    assert report["pages_checked"] == (RAM_BYTES + ROM_BYTES) >> 12
    assert destination.call("statistics")["touch_errors"] == 0
    return figures


def test_in_the_background_push(backing: str, tmp_path: Path) -> None:
    """Pages all over, in no order, while everything else streams in."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri) as (source, destination):
        migrate_by_postcopy(source.service, uri)
        destination.wait_event("RESUME")
        touch(source, destination, random_pages(1, RAM_PAGES, TOUCHES))
        assert finish(source, destination)["page-requests"] > 0


def test_at_full_speed(backing: str, tmp_path: Path) -> None:
    """The same without a limit: the listen thread is inside a record when a request goes out."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri, **{"max-postcopy-bandwidth": 0}) as (source, destination):
        pages = random_pages(2, RAM_PAGES, TOUCHES)
        destination.call("touch", "toy.ram", pages, on="RESUME")
        migrate_by_postcopy(source.service, uri)
        check_touched(source, destination, pages)
        finish(source, destination)


def test_between_listen_and_the_devices(backing: str, tmp_path: Path) -> None:
    """By the main thread itself, before RUN: nobody but native threads could serve it."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri, **{"x-hold-background": True}) as (source, destination):
        pages = random_pages(3, RAM_PAGES, 50)
        destination.call("touch", "toy.ram", pages, on="postcopy-active")
        migrate_by_postcopy(source.service, uri)
        missing = check_touched(source, destination, pages)
        destination.wait_event("RESUME")
        # The ring device walks its own pages as well: at least what we touched.
        huge = backing == "hugetlb"
        assert finish(source, destination)["requests-during-device-load"] >= (
            1 if huge else missing
        )


def test_inside_a_device_load(backing: str, tmp_path: Path) -> None:
    """A device whose post_load looks at RAM as a careless device does."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri, **{"x-hold-background": True}) as (source, destination):
        pages = random_pages(4, RAM_PAGES, 50)
        for call in (destination.call, Agent.of(source)):
            call("touchy_device", "toy.ram", pages)
        migrate_by_postcopy(source.service, uri)
        check_touched(source, destination, pages)
        finish(source, destination)


def test_at_record_borders(backing: str, tmp_path: Path) -> None:
    """Nothing flows but what is asked for: each page is a section of its own, then silence."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri, **{"x-hold-background": True}) as (source, destination):
        migrate_by_postcopy(source.service, uri)
        destination.wait_event("RESUME")
        # Where the vCPU never is, so that nobody else asked before.
        upper = [RAM_PAGES // 2 + page for page in random_pages(5, RAM_PAGES // 2, TOUCHES)]
        missing = touch(source, destination, upper)
        # The bits of a huge page go up after its sleeper was woken: some are counted twice.
        assert missing >= RAM_BYTES // 2 >> 21 if backing == "hugetlb" else missing == TOUCHES
        finish(source, destination)


@pytest.mark.parametrize("hold", [True, False])
def test_with_pings_in_between(backing: str, tmp_path: Path, hold: bool) -> None:
    """A PING after every section: answered by the thread that places the pages, without the GIL."""
    uri = f"unix:{tmp_path}/m"
    pings = InsertPings()
    parameters = {"x-hold-background": hold, "x-checksum": False}
    with both(backing, uri, **parameters) as (source, destination), Proxy(uri, pings) as proxy:
        migrate_by_postcopy(source.service, proxy.uri)
        destination.wait_event("RESUME")
        touch(source, destination, random_pages(6, RAM_PAGES, TOUCHES))
        finish(source, destination)
        assert pings.hits > 10
        # Ours, and the source's own two; the proxy saw every one of them go back.
        assert proxy.names.count("PONG") >= pings.hits + 2


def test_while_the_settings_change(backing: str, tmp_path: Path) -> None:
    """The source's user turns every knob while a thread sleeps there with the GIL."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri) as (source, destination):
        migrate_by_postcopy(source.service, uri)
        destination.wait_event("RESUME")
        pages = random_pages(7, RAM_PAGES, TOUCHES)
        destination.call("touch", "toy.ram", pages)
        for step in range(40):
            source.service.set_parameters(
                {
                    "x-hold-background": step % 2 == 0,
                    "max-postcopy-bandwidth": (1 << 20) * (1 + step % 5),
                }
            )
        check_touched(source, destination, pages)
        finish(source, destination)


def test_with_a_busy_monitor(backing: str, tmp_path: Path) -> None:
    """Other Python threads fight for the lock, and a monitor asks for figures all the time."""
    uri = f"unix:{tmp_path}/m"
    with both(backing, uri) as (source, destination):
        destination.call("busy", 4)
        migrate_by_postcopy(source.service, uri)
        destination.wait_event("RESUME")
        touch(source, destination, random_pages(8, RAM_PAGES, TOUCHES))
        figures = finish(source, destination)
        destination.call("rest")
        assert figures["page-requests"] > 0


def test_both_sides_in_one_process(tmp_path: Path) -> None:
    """The hardest case: source and destination share one interpreter, and its one lock is taken."""
    uri = f"unix:{tmp_path}/m"
    with child("both sides") as one:
        result = one.call("migrate_within", uri, random_pages(9, RAM_PAGES, TOUCHES), **OPTIONS)
    assert result["statuses"] == ["completed", "completed"]
    assert result["missing"] > 0
    assert result["errors"] == 0
    assert result["same"] is True
