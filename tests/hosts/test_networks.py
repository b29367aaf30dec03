"""What networks between hosts do: delay, loss, a link that goes away, by the VMs' own kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts
from tests.hosts.migrations import Ends, ends, move_slowly
from tests.support.need import need

pytestmark = pytest.mark.timeout(1500)


@pytest.mark.parametrize("words", ["delay 20ms 5ms", "loss 2%", "delay 5ms reorder 25% 50%"])
def test_postcopy_over_a_bad_link(hosts: Hosts, folder: Path, words: str) -> None:
    for host in hosts.both:
        loaded = host.try_run("modprobe sch_netem").returncode == 0
        need(loaded, f"{host.name}'s kernel {host.kernel} has no netem")
        host.shape(*words.split())
    with ends(*hosts.both, folder, ram="16M") as pair:
        move_slowly(pair)
    for host in hosts.both:
        assert "netem" in host.run(f"tc qdisc show dev {host.link}")


def test_a_precopy_over_a_link_that_went_away(hosts: Hosts, folder: Path) -> None:
    """TCP alone would wait for minutes: cancelled, the guest is the source's, and stays it."""
    with ends(*hosts.both, folder) as pair:
        for end in (pair.source, pair.destination):
            end.switch_on()
        pair.listen(exit_on_error=False)
        pair.source.execute("migrate-set-parameters", max_bandwidth=1 << 20)
        pair.source.execute("migrate", uri=pair.uri)
        pair.source.wait_status("active")
        hosts.source.link_down()
        pair.source.execute("migrate_cancel")
        pair.source.wait_status("cancelled")
        pair.source.assert_intact()
        assert pair.destination.run_state == "inmigrate"


def broken(pair: Ends, hosts: Hosts) -> None:
    """In postcopy, only what is asked for is sent; then the link goes, and both sides are told,
    since neither can hear it from the other.
    """
    pair.into_postcopy(x_hold_background=True)
    hosts.source.link_down()
    pause(pair)
    assert pair.source.run_state == "finish-migrate"


def pause(pair: Ends) -> None:
    for end in (pair.source, pair.destination):
        end.execute("migrate-pause")
    for end in (pair.source, pair.destination):
        end.wait_status("postcopy-paused")


def recover(pair: Ends) -> None:
    """The link is up again: to the end, with everything that is left."""
    pair.listen("migrate-recover")
    pair.source.execute("migrate-set-parameters", x_hold_background=False)
    pair.source.execute("migrate", uri=pair.uri, resume=True)
    for end in (pair.source, pair.destination):
        end.wait_status("completed")
    pair.assert_moved()


def test_a_link_down_in_postcopy_and_recovery(hosts: Hosts, folder: Path) -> None:
    with ends(*hosts.both, folder) as pair:
        broken(pair, hosts)
        hosts.source.link_up()
        recover(pair)


def test_the_link_fails_again_in_the_recovery(hosts: Hosts, folder: Path) -> None:
    with ends(*hosts.both, folder) as pair:
        broken(pair, hosts)
        hosts.source.link_up()
        pair.listen("migrate-recover")
        pair.source.execute("migrate", uri=pair.uri, resume=True)
        pair.source.wait_status("postcopy-active")
        hosts.destination.link_down()
        pause(pair)
        hosts.destination.link_up()
        recover(pair)


def test_a_short_outage_is_not_noticed(hosts: Hosts, folder: Path) -> None:
    """TCP sends again what was lost; nobody pauses."""
    with ends(*hosts.both, folder) as pair:
        pair.into_postcopy(x_hold_background=True)
        hosts.destination.run(
            f"ip link set {hosts.destination.link} down; ip link set {hosts.destination.link} up"
        )
        hosts.destination.link_up()
        pair.source.execute("migrate-set-parameters", x_hold_background=False)
        for end in (pair.source, pair.destination):
            end.wait_status("completed")
        pair.assert_moved()
