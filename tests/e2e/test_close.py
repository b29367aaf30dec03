"""The end of a service or of a wait, whatever begins just then: it waits for no peer and for no
page."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from migration.runtime.channel import Channel
from migration.runtime.destination.incoming import IncomingMigration
from migration.runtime.errors import ChannelError, MigrationError
from migration.runtime.options import IncomingOptions
from migration.runtime.report import Report
from migration.runtime.transport import Listener
from migration.wire.extension import Feature
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


def test_a_recovery_taken_up_this_moment() -> None:
    """The listen thread has taken the new channel, and not made it its own yet, when the migration
    is abandoned: nobody would cut it off any more, and its source may say nothing, ever."""
    options = IncomingOptions(True, Feature(0), start_paused=False, in_flight_bytes=1 << 16)
    broken, silent = socket.socketpair(), socket.socketpair()
    with nothing_left(), side(ram_bytes=4 * MIB, incoming=True) as waiting, broken[1], silent[1]:
        old, new = (Channel.over_socket(each[0], peer="source") for each in (broken, silent))
        migration = IncomingMigration(waiting.machine, old, options, Report(lambda *_: None))
        migration.abandon()
        migration._parts.channels.replace(new)
        with pytest.raises(ChannelError):
            new.read(1)
        migration.close()


def test_nobody_wakes_a_closed_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its descriptors may be somebody else's by then."""
    closed: list[Listener] = []
    woken_late: list[Listener] = []
    close, wake = Listener.close, Listener.wake

    with side(ram_bytes=4 * MIB, incoming=True) as waiting:

        def noted_close(listener: Listener) -> None:
            close(listener)
            closed.append(listener)
            canceller = threading.Thread(target=waiting.service.cancel)
            canceller.start()
            canceller.join(30)

        def noted_wake(listener: Listener) -> None:
            if listener in closed:
                woken_late.append(listener)
            else:
                wake(listener)

        monkeypatch.setattr(Listener, "close", noted_close)
        monkeypatch.setattr(Listener, "wake", noted_wake)
        waiting.service.migrate_incoming(f"unix:{tmp_path}/m")
        waiting.service.cancel()
        assert waiting.service.wait(30) == "cancelled"
    assert closed
    assert not woken_late


def test_no_descriptors_left_to_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait fails with the reason, and may be begun anew."""

    def no_descriptors(_listener: Listener) -> Channel:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with side(ram_bytes=4 * MIB, incoming=True) as waiting:
        with monkeypatch.context() as patched:
            patched.setattr(Listener, "accept", no_descriptors)
            waiting.service.migrate_incoming(f"unix:{tmp_path}/m")
            assert waiting.service.wait(30) == "failed"
        assert "Too many open files" in str(waiting.service.query()["error-desc"])
        waiting.service.migrate_incoming(f"unix:{tmp_path}/m")
        waiting.service.cancel()
        assert waiting.service.wait(30) == "cancelled"
