"""Two hosts with different kernels: to the newer one and back to the older one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts
from tests.hosts.migrations import ends, move_slowly
from tests.support.need import need

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def other_kernel(hosts: Hosts) -> Iterator[str]:
    """The destination restarted with its other kernel; which one that is."""
    need(hosts.destination.has_other_kernel(), "this box has one kernel only")
    hosts.destination.boot_kernel("other")
    try:
        yield hosts.destination.kernel
    finally:
        hosts.destination.boot_kernel("stock")


@pytest.mark.parametrize("backing", ["anon", "memfd", "hugetlb"])
@pytest.mark.parametrize("way", ["forth", "back"])
def test_postcopy_between_kernels(
    hosts: Hosts, folder: Path, other_kernel: str, backing: str, way: str
) -> None:
    assert other_kernel != hosts.source.kernel
    route = hosts.both if way == "forth" else hosts.both[::-1]
    with ends(*route, folder, "--backing", backing, ram="16M") as pair:
        move_slowly(pair)
