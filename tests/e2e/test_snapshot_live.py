"""Live handlers in migrations: the disk travels while the guest writes to it, in precopy and in
postcopy, and every handler is set up and cleaned up once whatever happens.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from migration.wire.constants import SectionType
from tests.support.pair import MIB, Side, pair
from tests.support.snapshot_live import Diary
from tests.support.stream_elements import Kind
from tests.support.stream_scanner import StreamScanner

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

_DISK = 4 * MIB


def _disk_is_whole(side: Side) -> None:
    disk = side.machine.devices.disk
    assert disk is not None
    assert disk.sweep() == []
    assert any(disk.generations)


def _writes_on(side: Side) -> None:
    """Until the guest has rewritten chunks here: its driver goes on after the move."""
    disk = side.machine.devices.disk
    assert disk is not None
    before = sum(disk.generations)
    deadline = threading.Event()
    for _ in range(1000):
        if sum(disk.generations) > before + 3:
            return
        deadline.wait(0.01)
    raise AssertionError("the disk driver does not write")


def test_the_disk_migrates_in_precopy(tmp_path: Path) -> None:
    """Bulk and dirty chunks, the guest writing all the time."""
    with pair(postcopy=False, ram_bytes=16 * MIB, disk_bytes=_DISK) as (source, target):
        source.service.cont()
        _writes_on(source)
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        migration = source.machine.devices.disk_migration
        assert migration is not None
        assert migration.chunks_sent >= _DISK // (64 << 10)
        _writes_on(target)
        target.assert_sweep_clean()
        _disk_is_whole(target)


@pytest.mark.parametrize("checksum", [True, False])
def test_the_disk_migrates_in_postcopy(tmp_path: Path, checksum: bool) -> None:
    """It is complete before the guest moves; no write is lost, none comes after."""
    with pair(ram_bytes=32 * MIB, disk_bytes=_DISK) as (source, target):
        for side in (source, target):
            side.service.set_parameters({"x-checksum": checksum})
        source.service.cont()
        _writes_on(source)
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        assert "postcopy-active" in source.statuses
        sent = source.machine.devices.disk
        assert sent is not None
        assert sent.dirty.count() == 0  # nothing was written there after it was complete
        _writes_on(target)
        target.assert_sweep_clean()
        _disk_is_whole(target)


def test_the_disk_is_complete_before_the_first_discard(tmp_path: Path) -> None:
    """As bytes: its END stands in front of the discards, and none of its sections behind them."""
    with pair(ram_bytes=8 * MIB, disk_bytes=MIB) as (source, target):
        for side in (source, target):
            side.service.set_parameters({"x-checksum": False, "x-split-run": False})
        source.service.cont()
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/dst")
        tap = _Tap(str(tmp_path / "tap"), uri.removeprefix("unix:"))
        source.service.migrate(f"unix:{tmp_path}/tap")
        source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        target.assert_sweep_clean()
    tap.join()  # the connections end with their sides
    order = _order(bytes(tap.recorded))
    assert "END toy-disk" in order
    first = order.index("DISCARD")
    assert order.index("END toy-disk") < first < order.index("PACKAGED")
    assert "PART toy-disk" not in order[first:]


class _Tap:
    """Passes both directions on and keeps what the source sent."""

    def __init__(self, path: str, onward: str) -> None:
        self.recorded = bytearray()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(1)
        self._thread = threading.Thread(target=self._run, args=(onward,))
        self._thread.start()

    def _run(self, onward: str) -> None:
        with (
            self._listening,
            self._listening.accept()[0] as source,
            socket.socket(socket.AF_UNIX) as target,
        ):
            target.connect(onward)
            back = threading.Thread(target=self._copy, args=(target, source, None))
            back.start()
            self._copy(source, target, self.recorded)
            back.join()

    @staticmethod
    def _copy(reading: socket.socket, writing: socket.socket, keep: bytearray | None) -> None:
        while data := reading.recv(1 << 20):
            if keep is not None:
                keep += data
            writing.sendall(data)
        writing.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        self._thread.join(60)


def _order(stream: bytes) -> list[str]:
    """Sections and commands of a stream, as words."""
    words = []
    scanner = StreamScanner()
    for element in scanner.feed(stream):
        if element.kind is Kind.SECTION:
            words.append(f"{SectionType(element.data[0]).name} {element.name}")
        elif element.kind is Kind.COMMAND:
            words.append(element.name)
    assert not scanner.lost
    return words


@pytest.mark.parametrize("postcopy", [False, True])
def test_each_side_calls_a_handler_in_order_and_once(tmp_path: Path, postcopy: bool) -> None:
    """Set-up, rounds, the end, clean-up."""
    with pair(postcopy=postcopy, ram_bytes=8 * MIB) as (source, target):
        sent, received = Diary(), Diary()
        source.machine.registry.register_live(sent)
        target.machine.registry.register_live(received)
        source.service.cont()
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        if postcopy:
            source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        calls = [call for call in sent.calls if call != "save_iterate"]
        assert calls == ["save_setup", "save_complete", "save_cleanup"]
        loads = [call for call in received.calls if call != "load I"]
        assert loads == ["load_setup", "load S", "load C", "load_cleanup"]
        target.assert_sweep_clean()


@pytest.mark.parametrize("fails_in", ["save_setup", "save_complete", "load S", "load C"])
@pytest.mark.parametrize("postcopy", [False, True])
def test_a_handler_that_fails_is_cleaned_up_and_the_guest_stays(
    tmp_path: Path, postcopy: bool, fails_in: str
) -> None:
    """On both sides; the source's guest goes on."""
    with pair(postcopy=postcopy, ram_bytes=8 * MIB) as (source, target):
        sent, received = Diary(fails_in=fails_in), Diary(fails_in=fails_in)
        source.machine.registry.register_live(sent)
        target.machine.registry.register_live(received)
        source.service.cont()
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        if postcopy:
            source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "failed"
        assert sent.calls[-1] == "save_cleanup"
        assert received.calls[0] == "load_setup"
        assert received.calls[-1] == "load_cleanup"
        assert source.machine.run_state == "running"
        assert target.machine.run_state == "inmigrate"
        source.assert_sweep_clean()
