"""The source or the network is lost after RUN: the destination pauses and invents nothing.

vCPUs that miss a page wait, the others run on; whoever wants the process to stop or end does not
wait for a page.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.pair import MIB
from tests.support.proxy import Proxy
from tests.support.stream_elements import Element
from tests.support.tamper import Tamper, message

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

WORKING_SET = MIB  # every other page of it each vCPU's
#: No device in between.
OPTIONS: dict[str, Any] = {
    "ram_bytes": 8 * MIB,
    "smp": 2,
    "ring_pages": 0,
    "working_set_bytes": WORKING_SET,
    "rate": 20_000,
}


class SwallowRequest(Tamper):
    """One page request never arrives; its sleeper waits for good. Others come before and after."""

    def __init__(self) -> None:
        super().__init__(message("REQ_PAGES"), nth=5)

    @property
    def page(self) -> int:
        """Which target page of its block was asked for."""
        assert self.victim is not None
        return int(struct.unpack_from(">Q", self.victim.data, 4)[0]) >> 12

    def see(self, element: Element) -> list[Element]:
        if self.is_due(element):
            self.strike(element)
            return []
        return [element]


@contextmanager
def one_vcpu_asleep(tmp_path: Path, backing: str) -> Iterator[tuple[Child, Child, Proxy, int]]:
    """Both sides in children; one vCPU of the destination sleeps on a page that never comes.

    :returns: source, destination, the network between them, and which vCPU it is.
    """
    uri, swallow = f"unix:{tmp_path}/m", SwallowRequest()
    with (
        nothing_left(),
        child("source", backing=backing, **OPTIONS) as source,
        child("destination", incoming=True, backing=backing, **OPTIONS) as destination,
        Proxy(uri, swallow) as proxy,
    ):
        # Without checksums, or a message could not vanish unseen.
        source.call("service", "set_parameters", {"x-hold-background": True, "x-checksum": False})
        source.call("start")
        destination.call("service", "migrate_incoming", uri)
        source.call("migrate_by_postcopy", proxy.uri)
        destination.wait_event("RESUME")
        assert swallow.struck.wait(30)
        yield source, destination, proxy, swallow.page % 2


def vcpus(destination: Child) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = destination.call("statistics")["vcpus"]
    return found


def assert_runs_on(destination: Child, index: int) -> None:
    """That vCPU still gets on (only its counter tells)."""
    before, deadline = vcpus(destination)[index]["ops"], time.monotonic() + 30
    while vcpus(destination)[index]["ops"] <= before:
        assert time.monotonic() < deadline, destination.describe()
        time.sleep(0.001)


def assert_nothing_invented(destination: Child) -> None:
    """No touch found a page damaged: nobody was shown zeros, now or at the end."""
    assert destination.call("statistics")["touch_errors"] == 0


@pytest.mark.parametrize("backing", ["anon", "memfd"])
@pytest.mark.parametrize("loss", ["network cut", "source killed"])
def test_paused(loss: str, backing: str, tmp_path: Path) -> None:
    """One waits, the other runs on, both before and after the loss; then an orderly end."""
    with one_vcpu_asleep(tmp_path, backing) as (source, destination, proxy, asleep):
        fill_working_set(destination, 1 - asleep)
        if loss == "network cut":
            proxy.cut()
        else:
            source.kill()
        destination.wait_status("postcopy-paused")
        query = destination.call("service", "query")
        assert query["status"] == "postcopy-paused"
        assert "the connection closed" in query["error-desc"], query
        assert query["x-postcopy"]["missing-pages"] > 0
        stuck = vcpus(destination)[asleep]["ops"]
        assert_runs_on(destination, 1 - asleep)
        assert vcpus(destination)[asleep]["ops"] == stuck
        assert destination.call("run_state") == "running"
        assert_nothing_invented(destination)

        destination.call("service", "stop_guest")  # does not wait for the page
        assert destination.call("run_state") == "paused"
        destination.call("service", "cont")  # the sleeper goes back to sleep
        assert_runs_on(destination, 1 - asleep)
        if loss == "network cut":
            assert source.call("service", "wait", 30) == "postcopy-paused"
            assert source.call("run_state") == "finish-migrate"
        destination.call("service", "close")  # poison, not zeros
        assert_nothing_invented(destination)
        destination.call("close")
        destination.send("exit")
        assert destination.wait_exit() == 0


def fill_working_set(destination: Child, index: int) -> None:
    """Until that vCPU has all of its pages: from then on it needs nobody."""
    pages = list(range(index, WORKING_SET >> 12, 2))
    deadline = time.monotonic() + 30
    while destination.call("missing", "toy.ram", pages):
        assert time.monotonic() < deadline, destination.describe()
        time.sleep(0.001)
