"""Real processes, ``postcopy run`` and its monitor: a paused destination ends when told to.

Its vCPUs sleep on pages that nobody will bring. Whoever wants the process to end, by QMP or by a
signal, does not wait for them, and nobody is shown a page of zeros on the way out.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.monitor_process import RunningVM, switch_on
from tests.support.proxy import Proxy
from tests.support.qmp import QmpClient, QmpError

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

SHAPE = ("-m", "16M", "--smp", "2")


@dataclass
class Ends:
    """Both processes and a connection to each monitor."""

    source: RunningVM
    destination: RunningVM
    here: QmpClient
    there: QmpClient


@contextmanager
def paused(folder: Path) -> Iterator[Ends]:
    """Source and destination after the network was cut in postcopy."""
    uri = f"unix:{folder}/migration"
    with (
        RunningVM(folder, "source", *SHAPE, "--rate", "5000") as source,
        RunningVM(folder, "destination", *SHAPE, "--incoming", "defer") as destination,
        Proxy(uri) as proxy,
        source.client() as here,
        destination.client() as there,
    ):
        for monitor in (here, there):
            switch_on(monitor, "events", "postcopy-ram")
        here.execute("migrate-set-parameters", {"x-hold-background": True})
        there.execute("migrate-incoming", {"uri": uri})
        here.execute("migrate", {"uri": proxy.uri})
        here.execute("migrate-start-postcopy")
        there.wait_event("RESUME")
        proxy.cut()
        for monitor in (here, there):
            monitor.wait_event("MIGRATION", lambda data: data["status"] == "postcopy-paused")
        yield Ends(source, destination, here, there)


@pytest.mark.parametrize("how", ["quit", "SIGTERM", "SIGINT"])
def test_a_paused_destination_ends(how: str, tmp_path: Path) -> None:
    """In order, with status 0, whatever sleeps in it."""
    with paused(tmp_path) as ends:
        report = ends.there.execute("query-migrate")
        assert report["x-postcopy"]["missing-pages"] > 0
        assert ends.there.execute("x-query-machine")["touch_errors"] == 0
        if how == "quit":
            ends.there.execute("quit")
        else:
            ends.destination.signal(signal.Signals[how])
        assert ends.destination.wait_exit() == 0, ends.destination.stderr()

        # The guest is lost with it. The source still does not start it by itself, or by mistake.
        assert ends.here.execute("query-status")["status"] == "finish-migrate"
        with pytest.raises(QmpError, match=r"finish-migrate|destination"):
            ends.here.execute("cont")
        ends.here.execute("quit")
        assert ends.source.wait_exit() == 0, ends.source.stderr()


def test_a_paused_destination_stops_and_goes_on(tmp_path: Path) -> None:
    """``stop`` and ``cont`` do not wait for a page either; the monitor answers all the time."""
    with paused(tmp_path) as ends:
        monitor = ends.there
        for _ in range(3):
            monitor.execute("stop")
            assert monitor.execute("query-status")["status"] == "paused"
            monitor.execute("cont")
            assert monitor.execute("query-status")["status"] == "running"
        assert monitor.execute("x-query-machine")["touch_errors"] == 0
