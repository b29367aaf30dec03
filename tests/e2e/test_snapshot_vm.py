"""savevm, loadvm, delvm on toy machines, judged by their oracle."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestmem import TARGET_PAGE_BYTES, Backing
from guestmem.geometry import align_up
from migration.runtime.errors import MigrationError
from migration.runtime.snapshots.files import locate
from migration.toyvm import VCpuKind
from tests.support.guestmem_memory import more_hugepages, mounted
from tests.support.pair import BACKINGS, MIB, Side
from tests.support.snapshot_vm import (
    SHAPE,
    Gate,
    operations,
    snapshot_side,
    whole_names,
)
from tests.support.toyvm_kvm import need_kvm
from tests.support.toyvm_machines import run_some

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

LAYOUTS = pytest.mark.parametrize("mapped", [False, True], ids=["stream", "mapped-ram"])


def _refused(call: Any, *arguments: Any, match: str) -> str:
    with pytest.raises(MigrationError, match=match) as caught:
        call(*arguments)
    return str(caught.value)


@LAYOUTS
@pytest.mark.parametrize("backing", BACKINGS, ids=lambda backing: backing.name.lower())
def test_a_machine_goes_back_to_what_it_was(tmp_path: Path, backing: Any, mapped: bool) -> None:
    """RAM, logs, disk, devices; then it goes on from there as if nothing had been in between."""
    with ExitStack() as stack:
        if backing is Backing.HUGETLB:
            stack.enter_context(more_hugepages(10, tmp_path / "pool"))
        snapshots = tmp_path / "snapshots"
        snapshots.mkdir()
        one = stack.enter_context(snapshot_side(snapshots, mapped=mapped, backing=backing))
        run_some(one.machine)
        before = operations(one.machine)
        generations = list(one.machine.devices.disk.generations)  # type: ignore[union-attr]
        one.service.savevm("here")
        assert one.machine.run_state == "paused"
        run_some(one.machine)
        assert operations(one.machine) != before
        one.service.loadvm("here")
        assert one.machine.run_state == "paused"
        assert operations(one.machine) == before
        assert one.machine.devices.disk.generations == generations  # type: ignore[union-attr]
        one.assert_sweep_clean()
        run_some(one.machine)
        one.assert_sweep_clean()


def test_a_kvm_guest_goes_back_too(tmp_path: Path) -> None:
    """Registers and all; into the same machine and into another one."""
    need_kvm()
    options: dict[str, Any] = {"vcpu": VCpuKind.KVM, "smp": 1, "disk_bytes": 0}
    with snapshot_side(tmp_path, **options) as one:
        run_some(one.machine, 200)
        before = operations(one.machine)
        one.service.savevm("here")
        run_some(one.machine, 200)
        one.service.loadvm("here")
        assert operations(one.machine) == before
        run_some(one.machine, 200)
        one.assert_sweep_clean()
    with snapshot_side(tmp_path, incoming=True, **options) as other:
        other.service.loadvm("here")
        assert operations(other.machine) == before
        run_some(other.machine, 200)
        other.assert_sweep_clean()


@LAYOUTS
def test_another_process_would_load_it_too(tmp_path: Path, mapped: bool) -> None:
    """A machine that waits for a guest gets this one, and runs it, because it ran when saved."""
    with snapshot_side(tmp_path, mapped=mapped) as one:
        one.service.cont()
        one.service.savevm("here")
        assert one.machine.run_state == "running"
        assert [name for name, _ in one.events] == ["RESUME", "STOP", "RESUME"]
        one.assert_sweep_clean()
    with snapshot_side(tmp_path, incoming=True) as other:
        other.service.loadvm("here")
        assert other.machine.run_state == "running"
        run_some_more(other)
        other.assert_sweep_clean()
    with snapshot_side(tmp_path, incoming=True) as paused:
        paused.service.settings.start_paused = True
        paused.service.loadvm("here")
        assert paused.machine.run_state == "paused"
        paused.service.cont()
        run_some_more(paused)
        paused.assert_sweep_clean()


def run_some_more(one: Side) -> None:
    """The running guest does something."""
    before = sum(operations(one.machine))
    moved = threading.Event()
    while sum(operations(one.machine)) < before + 1000:
        moved.wait(0.001)


def test_run_states_come_back(tmp_path: Path) -> None:
    """Who was paused when saved is paused again; who was paused when it loads is not started."""
    with snapshot_side(tmp_path) as one:
        one.service.savevm("fresh")
        one.service.cont()
        one.service.savevm("running")
        one.service.stop_guest()
        one.service.savevm("paused")
        expected = {"fresh": "prelaunch", "running": "running", "paused": "paused"}
        for name, state in expected.items():
            if one.machine.run_state != "running":
                one.service.cont()
            one.service.loadvm(name)
            assert one.machine.run_state == state, name
        one.service.stop_guest()
        one.service.loadvm("running")
        assert one.machine.run_state == "paused"
        one.assert_sweep_clean()


def test_list_replace_and_delete(tmp_path: Path) -> None:
    """A second save under a name replaces the first; delete leaves nothing."""
    with snapshot_side(tmp_path) as one:
        assert one.service.list_snapshots() == []
        one.service.savevm("a")
        run_some(one.machine)
        one.service.savevm("a")
        before = operations(one.machine)
        one.service.savevm("b")
        listed = one.service.list_snapshots()
        assert [info["name"] for info in listed] == ["a", "b"]
        assert listed[0]["machine"] == "toy-1.1"
        assert listed[0]["is-verifiable"] is True
        assert int(str(listed[0]["vm-state-size"])) > 20 * MIB
        run_some(one.machine)
        one.service.loadvm("a")
        assert operations(one.machine) == before
        one.service.delvm("a")
        assert whole_names(tmp_path) == ["b"]
        _refused(one.service.delvm, "a", match="no snapshot 'a'")
        _refused(one.service.loadvm, "a", match="no snapshot 'a'")
        _refused(one.service.delvm, f"file:{tmp_path}/b.vmstate", match="remove files yourself")
        one.service.delvm("b")
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_outside_the_directory(tmp_path: Path) -> None:
    """By no name."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with snapshot_side(inside) as one:
        for name in ("../a", "/tmp/a", "a/../../b", "..", "x/y"):
            _refused(one.service.savevm, name, match="no snapshot name")
            _refused(one.service.delvm, name, match="no snapshot name")
    assert [entry.name for entry in tmp_path.iterdir()] == ["inside"]
    assert list(inside.iterdir()) == []


