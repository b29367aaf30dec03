"""The network is cut in postcopy: both sides pause, and go on over a new channel, again and
again."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.source.outgoing import OutgoingMigration
from migration.runtime.transport import Listener
from tests.support.pair import MIB, Side, pair
from tests.support.proxy import Proxy
from tests.support.tamper import StallAt, message

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

GOING_ON = ("postcopy-active", "completed")


def wait_paused(*sides: Side) -> None:
    for side in sides:
        assert side.service.wait(30) == "postcopy-paused", side.service.query()


def go_on(source: Side, target: Side, uri: str, rounds: int) -> None:
    """Recover over ``uri``; returns when both have gone on ``rounds`` times in all."""
    listening = target.service.recover(uri)
    source.service.migrate(listening, resume=True)
    for side in (source, target):
        side.wait_count("MIGRATION", rounds, status="postcopy-recover")


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "plain"])
@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_goes_on_after_repeated_cuts(
    transport: str, preempt: bool, checksum: bool, tmp_path: Path
) -> None:
    """Every page is right after three cuts, and the vCPU that missed a page only waited."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        source.service.set_parameters(
            {
                "x-checksum": checksum,
                "max-bandwidth": MIB,
                "max-postcopy-bandwidth": 2 * MIB,
            }
        )
        for side in (source, target):
            side.service.set_capabilities({"postcopy-preempt": preempt})

        def uri(name: str) -> str:
            return f"unix:{tmp_path}/{name}" if transport == "unix" else "tcp:127.0.0.1:0"

        listening = target.service.migrate_incoming(uri("first"))
        source.machine.start()
        source.service.migrate(listening)
        source.service.start_postcopy()
        source.wait_status("postcopy-active")
        target.wait_event("RESUME")
        for cut in range(3):
            (source if cut % 2 else target).service.pause()
            wait_paused(source, target)
            assert source.machine.run_state == "finish-migrate"  # never starts by itself
            go_on(source, target, uri(f"again{cut}"), cut + 1)
            for side in (source, target):
                side.wait_count("MIGRATION", cut + 2, status="postcopy-active")
        source.service.set_parameters({"max-postcopy-bandwidth": 0})
        assert source.service.wait(30) == "completed", source.service.query()
        assert target.service.wait(30) == "completed", target.service.query()
        statistics = target.machine.statistics()
        assert statistics["touch_errors"] == 0
        target.assert_sweep_clean()
        assert target.statuses.count("postcopy-paused") == 3


def begin_and_pause(source: Side, target: Side, folder: Path) -> None:
    """In postcopy with pages missing, both paused."""
    source.service.set_parameters({"max-postcopy-bandwidth": 2 * MIB, "max-bandwidth": MIB})
    listening = target.service.migrate_incoming(f"unix:{folder}/first")
    source.machine.start()
    source.service.migrate(listening)
    source.service.start_postcopy()
    source.wait_status("postcopy-active")
    target.wait_event("RESUME")
    target.service.pause()
    wait_paused(source, target)


def finish(source: Side, target: Side) -> None:
    source.service.set_parameters({"max-postcopy-bandwidth": 0})
    assert source.service.wait(30) == "completed", source.service.query()
    assert target.service.wait(30) == "completed", target.service.query()
    target.assert_sweep_clean()


def test_a_recovery_nobody_comes_for_is_given_up(tmp_path: Path) -> None:
    """``migrate-pause`` ends the waiting; a second ``migrate-recover`` meanwhile is refused."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        target.service.recover(f"unix:{tmp_path}/nobody")
        assert target.service.query()["status"] == "postcopy-recover-setup"
        with pytest.raises(MigrationError, match="triggered already"):
            target.service.recover(f"unix:{tmp_path}/nobody")
        target.service.pause()
        target.wait_count("MIGRATION", 2, status="postcopy-paused")
        go_on(source, target, f"unix:{tmp_path}/second", 1)
        finish(source, target)


@pytest.mark.parametrize("gives_up", ["source", "destination"])
def test_migrate_pause_in_the_middle_of_a_recovery(gives_up: str, tmp_path: Path) -> None:
    """The handshake stalls; either side may give it up, and another one works."""
    stall = StallAt(message("RECV_BITMAP"), after=2)
    uri = f"unix:{tmp_path}/second"
    with (
        pair(ram_bytes=16 * MIB, rate=2000) as (source, target),
        Proxy(uri, stall) as proxy,
    ):
        for each in (source, target):
            each.service.set_parameters({"x-checksum": False})  # the proxy reads along
        begin_and_pause(source, target, tmp_path)
        target.service.recover(uri)
        source.service.migrate(proxy.uri, resume=True)
        assert stall.struck.wait(30)
        for each in (source, target):
            each.wait_status("postcopy-recover")
        (source if gives_up == "source" else target).service.pause()
        stall.go_on()
        for each in (source, target):
            each.wait_count("MIGRATION", 2, status="postcopy-paused")
        go_on(source, target, f"unix:{tmp_path}/third", 2)
        finish(source, target)


def test_release_ram_cannot_be_resumed(tmp_path: Path) -> None:
    """Refused at once, by the command; the destination waits on."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        source.service.set_capabilities({"release-ram": True})
        begin_and_pause(source, target, tmp_path)
        waiting = target.service.recover(f"unix:{tmp_path}/second")
        with pytest.raises(MigrationError, match="release-ram"):
            source.service.migrate(waiting, resume=True)
        assert source.service.query()["status"] == "postcopy-paused"


