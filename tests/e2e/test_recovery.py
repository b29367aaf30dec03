"""The network is cut in postcopy: both sides pause, and go on over a new channel, again and
again."""

from __future__ import annotations

from pathlib import Path

import pytest

from migration.runtime.errors import MigrationError
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
        import socket

        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(waiting.removeprefix("unix:"))
            stranger.sendall(b"\x08\x00\x0a\x00\x08\x07toy")
        target.wait_count("MIGRATION", 2, status="postcopy-paused")
        go_on(source, target, f"unix:{tmp_path}/third", 1)
        finish(source, target)
