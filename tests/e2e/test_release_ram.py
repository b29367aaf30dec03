"""Capability ``release-ram``: what was sent is given back to the host, and never too early.

Until the guest is the destination's for good the source may have to run it again, with all of its
memory: nothing is dropped before.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.pair import MIB, Side, pair
from tests.support.proxy import Proxy
from tests.support.stream_elements import Kind, Phase
from tests.support.tamper import FlipByte, StallAt, Watch, command, kind, page

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

OPTIONS: dict[str, Any] = {"ram_bytes": 8 * MIB, "rate": 5_000, "fill_share": 1.0}
PRECOPY_PAGES = 1000


def wait_pushed(source: Side, pages: int) -> None:
    """Until so many pages went out behind the package."""
    deadline = time.monotonic() + 30
    while source.figures["postcopy-pages"] < pages:
        assert time.monotonic() < deadline, source.service.query()
        time.sleep(0.005)


def begin(source: Side, target: Side, proxy: Proxy, uri: str, *, at_once: bool) -> None:
    """A postcopy with the capability on, before the first page was sent or after a part."""
    source.service.set_capabilities({"release-ram": True})
    source.machine.start()
    target.service.migrate_incoming(uri)
    if at_once:
        migrate_by_postcopy(source.service, proxy.uri)
        return
    some = next(each for each in proxy.tampers if isinstance(each, Watch))
    source.service.set_parameters({"max-bandwidth": 4 * MIB})
    source.service.migrate(proxy.uri)
    assert some.struck.wait(30)
    source.service.start_postcopy()


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("split_run", [True, False])
def test_nothing_is_dropped_while_the_guest_may_come_back(
    split_run: bool, at_once: bool, backing: Backing, tmp_path: Path
) -> None:
    """The destination cannot load a device and says so, long after pages were sent to it: the
    source runs its guest again, and every page of it is there. To a stock QEMU, which gets RUN in
    the package, too."""
    stall = StallAt(command("PACKAGED"), after=0)
    damage = FlipByte(kind(Kind.SECTION, Phase.PACKAGE), at=0, mask=0x40)
    some = Watch(page(Phase.PRECOPY), nth=PRECOPY_PAGES)
    uri = f"unix:{tmp_path}/m"
    with (
        nothing_left(),
        pair(backing=backing, **OPTIONS) as (source, target),
        Proxy(uri, stall, damage, some) as proxy,
    ):
        source.service.set_parameters({"x-checksum": False, "x-split-run": split_run})
        begin(source, target, proxy, uri, at_once=at_once)
        assert stall.struck.wait(30)
        wait_pushed(source, 1)
        stall.go_on()
        assert source.service.wait(30) == "failed", source.service.query()
        assert target.service.wait(30) == "failed", target.service.query()
        assert damage.hits == 1
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("split_run", [True, False])
def test_all_of_it_is_dropped_in_the_end(
    split_run: bool, preempt: bool, backing: Backing, tmp_path: Path
) -> None:
    """Pages sent before the guest was given away as well, while others are being asked for: none of
    them is dropped under the hands of who sends it."""
    uri = f"unix:{tmp_path}/m"
    some = Watch(page(Phase.PRECOPY), nth=PRECOPY_PAGES)
    with (
        nothing_left(),
        pair(backing=backing, smp=2, **{**OPTIONS, "rate": 50_000}) as (source, target),
        Proxy(uri, some) as proxy,
    ):
        for each in (source, target):
            each.service.set_capabilities({"postcopy-preempt": preempt})
        source.service.set_parameters({"x-split-run": split_run})
        begin(source, target, proxy, uri, at_once=False)
        assert source.service.wait(30) == "completed", source.service.query()
        assert target.service.wait(30) == "completed", target.service.query()
        assert sum(block.populated().count() for block in source.machine.ram) == 0
        target.assert_sweep_clean()