def test_a_cut_during_recovery_pauses_again(tmp_path: Path) -> None:
    """Nobody answers on the first new channel; the second one works."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        # The destination is cut off in the middle of its answers.
        waiting = target.service.recover(f"unix:{tmp_path}/second")
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(waiting.removeprefix("unix:"))
            stranger.sendall(b"\x08\x00\x0a\x00\x08\x07toy")
        target.wait_count("MIGRATION", 2, status="postcopy-paused")
        go_on(source, target, f"unix:{tmp_path}/third", 1)
        finish(source, target)


def test_a_recovery_given_up_is_begun_anew_by_who_hears_it(tmp_path: Path) -> None:
    """At the same address, at once; that one can be given up as well, and the next one works."""
    uri = f"unix:{tmp_path}/again"
    begun_anew: list[str] = []

    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)

        def begin_anew(_event: str, data: dict[str, object]) -> None:
            if data.get("status") == "postcopy-paused" and not begun_anew:
                begun_anew.append(target.service.recover(uri))

        target.service.recover(uri)
        target.service.add_listener(begin_anew)
        target.service.pause()
        target.wait_count("MIGRATION", 2, status="postcopy-recover-setup")
        join_threads("incoming-recover", 1)
        target.service.pause()
        target.wait_count("MIGRATION", 3, status="postcopy-paused")
        target.service.recover(uri)
        source.service.migrate(uri, resume=True)
        finish(source, target)


def join_threads(name: str, count: int) -> None:
    """Until no more than ``count`` of that name are left."""
    deadline = time.monotonic() + 30
    while len([each for each in threading.enumerate() if each.name == name]) > count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_two_resume_at_once(tmp_path: Path) -> None:
    """The second one is refused while the first one connects, and nothing comes of it."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        waiting = target.service.recover(f"unix:{tmp_path}/second")
        refused: list[str] = []

        def look_up(_name: str) -> int:
            with pytest.raises(MigrationError) as error:
                source.service.migrate(waiting, resume=True)
            refused.append(str(error.value))
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(waiting.removeprefix("unix:"))
            return connection.detach()

        source.service.fds = look_up
        source.service.migrate("fd:first", resume=True)
        assert refused == ["another migration is connecting"]
        finish(source, target)


def test_a_second_resume_before_the_first_has_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is not kept: there is nothing paused any more once it is its turn."""
    connected = threading.Event()
    resume = OutgoingMigration.resume

    def late_resume(migration: OutgoingMigration, channel: Channel) -> None:
        assert connected.wait(30)
        resume(migration, channel)

    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        source.service.set_parameters({"max-postcopy-bandwidth": 0})
        monkeypatch.setattr(OutgoingMigration, "resume", late_resume)
        source.service.migrate(target.service.recover(f"unix:{tmp_path}/second"), resume=True)
        ours, theirs = socket.socketpair()

        def look_up(_name: str) -> int:
            connected.set()
            return ours.detach()

        source.service.fds = look_up
        with theirs:
            with pytest.raises(MigrationError, match="no paused migration"):
                source.service.migrate("fd:late", resume=True)
            assert theirs.recv(1) == b""
        finish(source, target)


def test_closed_in_the_moment_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new connection is cut as well, though its migration thread has not seen it yet: nobody
    waits for a peer that says nothing."""
    closing = threading.Event()
    pause, resume = OutgoingMigration.pause, OutgoingMigration.resume

    def noted_pause(migration: OutgoingMigration) -> None:
        pause(migration)
        closing.set()

    def late_resume(migration: OutgoingMigration, channel: Channel) -> None:
        assert closing.wait(30)
        resume(migration, channel)

    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        monkeypatch.setattr(OutgoingMigration, "pause", noted_pause)
        monkeypatch.setattr(OutgoingMigration, "resume", late_resume)
        ours, silent = socket.socketpair()
        with silent:
            source.service.fds = lambda _name: ours.detach()
            source.service.migrate("fd:silent", resume=True)
            source.service.close()
            assert silent.recv(1) == b""  # cut before a byte was sent


def test_closed_in_the_moment_its_source_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery's source is accepted and the service closed: the connection is not kept."""
    accept = Listener.accept
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)

        def late_accept(listener: Listener) -> Channel:
            channel = accept(listener)
            target.service.close()
            return channel

        monkeypatch.setattr(Listener, "accept", late_accept)
        waiting = target.service.recover(f"unix:{tmp_path}/second")
        with socket.socket(socket.AF_UNIX) as late:
            late.settimeout(30)
            late.connect(waiting.removeprefix("unix:"))
            assert late.recv(1) == b""


def test_no_descriptors_left_for_a_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up with the reason, and another one may be begun."""
    with pair(ram_bytes=16 * MIB, rate=2000) as (source, target):
        begin_and_pause(source, target, tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(Listener, "accept", no_descriptors)
            target.service.recover(f"unix:{tmp_path}/second")
            target.wait_count("MIGRATION", 2, status="postcopy-paused")
        assert "Too many open files" in str(target.service.query()["error-desc"])
        go_on(source, target, f"unix:{tmp_path}/second", 1)
        finish(source, target)


def no_descriptors(_listener: Listener) -> Channel:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
