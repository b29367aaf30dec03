"""A migration inside this process leaves nothing behind in it: no thread, descriptor, mapping,
hugepage or file, however it ended.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from migration.runtime.errors import MigrationError
from tests.support.guestmem_memory import more_hugepages
from tests.support.leaks import no_leaks
from tests.support.pair import TIMEOUT_S, Side, pair, side
from tests.support.proxy import Proxy
from tests.support.tamper import CutAt, FlipByte, Tamper, command, page

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

SMALL: dict[str, Any] = {"ram_bytes": 4 << 20, "smp": 2}
PREFIXES = ("postcopy", "proxy-", "replay-")


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Round the whole life of machines and services. Once before, so that what is made once and for
    all (caches, imported modules) is there already."""
    with side(**SMALL):
        pass
    with no_leaks(prefixes=PREFIXES):
        yield
    assert list(folder.iterdir()) == []


def start(source: Side, target: Side, folder: Path, *tampers: Tamper) -> Proxy | None:
    """Both sides, and a proxy if there is something for it to do."""
    source.machine.start()
    target.service.migrate_incoming(f"unix:{folder}/in")
    proxy = Proxy(f"unix:{folder}/in", *tampers) if tampers else None
    source.service.migrate(proxy.uri if proxy else f"unix:{folder}/in")
    return proxy


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_after_success(tmp_path: Path, postcopy: bool, backing: Backing) -> None:
    with nothing_left(tmp_path), pair(postcopy=postcopy, backing=backing, **SMALL) as (a, b):
        start(a, b, tmp_path)
        if postcopy:
            a.service.start_postcopy()
        assert a.service.wait(TIMEOUT_S) == b.service.wait(TIMEOUT_S) == "completed"


def test_hugepages_are_given_back(tmp_path: Path) -> None:
    """Of both sides, after a success and after a pause with pages missing."""
    (tmp_path / "in").mkdir()
    options = {**SMALL, "backing": Backing.HUGETLB}
    with more_hugepages(8, tmp_path / "journal"):
        with nothing_left(tmp_path / "in"), pair(**options) as (a, b):
            start(a, b, tmp_path / "in")
            a.service.start_postcopy()
            assert b.service.wait(TIMEOUT_S) == "completed"
        with nothing_left(tmp_path / "in"), pair(**options) as (a, b):
            pause(a, b, tmp_path / "in")


def pause(source: Side, target: Side, folder: Path) -> None:
    """Postcopy with the push held, then the line is cut: pages are missing for good."""
    source.service.set_parameters({"x-hold-background": True})
    start(source, target, folder)
    source.service.start_postcopy()
    target.wait_event("RESUME")
    source.wait_status("postcopy-active")
    source.service.pause()
    target.wait_status("postcopy-paused")
    source.wait_status("postcopy-paused")


def test_after_a_pause_that_nobody_mends(tmp_path: Path) -> None:
    """Guests asleep on missing pages are woken by poison, and everything goes."""
    with nothing_left(tmp_path), pair(**SMALL) as (a, b):
        pause(a, b, tmp_path)


BEFORE_RUN: dict[str, Callable[[], Tamper]] = {
    "in the set-up": lambda: CutAt(command("OPEN_RETURN_PATH")),
    "at a page of precopy": lambda: CutAt(page(), nth=5),
    "inside the package": lambda: CutAt(command("PACKAGED"), after=4),
    "a bad byte": lambda: FlipByte(command("ADVISE"), at=4),
}


@pytest.mark.parametrize("where", BEFORE_RUN)
def test_after_a_failure(tmp_path: Path, where: str) -> None:
    """The source's guest goes on; the destination's machine is as good as new, and closes."""
    with nothing_left(tmp_path), pair(**SMALL) as (a, b):
        proxy = start(a, b, tmp_path, BEFORE_RUN[where]())
        assert proxy is not None
        with proxy:
            a.service.start_postcopy()
            assert a.service.wait(TIMEOUT_S) == "failed"
            assert b.service.wait(TIMEOUT_S) == "failed"
        assert a.machine.run_state == "running"


def test_after_cancel(tmp_path: Path) -> None:
    with nothing_left(tmp_path), pair(postcopy=False, **SMALL) as (a, b):
        a.service.set_parameters({"max-bandwidth": 1 << 20, "downtime-limit": 0})
        start(a, b, tmp_path)
        b.wait_status("active")
        a.service.cancel()
        assert a.service.wait(TIMEOUT_S) == "cancelled"
        assert b.service.wait(TIMEOUT_S) == "failed"


def test_after_an_incoming_migration_that_never_came(tmp_path: Path) -> None:
    """Cancelled while it listens, and closed while it listens."""
    with nothing_left(tmp_path), side(**SMALL, incoming=True) as target:
        target.service.migrate_incoming(f"unix:{tmp_path}/in")
        target.service.cancel()
        target.wait_status("cancelled")
        target.service.migrate_incoming(f"unix:{tmp_path}/in")


def test_after_a_connection_that_says_nothing(tmp_path: Path) -> None:
    """Closed while the destination waits for the first byte."""
    with (
        socket.socket(socket.AF_UNIX) as silent,
        nothing_left(tmp_path),
        side(**SMALL, incoming=True) as target,
    ):
        target.service.migrate_incoming(f"unix:{tmp_path}/in")
        silent.connect(f"{tmp_path}/in")
        target.wait_status("active")


def test_after_a_refused_connection(tmp_path: Path) -> None:
    """Nobody listens: no migration, and nothing of it."""
    refused = pytest.raises(MigrationError, match="Failed to connect")
    with nothing_left(tmp_path), side(**SMALL) as source, refused:
        source.service.migrate(f"unix:{tmp_path}/in")


def test_migrated_back_and_forth(tmp_path: Path) -> None:
    """Three migrations by the same source, two of them failed: nothing piles up."""
    with nothing_left(tmp_path), side(**SMALL) as source:
        source.service.set_capabilities({"postcopy-ram": True})
        source.machine.start()
        for where in ("at a page of precopy", "inside the package", None):
            with side(**SMALL, incoming=True) as target:
                target.service.set_capabilities({"postcopy-ram": True})
                target.service.migrate_incoming(f"unix:{tmp_path}/in")
                tampers = [BEFORE_RUN[where]()] if where else []
                with Proxy(f"unix:{tmp_path}/in", *tampers) as proxy:
                    source.service.migrate(proxy.uri)
                    source.service.start_postcopy()
                    assert source.service.wait(TIMEOUT_S) == ("failed" if where else "completed")
                    target.service.wait(TIMEOUT_S)
                if not where:
                    target.assert_sweep_clean()