@LAYOUTS
def test_a_file_with_something_in_front(tmp_path: Path, mapped: bool) -> None:
    """Another program's header stays, whatever comes behind is replaced."""
    path = tmp_path / "machine.save"
    header = b"somebody's header".ljust(5000, b".")
    path.write_bytes(header + b"old stuff" * 1000)
    with snapshot_side(tmp_path / "none", mapped=mapped) as one:
        run_some(one.machine)
        before = operations(one.machine)
        one.service.savevm(f"file:{path},offset=5000")
        assert path.read_bytes()[:5000] == header
        run_some(one.machine)
        _refused(one.service.loadvm, f"file:{path}", match="at offset 5000")
        one.service.loadvm(f"file:{path},offset=0x1388")
        assert operations(one.machine) == before
        one.assert_sweep_clean()


def test_files_that_are_not_ours_are_not_replaced(tmp_path: Path) -> None:
    """Neither a device nor a link, nor somebody's JSON file."""
    (tmp_path / "x.json").write_text('{"precious": true}')
    (tmp_path / "link").symlink_to(tmp_path / "x.json")
    with snapshot_side(tmp_path) as one:
        _refused(one.service.savevm, f"file:{tmp_path}/x", match="no snapshot's manifest")
        _refused(one.service.savevm, f"file:{tmp_path}/link", match="symbolic link")
        _refused(one.service.savevm, "file:/dev/null", match="no regular file")
        _refused(one.service.savevm, f"file:{tmp_path}/no/x", match="No such file")
    assert (tmp_path / "x.json").read_text() == '{"precious": true}'
    assert not (tmp_path / "x").exists()


@LAYOUTS
@pytest.mark.parametrize("room", [0, MIB, 5 * MIB])
def test_a_full_disk_is_an_error_and_the_guest_goes_on(
    tmp_path: Path, room: int, mapped: bool
) -> None:
    """Nothing half stays behind, and the snapshot that was there is still good."""
    with (
        mounted("tmpfs", f"size={24 * MIB}", tmp_path / "disk") as disk,
        snapshot_side(disk, mapped=mapped, disk_bytes=0, extra_blocks=()) as one,
    ):
        one.service.cont()
        one.service.savevm("old")
        old = (disk / "old.vmstate").read_bytes()
        status = os.statvfs(disk)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - room))
        text = _refused(one.service.savevm, "old", match="is full")
        assert "MiB are free" in text
        assert "guest goes on" in text
        assert one.machine.run_state == "running"
        ballast.unlink()
        assert whole_names(disk) == ["old"]
        assert (disk / "old.vmstate").read_bytes() == old
        run_some_more(one)
        one.service.loadvm("old")
        one.assert_sweep_clean()


