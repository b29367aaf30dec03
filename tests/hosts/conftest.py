"""The two hosts, as ``scripts/vagrant-hosts`` made them; each test leaves them as it found them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts.machines import Host
from tests.support.need import need

ADDRESSES = {"source": "192.168.130.11", "destination": "192.168.130.12"}


@dataclass(frozen=True)
class Hosts:
    source: Host
    destination: Host

    @property
    def both(self) -> tuple[Host, Host]:
        return self.source, self.destination


@pytest.fixture(scope="session")
def hosts() -> Hosts:
    configuration = os.environ.get("POSTCOPY_HOSTS_SSH", "")
    need(configuration, "no hosts to reach by ssh", remedy="make vagrant-test")
    source, destination = (
        Host(name, address, Path(configuration)) for name, address in ADDRESSES.items()
    )
    return Hosts(source, destination)


@pytest.fixture
def folder(hosts: Hosts) -> Path:
    """For forwarded sockets: beside the ssh configuration, where paths are short."""
    return hosts.source.configuration.parent


@pytest.fixture(autouse=True)
def as_found(hosts: Hosts) -> Iterator[None]:
    """Links up and unshaped, pools of huge pages as before, whatever the test did."""
    pools = [host.run("cat /proc/sys/vm/nr_hugepages") for host in hosts.both]
    yield
    for host, pool in zip(hosts.both, pools, strict=True):
        host.unshape()
        host.link_up()
        host.set_hugepages(int(pool))
