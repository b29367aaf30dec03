"""The end of a service, whatever begins just then: it waits for no peer and for no page."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from migration.runtime.errors import MigrationError
from tests.support.e2e_leaks import nothing_left
from tests.support.pair import MIB, side

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


@dataclass(frozen=True)
class Nowhere:
    """Leaves threads where they are."""

    fault_cpus: tuple[int, ...] = ()
    data_cpus: tuple[int, ...] = ()


def wait_closing(service: object) -> None:
    """Until :meth:`close` has begun."""
    deadline = time.monotonic() + 30
    while not vars(service)["_session"].is_closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_source_that_came_this_moment(tmp_path: Path) -> None:
    """Accepted, but its migration not yet begun, when the service is closed. The source says
    nothing, ever."""
    accepted = threading.Event()
    with nothing_left(), side(ram_bytes=4 * MIB, incoming=True) as waiting:
        service = waiting.service

        def choose() -> Nowhere:
            accepted.set()
            wait_closing(service)
            return Nowhere()

        service.settings.choose_placement = choose
        service.migrate_incoming(f"unix:{tmp_path}/m")
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(f"{tmp_path}/m")
            assert accepted.wait(30)
            closer = threading.Thread(target=service.close)
            closer.start()
            closer.join(60)
            assert not closer.is_alive(), "close() waits for a source that says nothing"
        assert waiting.statuses[-1] == "failed"


def test_a_connection_that_came_too_late() -> None:
    """Closed while it connects: no migration begins, and the connection is not kept."""
    with nothing_left(), side(ram_bytes=4 * MIB) as one:
        ours, theirs = socket.socketpair()

        def look_up(_name: str) -> int:
            one.service.close()
            return ours.detach()

        with theirs:
            one.service.fds = look_up
            with pytest.raises(MigrationError, match="the service is closed"):
                one.service.migrate("fd:late")
            assert theirs.recv(1) == b""  # not a byte, and closed
        assert one.machine.run_state != "finish-migrate"