def test_a_disk_with_room_for_all_but_the_checksum(tmp_path: Path) -> None:
    """The last byte that does not fit is as good as the first."""
    with snapshot_side(tmp_path) as one:
        one.service.savevm("a")
        length = align_up((tmp_path / "a.vmstate").stat().st_size, TARGET_PAGE_BYTES)
        with mounted("tmpfs", f"size={length}", tmp_path / "disk") as disk:
            one.service.snapshots.directory = disk
            _refused(one.service.savevm, "a", match="is full")
            assert list(disk.iterdir()) == []
            assert one.machine.run_state == "prelaunch"


@LAYOUTS
def test_a_damaged_snapshot_is_refused_before_the_guest_is_touched(
    tmp_path: Path, mapped: bool
) -> None:
    """A byte anywhere, a part missing: found by the checksum while the guest runs."""
    with snapshot_side(tmp_path, mapped=mapped) as one:
        one.service.cont()
        one.service.savevm("a")
        path = tmp_path / "a.vmstate"
        good = path.read_bytes()
        events = len(one.events)
        for at in (0, 40, 2 * MIB, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :])
            text = _refused(one.service.loadvm, "a", match="checksum is wrong")
            assert "nothing has changed" in text
        path.write_bytes(good[:-1])
        _refused(one.service.loadvm, "a", match="cut short")
        (tmp_path / "a.vmstate.json").write_text("{}")
        _refused(one.service.loadvm, "a", match="no snapshot's manifest")
        assert one.machine.run_state == "running"
        assert len(one.events) == events
        run_some_more(one)
        one.assert_sweep_clean()


@LAYOUTS
def test_a_load_that_fails_midway_leaves_no_guest_to_run(tmp_path: Path, mapped: bool) -> None:
    """Without a manifest damage shows while loading. The machine stands; a good one heals it."""
    with snapshot_side(tmp_path, mapped=mapped) as one:
        one.service.cont()
        one.service.savevm("good")
        one.service.savevm("bad")
        bad = tmp_path / "bad.vmstate"
        (tmp_path / "bad.vmstate.json").unlink()
        whole = bad.read_bytes()
        at = whole.rindex(b"toy-heartbeat", 0, whole.rindex(b"\x00\x06"))
        bad.write_bytes(whole[:at])
        text = _refused(one.service.loadvm, "bad", match="stays stopped")
        assert "stream offset" in text
        assert one.machine.run_state == "internal-error"
        assert not one.machine.is_running
        _refused(one.service.cont, match="internal-error")
        _refused(one.service.savevm, "x", match="internal-error")
        _refused(one.service.migrate, f"file:{tmp_path}/x", match="internal-error")
        one.service.loadvm("good")
        assert one.machine.run_state == "paused"
        one.service.cont()
        run_some_more(one)
        one.assert_sweep_clean()


