"""Hosts that fail, and hosts that have too little."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts
from tests.hosts.migrations import command, ends
from tests.support.qmp import QmpError

pytestmark = pytest.mark.timeout(1800)


def test_too_few_hugepages_at_the_start(hosts: Hosts, folder: Path) -> None:
    """The VM does not start, and says how many it needs and how many there are."""
    hosts.destination.set_hugepages(4)
    line = "postcopy run -m 32M --backing hugetlb --mem-prealloc --qmp unix:/run/never.qmp"
    done = hosts.destination.try_run(line)
    assert done.returncode == 1
    assert "needs 16 huge pages of 2 MiB, 4 are free" in done.stderr
    assert "postcopy hugepages reserve 12" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_hugepages_at_the_destination(hosts: Hosts, folder: Path) -> None:
    """Nothing was promised to the VM that waits, and too little is there: refused in the words of
    the pool, before the guest is stopped.
    """
    ram = "memory-backend-memfd,id=ram,size=16M,hugetlb=on,reserve=off"
    shape = ("-M", "toy-1.1,memory-backend=ram", "--object", ram)
    hosts.destination.set_hugepages(4)
    with ends(*hosts.both, folder, *shape, ram="16M") as pair:
        pair.destination.switch_on("postcopy-ram")
        pair.listen(exit_on_error=False)
        status, _, text = command(pair, "--postcopy-after", "1")
        assert status == 1, text
        pair.destination.wait_status("failed")
        reason = pair.destination.execute("query-migrate")["error-desc"]
        assert "huge pages of 2 MiB" in reason
        pair.source.assert_intact()


def test_the_source_host_loses_its_power_in_postcopy(hosts: Hosts, folder: Path) -> None:
    """The guest waits for its pages, for ever if need be: it is shown no zeros, and nobody claims
    that its memory is whole.
    """
    try:
        with ends(*hosts.both, folder) as pair:
            pair.into_postcopy(x_hold_background=True)
            hosts.source.power_off()
            pair.destination.execute("migrate-pause")  # a host that is gone says no goodbye
            pair.destination.wait_status("postcopy-paused")
            moved = pair.destination.execute("query-migrate")["x-postcopy"]
            assert moved["missing-pages"] > 0
            pair.destination.execute("stop")
            with pytest.raises(QmpError, match="pages are missing"):
                pair.destination.execute("x-oracle-sweep")
    finally:
        hosts.source.power_on()
    assert hosts.source.run("hostname") == "source"
