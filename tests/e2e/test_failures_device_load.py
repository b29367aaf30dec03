"""The stream is lost while the destination's main thread sleeps in a device load, before RUN.

The guest never left the source, which goes on. The destination says what happened, its main thread
comes back from the page that will not come, and the same process takes in the next migration: the
poison that woke it is gone by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from tests.support.e2e_agent import Agent
from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import more_hugepages
from tests.support.pair import MIB, Side, side
from tests.support.proxy import Proxy
from tests.support.tamper import StallAt, message
from uffd.watchdog import EXIT_STATUS

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RAM_BYTES = 8 * MIB
#: No ring: the only device that touches RAM is the test's.
OPTIONS: dict[str, Any] = {"ram_bytes": RAM_BYTES, "smp": 2, "ring_pages": 0}
OFFSET = 5 * MIB + 24


@contextmanager
def sleeping_in_a_load(
    backing: str, device: str, *arguments: object, folder: Path
) -> Iterator[tuple[Side, Child, Proxy]]:
    """The destination's main thread sleeps in ``device``'s post_load; its request was swallowed."""
    stall = StallAt(message("REQ_PAGES_ID"), after=0)
    uri = f"unix:{folder}/m"
    with ExitStack() as stack:
        if backing == "hugetlb":
            pages = 2 * RAM_BYTES >> 21
            stack.enter_context(more_hugepages(pages, folder / "journal"))
        stack.enter_context(nothing_left())
        source = stack.enter_context(side(backing=Backing(backing), rate=20_000, **OPTIONS))
        destination = stack.enter_context(child(incoming=True, backing=backing, **OPTIONS))
        proxy = stack.enter_context(Proxy(uri, stall))
        source.service.set_capabilities({"postcopy-ram": True})
        source.service.set_parameters({"x-hold-background": True})
        for call in (destination.call, Agent.of(source)):
            call(device, *arguments)
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        migrate_by_postcopy(source.service, proxy.uri)
        assert stall.struck.wait(30), destination.describe()
        yield source, destination, proxy


@pytest.mark.parametrize("backing", ["anon", "memfd", "hugetlb"])
def test_it_fails_and_lives(backing: str, tmp_path: Path) -> None:
    """FAILED with the cause, the source's guest runs, and the second try succeeds."""
    sleeping = sleeping_in_a_load(backing, "sleepy_device", "toy.ram", OFFSET, folder=tmp_path)
    with sleeping as (source, destination, proxy):
        proxy.cut()
        assert destination.call("service", "wait", 30) == "failed"
        report = destination.call("service", "query")
        assert "the connection closed before the end" in report["error-desc"], report
        assert destination.call("run_state") == "inmigrate"
        assert source.service.wait(30) == "failed", source.service.query()
        assert source.machine.run_state == "running"
        assert source.events.count(("RESUME", {})) == 1

        source.service.set_parameters({"x-hold-background": False})
        again = f"unix:{tmp_path}/again"
        destination.call("service", "migrate_incoming", again)
        migrate_by_postcopy(source.service, again)
        assert source.service.wait(30) == "completed", source.service.query()
        assert destination.call("service", "wait", 30) == "completed"
        report = destination.call("sweep")
        assert report["errors"] == 0, report
        destination.call("close")


def test_quit_wakes_it(tmp_path: Path) -> None:
    """Closing the service while the main thread sleeps there: nobody waits for the page."""
    sleeping = sleeping_in_a_load("anon", "sleepy_device", "toy.ram", OFFSET, folder=tmp_path)
    with sleeping as (source, destination, proxy):
        destination.call("close")
        proxy.cut()  # what the stalled network has not told the source yet
        assert source.service.wait(30) == "failed"
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


def test_with_the_gil_in_hand(tmp_path: Path) -> None:
    """No Python can run to give up: the watchdog ends the process; the source's guest goes on."""
    sleeping = sleeping_in_a_load("anon", "touchy_device", "toy.ram", [777], folder=tmp_path)
    with sleeping as (source, destination, proxy):
        proxy.cut()
        assert destination.wait_exit() == EXIT_STATUS
        assert "missing page at address" in destination.stderr
        assert "in post_load" in destination.stderr
        assert source.service.wait(30) == "failed"
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()