@LAYOUTS
def test_a_machine_without_a_guest_still_waits_for_one(tmp_path: Path, mapped: bool) -> None:
    """After a load that failed."""
    with snapshot_side(tmp_path, mapped=mapped) as one:
        one.service.savevm("good")
        cut = (tmp_path / "good.vmstate").read_bytes()
        at = cut.rindex(b"toy-heartbeat", 0, cut.rindex(b"\x00\x06"))
        (tmp_path / "cut.vmstate").write_bytes(cut[:at])
    with snapshot_side(tmp_path, incoming=True) as other:
        _refused(other.service.loadvm, "cut", match="failed")
        assert other.machine.run_state == "inmigrate"
        other.service.loadvm("good")
        assert other.machine.run_state == "prelaunch"
        other.assert_sweep_clean()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ram_bytes": 32 * MIB}, "has RAM toy.ram 16384 KiB"),
        ({"extra_blocks": ()}, "has RAM"),
        ({"machine_type": "none", "smp": 0, "disk_bytes": 0, "window_pages": 0}, "of a machine"),
        ({"disk_bytes": 0}, "has a device 'toy-disk-state'"),
        ({"window_pages": 0}, "this machine has not"),
        ({"smp": 1}, r"has a device 'toy-cpu' \(1\)"),
    ],
)
def test_a_snapshot_of_another_machine_is_refused_beforehand(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    """By type, RAM and devices; the guest does not even stop."""
    with snapshot_side(tmp_path) as one:
        one.service.savevm("a")
    with snapshot_side(tmp_path, **change) as other:
        if other.machine.vcpus:
            other.service.cont()
        events = list(other.events)
        text = _refused(other.service.loadvm, "a", match=match)
        assert "nothing has changed" in text
        assert other.events == events
        other.assert_sweep_clean()


def test_an_older_machine_loads_an_older_snapshot(tmp_path: Path) -> None:
    """toy-1.0 saved, toy-1.0 loaded; toy-1.1 is another machine."""
    with snapshot_side(tmp_path, machine_type="toy-1.0") as one:
        run_some(one.machine)
        one.service.savevm("a")
        one.service.loadvm("a")
        one.assert_sweep_clean()
    with snapshot_side(tmp_path) as other:
        _refused(other.service.loadvm, "a", match="is of a machine 'toy-1.0'")


def _in_thread(call: Any, *arguments: Any) -> tuple[threading.Thread, list[Exception]]:
    errors: list[Exception] = []

    def run() -> None:
        try:
            call(*arguments)
        except MigrationError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_while_one_is_saved_nobody_else_has_the_guest(tmp_path: Path) -> None:
    """No second one, no migration, no cont; stop is remembered."""
    with snapshot_side(tmp_path) as one:
        gate = Gate(one.machine)
        one.service.cont()
        thread, errors = _in_thread(one.service.savevm, "a")
        assert gate.reached.wait(60)
        assert one.machine.run_state == "save-vm"
        _refused(one.service.cont, match="a snapshot is being saved")
        _refused(one.service.savevm, "b", match="a snapshot is being saved")
        _refused(one.service.loadvm, "a", match="a snapshot is being saved")
        _refused(one.service.migrate, f"unix:{tmp_path}/m", match="a snapshot is being saved")
        assert one.service.query() == {}
        one.service.stop_guest()
        gate.opened.set()
        thread.join(60)
        assert errors == []
        assert one.machine.run_state == "paused"
        assert whole_names(tmp_path) == ["a"]
        one.assert_sweep_clean()


def test_the_end_of_the_process_waits_for_a_save_and_starts_nobody(tmp_path: Path) -> None:
    """``quit`` meanwhile."""
    with snapshot_side(tmp_path) as one:
        gate = Gate(one.machine)
        one.service.cont()
        thread, _ = _in_thread(one.service.savevm, "a")
        assert gate.reached.wait(60)
        closing, _ = _in_thread(one.service.close)
        assert thread.is_alive()
        gate.opened.set()
        closing.join(60)
        thread.join(60)
        assert not one.machine.is_running
        assert whole_names(tmp_path) in ([], ["a"])


def test_no_snapshot_during_a_migration_or_after_the_guest_left(tmp_path: Path) -> None:
    """It is somebody else's then."""
    with snapshot_side(tmp_path) as one, snapshot_side(tmp_path, incoming=True) as other:
        one.service.cont()
        _refused(other.service.savevm, "a", match="no guest to save in state 'inmigrate'")
        uri = other.service.migrate_incoming(f"unix:{tmp_path}/m")
        _refused(other.service.loadvm, "a", match="migration process in progress")
        one.service.migrate(uri)
        assert one.service.wait(60) == other.service.wait(60) == "completed"
        (tmp_path / "m").unlink(missing_ok=True)
        _refused(one.service.savevm, "a", match="'postmigrate'")
        other.service.savevm("a")
        other.assert_sweep_clean()
        one.service.loadvm("a")
        assert one.machine.run_state == "paused"
        one.service.cont()
        run_some_more(one)
        one.assert_sweep_clean()


def test_saving_where_no_directory_was_given(tmp_path: Path) -> None:
    """Names need one; files do not."""
    with snapshot_side(tmp_path) as one:
        one.service.snapshots.directory = None
        _refused(one.service.savevm, "a", match="--snapshot-dir")
        assert one.service.list_snapshots() == []
        one.service.savevm(f"file:{tmp_path}/a")
        one.service.loadvm(f"file:{tmp_path}/a")
        one.assert_sweep_clean()
        assert locate(f"file:{tmp_path}/a", None).manifest_path.exists()


def test_the_shape_is_what_it_says() -> None:
    """Two RAM blocks, a disk, windows, two vCPUs: nothing of it may get lost unnoticed."""
    assert {"ram_bytes", "smp", "disk_bytes", "window_pages", "extra_blocks"} == set(SHAPE)
