"""The toy VM's disk, windows and console: state on the wire, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem import TARGET_PAGE_BYTES as PAGE
from migration.toyvm import Damage, ToyMachine, ToyOptions
from migration.toyvm.devices.console import CONSOLE, LINES_MAX, Console
from migration.toyvm.devices.disk import CHUNK_BYTES, Disk, DiskError
from migration.toyvm.devices.disk_live import DiskMigration
from migration.toyvm.devices.timer import GuestClock, Heartbeat
from migration.toyvm.devices.window import Window, WindowDevice, WindowError
from migration.wire.errors import RemoteStreamError
from migration.wire.io import BytesReader, BytesWriter
from tests.support.toyvm_machines import (
    copy_ram,
    flip,
    load_devices,
    run_some,
    save_devices,
    until,
)

CHUNKS = 8
OPTIONS = ToyOptions(ram_bytes=1 << 20, disk_bytes=CHUNKS * CHUNK_BYTES, window_pages=4)


def _send_disk(source: Disk, destination: Disk, *, between: list[int] | None = None) -> int:
    """A whole live migration in memory; ``between`` are chunks rewritten after the first round."""
    out, back = DiskMigration(source), DiskMigration(destination)
    writer = BytesWriter()
    out.save_setup(writer)
    sections = 1
    done = False
    while not done:
        done = out.save_iterate(writer, 3 * CHUNK_BYTES)
        sections += 1
        for index in between or []:
            source.rewrite(index)
        between = None
    out.save_complete(writer)
    out.save_cleanup()
    assert out.pending(exact=True).total_bytes == 0
    reader = BytesReader(writer.getvalue())
    back.load_setup()
    for _ in range(sections + 1):
        back.load(reader, 1)
    back.load_cleanup()
    assert reader.remaining == 0
    destination.generations = list(source.generations)
    return out.chunks_sent


def test_a_disk_goes_over_with_what_was_written_meanwhile() -> None:
    source, destination = (Disk(CHUNKS * CHUNK_BYTES, seed=1) for _ in range(2))
    for index in (0, 3, 3, 7):
        source.rewrite(index)
    destination.rewrite(5)  # leftovers must go
    sent = _send_disk(source, destination, between=[0, 1])
    assert sent >= CHUNKS + 1
    assert source.sweep() == destination.sweep() == []
    source.close()
    destination.close()


@given(st.lists(st.integers(0, CHUNKS - 1), max_size=20), st.lists(st.integers(0, CHUNKS - 1)))
def test_any_order_of_writes_arrives(before: list[int], between: list[int]) -> None:
    source, destination = (Disk(CHUNKS * CHUNK_BYTES, seed=1) for _ in range(2))
    for index in before:
        source.rewrite(index)
    _send_disk(source, destination, between=between)
    assert destination.sweep() == []
    source.close()
    destination.close()


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"\x09", "unknown record"),
        (b"\x02" + (CHUNKS).to_bytes(4, "big") + bytes(CHUNK_BYTES), "chunk 8 of 8"),
        (b"\x01" + (1 << 40).to_bytes(8, "big") + (65536).to_bytes(4, "big"), "same disk"),
        (b"\x02\0\0\0\0abc", "wanted"),
        (b"", "wanted"),
    ],
)
def test_a_bad_disk_stream_is_refused(payload: bytes, reason: str) -> None:
    disk = Disk(CHUNKS * CHUNK_BYTES, seed=1)
    with pytest.raises(RemoteStreamError, match=reason):
        DiskMigration(disk).load(BytesReader(payload), 1)
    assert disk.sweep() == []
    disk.close()


def test_a_disk_file_keeps_its_contents_and_errors_are_typed(tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    disk = Disk(CHUNK_BYTES, seed=1, path=path)
    disk.rewrite(0)
    kept = disk.read_chunk(0)
    disk.close()
    again = Disk(CHUNK_BYTES, seed=1, path=path)
    assert again.read_chunk(0) == kept
    Path(path).write_bytes(b"short")
    with pytest.raises(DiskError):
        again.read_chunk(0)
    again.close()
    with pytest.raises(DiskError):
        Disk(CHUNK_BYTES, seed=1, path=str(tmp_path / "no" / "disk"))


def test_the_disk_driver_writes_while_the_guest_runs_and_only_then() -> None:
    with ToyMachine(OPTIONS) as machine:
        disk = machine.devices.disk
        assert disk is not None
        machine.start()
        until(lambda: sum(disk.generations) > 3, "rewrites")
        machine.stop()
        before = list(disk.generations)
        assert machine.sweep().is_clean
        machine.start()
        until(lambda: disk.generations != before, "rewrites after the stop")
        machine.stop()
        assert machine.sweep().is_clean


def test_disk_and_windows_move_with_the_machine() -> None:
    there_options = dataclasses.replace(OPTIONS, incoming=True)
    with ToyMachine(OPTIONS) as source, ToyMachine(there_options) as destination:
        disk, other = source.devices.disk, destination.devices.disk
        assert disk is not None
        assert other is not None
        for _ in range(3):
            run_some(source, 100)
        disk.rewrite(2)
        disk.label = "carried"
        _send_disk(disk, other)
        copy_ram(source, destination)
        load_devices(destination, save_devices(source))
        assert other.generations == disk.generations
        assert other.label == "carried"
        assert source.devices.windows is not None
        assert destination.devices.windows is not None
        assert destination.devices.windows.windows == source.devices.windows.windows
        assert destination.devices.windows.windows[3 << 40].offset == 3 * PAGE
        run_some(destination, 100)
        assert destination.sweep().is_clean
        other.write_chunk(2, bytes(CHUNK_BYTES))
        report = destination.sweep()
        assert [(bad.page, bad.damage) for bad in report.bad] == [(2, Damage.DISK)]


def test_an_older_machine_type_sends_no_label() -> None:
    old = dataclasses.replace(OPTIONS, machine_type="toy-1.0")
    with ToyMachine(old) as source, ToyMachine(OPTIONS) as newer:
        assert b"toy-disk-state/label" not in save_devices(source)
        assert b"toy-disk-state/label" in save_devices(newer)


def test_a_wrong_page_behind_a_window_fails_the_load() -> None:
    there_options = dataclasses.replace(OPTIONS, incoming=True)
    with ToyMachine(OPTIONS) as source, ToyMachine(there_options) as destination:
        run_some(source, 100)
        _send_disk(source.devices.disk, destination.devices.disk)  # type: ignore[arg-type]
        copy_ram(source, destination)
        flip(destination.ram.by_idstr("toy.ram"), PAGE)  # where the moving window looks
        with pytest.raises(RemoteStreamError, match="page behind the window"):
            load_devices(destination, save_devices(source))


def _device(machine: ToyMachine) -> WindowDevice:
    device = machine.devices.windows
    assert device is not None
    return device


def test_windows_alias_write_through_and_refuse() -> None:
    with ToyMachine(OPTIONS) as machine:
        device = _device(machine)
        plain, read_only = 1 << 40, 2 << 40
        assert device.read(plain + 5, 100) == device.read(read_only + 5, 100)
        data = device.read(plain + 8, 8)
        device.write(plain + 8, data)
        with pytest.raises(WindowError, match="read-only"):
            device.write(read_only, b"x")
        with pytest.raises(WindowError, match="no window shows"):
            device.read(plain + 4 * PAGE - 1, 2)
        device.move(plain, 10 * PAGE)
        ram = machine.ram.by_idstr("toy.ram")
        assert device.read(plain, PAGE) == ram.read(10 * PAGE, PAGE)
        device.unmap(plain)
        with pytest.raises(WindowError, match="no window begins"):
            device.unmap(plain)


@pytest.mark.parametrize(
    ("address", "window"),
    [
        (5 << 40, Window(9, 0, PAGE)),
        (5 << 40, Window(0, 1 << 20, PAGE)),
        (5 << 40, Window(0, 0, 0)),
        ((5 << 40) + 1, Window(0, 0, PAGE)),
        ((1 << 40) + PAGE, Window(0, 0, PAGE)),
        ((1 << 40) - PAGE, Window(0, 0, 2 * PAGE)),
    ],
)
def test_impossible_windows_are_refused(address: int, window: Window) -> None:
    with ToyMachine(OPTIONS) as machine, pytest.raises(WindowError):
        _device(machine).map(address, window)


def test_the_console_drops_old_lines_and_carries_the_rest() -> None:
    console = Console()
    for number in range(LINES_MAX + 10):
        console.write(f"line {number}\n".encode())
    console.write(b"unfinished")
    writer = BytesWriter()
    CONSOLE.save(writer, console)
    other = Console()
    CONSOLE.load(BytesReader(writer.getvalue()), other, 1)
    lines = other.read_lines()
    assert len(lines) == LINES_MAX
    assert lines[-1] == f"line {LINES_MAX + 9}"
    assert other.partial == b"unfinished"
    assert other.printed == console.printed


def test_beats_are_counted_by_guest_time_only() -> None:
    host = [0]
    clock = GuestClock(lambda: host[0])
    heartbeat = Heartbeat(clock)
    clock.go()
    heartbeat.arm()
    host[0] += 250_000_000
    clock.halt()
    host[0] += 10_000_000_000  # stopped: does not count
    heartbeat.catch_up()
    assert (heartbeat.beats, heartbeat.expiry_ns) == (2, 300_000_000)
    clock.go()
    host[0] += 50_000_000
    heartbeat.catch_up()
    assert heartbeat.beats == 3
