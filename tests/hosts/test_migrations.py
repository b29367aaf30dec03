"""The toy VM from host to host over tcp: every kind of RAM, every kind of migration, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts
from tests.hosts.migrations import RAM, WORKLOAD, Ends, command, ends
from tests.hosts.units import toy

pytestmark = pytest.mark.timeout(1200)
BACKINGS = ("anon", "memfd", "hugetlb")
_RAM = {"anon": "32M", "memfd": "32M", "hugetlb": "16M"}


@pytest.mark.parametrize("backing", BACKINGS)
def test_precopy(hosts: Hosts, folder: Path, backing: str) -> None:
    shape = ("--backing", backing, "--working-set", "4M")
    with ends(*hosts.both, folder, *shape, ram=_RAM[backing]) as pair:
        pair.listen()
        limits = ("--set", "max-bandwidth=1G", "--set", "downtime-limit=5000")
        status, last, text = command(pair, *limits)
        assert status == 0, text
        assert last["migration"]["status"] == "completed"
        pair.assert_moved()


@pytest.mark.parametrize("backing", BACKINGS)
def test_postcopy(hosts: Hosts, folder: Path, backing: str) -> None:
    with ends(*hosts.both, folder, "--backing", backing, ram=_RAM[backing]) as pair:
        pair.destination.switch_on("postcopy-ram")
        pair.listen()
        slow = ("--set", "max-bandwidth=2M")
        status, last, text = command(pair, *slow, "--postcopy-after", "1")
        assert status == 0, text
        assert last["migration"]["ram"]["postcopy-requests"] > 0
        pair.assert_moved()


@pytest.mark.parametrize("backing", BACKINGS)
def test_postcopy_with_preempt(hosts: Hosts, folder: Path, backing: str) -> None:
    """Requested pages come by a connection of their own."""
    names = ("postcopy-ram", "postcopy-preempt")
    with ends(*hosts.both, folder, "--backing", backing, ram=_RAM[backing]) as pair:
        pair.destination.switch_on(*names)
        pair.listen()
        options = ("--capability", "postcopy-preempt", "--set", "max-bandwidth=2M")
        status, last, text = command(pair, *options, "--postcopy-after", "1")
        assert status == 0, text
        assert last["migration"]["ram"]["postcopy-requests"] > 0
        pair.assert_moved()


def test_there_and_back(hosts: Hosts, folder: Path) -> None:
    """The guest that came here leaves again, for a third process on the host it came from."""
    with ends(*hosts.both, folder) as first:
        first.into_postcopy()
        first.destination.wait_status("completed")
        first.source.wait_status("completed")
        waiting = ("-m", RAM, *WORKLOAD, "--incoming", "defer")
        with toy(hosts.source, folder, *waiting) as third:
            back = Ends(first.destination, third.connect())
            back.into_postcopy()
            back.source.wait_status("completed")
            back.assert_moved()
