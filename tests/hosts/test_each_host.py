"""Each host by itself: what was installed, what its kernel can."""

from __future__ import annotations

import json

import pytest

from tests.hosts.conftest import ADDRESSES, Hosts
from tests.hosts.machines import Host

pytestmark = pytest.mark.timeout(1200)
# Of each family one case, on every kind of memory: an emulated host takes a second for most.
CASES = ("unit/copy", "unit/zeropage", "unit/register-ioctls", "unit/events", "unit/minor")


@pytest.fixture(params=sorted(ADDRESSES))
def host(request: pytest.FixtureRequest, hosts: Hosts) -> Host:
    chosen: Host = getattr(hosts, request.param)
    return chosen


def test_it_is_who_it_should_be(host: Host) -> None:
    """Its name, both cards, its address on the migration network, huge pages, the package."""
    assert host.run("hostname") == host.name
    cards = host.run("ls /sys/class/net").split()
    assert {"eth0", host.link} <= set(cards)
    assert host.address in host.run(f"ip -4 -o address show dev {host.link}")
    assert host.free_hugepages >= 32
    assert host.run("postcopy --version").startswith("postcopy ")


def test_each_reaches_the_other(hosts: Hosts) -> None:
    for host, other in (hosts.both, hosts.both[::-1]):
        host.run(f"ping -c 3 -i 0.2 -W 5 {other.address}")


def test_the_probe_says_ready(host: Host) -> None:
    done = host.try_run("postcopy probe --json --timeout 20")
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    rows = {row["row"]: row for row in objects if row["record"] == "row"}
    missing = [row for row in rows.values() if row["tier"] == "required" and row["status"] != "yes"]
    assert done.returncode == 0, missing
    # Another one might have been taken for it: the figures are this kernel's.
    assert objects[0]["kernel"] == host.kernel
    assert rows["hugepages-2M"]["status"] == "yes" if "hugepages-2M" in rows else True


def test_the_kernel_behaves(host: Host) -> None:
    """``scripts/validate-kernel``; what fails must be explained by what is known of the kernel."""
    from scripts.matrix import explain

    words = " ".join(f"--only {case}" for case in CASES)
    done = host.try_run(f"validate-kernel {words} --json - 2>/dev/null")
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    cases = [result for result in results if result.get("type") == "case"]
    assert sum(case["status"] == "pass" for case in cases) >= 20, done.stdout[-2000:]
    series = ".".join(host.kernel.split(".")[:2])
    unexplained = [
        case
        for case in cases
        if case["status"] == "fail"
        and explain.why_failed(case["case"], series, str(case.get("reason", ""))) is None
    ]
    assert unexplained == []
