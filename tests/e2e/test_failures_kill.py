"""One guest, one side: a process is killed at each point of a migration, and the guest is where it
belongs.

Up to the first byte of RUN it is the source's, which goes on by itself whatever happens to the
destination. From that byte on it is the destination's: the source never starts it again by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from migration.runtime.errors import MigrationError
from tests.support.e2e_child import Child, child
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.pair import MIB, Side, side
from tests.support.proxy import Proxy
from tests.support.stream_elements import Element, Kind, Phase
from tests.support.tamper import StallAt, Tamper, command, kind, message

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

OPTIONS: dict[str, Any] = {"ram_bytes": 8 * MIB, "smp": 2}


@contextmanager
def migrating(
    tmp_path: Path, *tampers: Tamper, is_postcopy: bool = True
) -> Iterator[tuple[Side, Child, Proxy]]:
    """A guest at work on its way to a child through a proxy."""
    uri = f"unix:{tmp_path}/m"
    with (
        nothing_left(),
        side(rate=20_000, **OPTIONS) as source,
        child(incoming=True, **OPTIONS) as destination,
        Proxy(uri, *tampers) as proxy,
    ):
        source.service.set_capabilities({"postcopy-ram": True})
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        if is_postcopy:
            migrate_by_postcopy(source.service, proxy.uri)
        else:
            source.service.migrate(proxy.uri)
        yield source, destination, proxy


#: Where the destination is when it is killed -> how the stream stands still there.
BEFORE_RUN: dict[str, Callable[[], StallAt]] = {
    "reading the set-up": lambda: StallAt(command("ADVISE")),
    "taking in precopy pages": lambda: StallAt(kind(Kind.PAGE, Phase.PRECOPY), nth=100),
    "discarding": lambda: StallAt(command("DISCARD"), after=0),
    "waiting for the package": lambda: StallAt(command("PACKAGED"), after=0),
    "in the middle of the package": lambda: StallAt(command("PACKAGED")),
    "waiting for a page for its devices": lambda: StallAt(message("REQ_PAGES_ID"), after=0),
    # It loaded everything and said so; the word is on its way.
    "ready to run": lambda: StallAt(is_pong(3), after=0),
}


def is_pong(value: int) -> Callable[[Element], bool]:
    """The answer to the PING of that value; 3 is the package's last command."""
    return lambda e: e.name == "PONG" and e.data[-4:] == value.to_bytes(4, "big")


@pytest.mark.parametrize("where", BEFORE_RUN)
def test_destination_killed_before_run(where: str, tmp_path: Path) -> None:
    """The source goes on by itself and nothing of its guest is lost; it can be migrated again."""
    stall = BEFORE_RUN[where]()
    is_postcopy = "precopy" not in where
    with migrating(tmp_path, stall, is_postcopy=is_postcopy) as (source, destination, proxy):
        assert stall.struck.wait(30), (proxy.names, destination.describe())
        destination.kill()
        proxy.cut()  # what the stalled network still holds is lost with it
        assert source.service.wait(30) == "failed", source.service.query()
        assert source.machine.run_state == "running"
        assert source.service.query()["error-desc"]
        source.service.stop_guest()
        source.service.cont()
        migrate_again(source, tmp_path)


def migrate_again(source: Side, tmp_path: Path) -> None:
    """To a fresh destination: completed, the oracle clean."""
    uri = f"unix:{tmp_path}/again"
    with child("another", incoming=True, **OPTIONS) as destination:
        destination.call("service", "migrate_incoming", uri)
        source.service.set_parameters({"x-hold-background": False})
        migrate_by_postcopy(source.service, uri)
        assert source.service.wait(30) == "completed", source.service.query()
        assert destination.call("service", "wait", 30) == "completed"
        report = destination.call("sweep")
        assert report["errors"] == 0, report


@pytest.mark.parametrize("where", ["with RUN on its way", "running"])
def test_destination_killed_after_run(where: str, tmp_path: Path) -> None:
    """Its guest is gone with it, and two of it must never be: the source pauses and says so."""
    stall = StallAt(command("RUN"), after=0 if where == "with RUN on its way" else None)
    with migrating(tmp_path, stall) as (source, destination, proxy):
        assert stall.struck.wait(30)
        if where == "running":
            stall.go_on()
            destination.wait_event("RESUME")
        destination.kill()
        proxy.cut()  # what the stalled network still holds is lost with it
        assert source.service.wait(30) == "postcopy-paused", source.service.query()
        assert_keeps_off(source)


def assert_keeps_off(source: Side) -> None:
    """Neither by itself nor when told to."""
    assert source.machine.run_state == "finish-migrate"
    assert ("RESUME", {}) not in source.events
    error = str(source.service.query()["error-desc"])
    assert "the guest is the destination's" in error, error
    with pytest.raises(MigrationError, match=r"finish-migrate|two of it"):
        source.service.cont()
    with pytest.raises(MigrationError):
        source.service.migrate("unix:/nowhere")
    with pytest.raises(MigrationError):
        source.service.cancel()
