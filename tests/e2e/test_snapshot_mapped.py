"""The mapped-ram layout: where pages lie, what is a hole, how it migrates, what analyze says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guestmem import TARGET_PAGE_BYTES
from migration.runtime.errors import MigrationError
from migration.runtime.snapshots.look import MappedSnapshot
from migration.wire.constants import MAPPED_RAM_PAGES_ALIGNMENT
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from tests.support.pair import MIB, side
from tests.support.snapshot_vm import operations, snapshot_side, whole_names
from tests.support.toyvm_machines import run_some

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


def test_the_file_can_be_mapped_as_ram(tmp_path: Path) -> None:
    """Every page at its place, zero pages are holes, and the file is as large as its contents."""
    with snapshot_side(tmp_path, mapped=True, fill_share=0.25, disk_bytes=0) as one:
        run_some(one.machine)
        one.service.savevm("a")
        path = tmp_path / "a.vmstate"
        total = one.machine.ram.total_length
        assert os.stat(path).st_size > total
        assert os.stat(path).st_blocks * 512 < total // 2
        with MappedSnapshot(path) as snapshot:
            assert snapshot.configuration.machine == "toy-1.1"
            assert list(snapshot.areas) == [block.idstr for block in one.machine.ram]
            for block in one.machine.ram:
                area = snapshot.areas[block.idstr]
                assert area.pages_at % MAPPED_RAM_PAGES_ALIGNMENT == 0
                contents = block.read(0, block.used_length)
                with snapshot.map(block.idstr) as mapped:
                    assert mapped[:] == contents
                    mapped[0:4] = b"mine"
                assert snapshot.read(block.idstr, 100, 10_000) == contents[100:10_100]
                present = snapshot.bitmap(block.idstr)
                for page in range(block.page_count):
                    at = page * TARGET_PAGE_BYTES
                    assert present.test(page) == any(contents[at : at + TARGET_PAGE_BYTES])
                with pytest.raises(ValueError, match="outside"):
                    snapshot.read(block.idstr, block.used_length - 1, 2)
        one.service.loadvm("a")
        one.assert_sweep_clean()


def test_what_is_no_such_file_is_said_to_be_none(tmp_path: Path) -> None:
    """A plain stream, a file cut inside its bitmap, something else."""
    with snapshot_side(tmp_path) as one:
        one.service.savevm("plain")
        one.service.set_capabilities({"mapped-ram": True})
        one.service.savevm("mapped")
    with pytest.raises(RemoteStreamError, match="a plain stream"):
        MappedSnapshot(tmp_path / "plain.vmstate")
    cut = (tmp_path / "mapped.vmstate").read_bytes()[:200]
    (tmp_path / "cut").write_bytes(cut)
    with pytest.raises(TruncatedStreamError):
        MappedSnapshot(tmp_path / "cut")
    (tmp_path / "other").write_bytes(b"something else entirely")
    with pytest.raises(RemoteStreamError, match="not a migration stream"):
        MappedSnapshot(tmp_path / "other")


@pytest.mark.parametrize("mapped", [False, True])
def test_analyze_reads_it_to_the_last_byte(tmp_path: Path, mapped: bool) -> None:
    """Blocks, pages, every device; nothing is left over."""
    with snapshot_side(tmp_path, mapped=mapped, fill_share=0.5) as one:
        one.service.savevm("a")
        pages = sum(block.page_count for block in one.machine.ram)
        data = sum(
            not block.is_zero(at, TARGET_PAGE_BYTES)
            for block in one.machine.ram
            for at in range(0, block.used_length, TARGET_PAGE_BYTES)
        )
    command = [sys.executable, "-m", "migration", "analyze", "--json", str(tmp_path / "a.vmstate")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["kind"] == "end"
    assert "trailing" not in lines[-1]
    blocks = [line for line in lines if line["kind"] == "ram-block"]
    assert {block["name"] for block in blocks} == {"toy.ram", "toy.more"}
    assert sum(block["pages"]["normal"] for block in blocks) == data
    assert sum(block["pages"]["zero"] for block in blocks) == pages - data
    names = [line["name"] for line in lines if line["kind"] == "section"]
    assert {"timer", "toy-cpu", "toy-disk", "toy-disk-state", "globalstate"} <= set(names)


def test_a_guest_migrates_into_a_file_and_out_of_it(tmp_path: Path) -> None:
    """``migrate`` and ``migrate-incoming`` with the capability; the source's guest is gone."""
    uri = f"file:{tmp_path}/guest,offset=0x10000"
    with snapshot_side(tmp_path, mapped=True) as one:
        one.service.cont()
        one.service.migrate(uri)
        assert one.service.wait(60) == "completed"
        assert one.statuses == ["setup", "active", "device", "completed"]
        assert one.machine.run_state == "postmigrate"
        before = operations(one.machine)
    with snapshot_side(tmp_path, mapped=True, incoming=True) as other:
        assert other.service.migrate_incoming(uri) == uri
        assert other.service.wait(60) == "completed"
        assert other.machine.run_state == "running"
        assert sum(operations(other.machine)) >= sum(before)
        other.assert_sweep_clean()


def test_what_mapped_ram_does_not_go_with_is_refused(tmp_path: Path) -> None:
    """Another transport, postcopy, a file of the other kind; the guest goes on."""
    with snapshot_side(tmp_path) as one:
        one.service.savevm("plain")
        one.service.set_capabilities({"mapped-ram": True})
        one.service.cont()
        for uri in (f"unix:{tmp_path}/m", "exec:cat"):
            with pytest.raises(MigrationError, match="seekable transport"):
                one.service.migrate(uri)
        for other in ("postcopy-ram", "xbzrle"):
            with pytest.raises(MigrationError, match="incompatible"):
                one.service.set_capabilities({other: True})
        one.service.migrate(f"file:{tmp_path}/no/such/folder")
        assert one.service.wait(60) == "failed"
        assert "No such file" in str(one.service.query()["error-desc"])
        assert one.machine.run_state == "running"
        one.service.savevm("mapped")
        one.assert_sweep_clean()
    with snapshot_side(tmp_path, mapped=True, incoming=True) as other_side:
        other_side.service.migrate_incoming(f"file:{tmp_path}/plain.vmstate")
        assert other_side.service.wait(60) == "failed"
        assert "plain stream" in str(other_side.service.query()["error-desc"])
        assert other_side.machine.run_state == "inmigrate"
        other_side.service.set_capabilities({"mapped-ram": False})
        other_side.service.migrate_incoming(f"file:{tmp_path}/mapped.vmstate")
        assert other_side.service.wait(60) == "failed"
        error = str(other_side.service.query()["error-desc"])
        assert "capability mapped-ram is on at the source and off here" in error
        other_side.service.loadvm("mapped")
        other_side.assert_sweep_clean()


def test_a_cancelled_one_leaves_no_file_and_the_guest(tmp_path: Path) -> None:
    """In the middle of writing."""
    with side(ram_bytes=256 * MIB) as one:
        one.service.set_capabilities({"mapped-ram": True})
        one.service.cont()
        one.service.migrate(f"file:{tmp_path}/guest")
        one.wait_status("device")
        one.service.cancel()
        ended = one.service.wait(60)
        assert ended in ("cancelled", "completed")  # it may have been too late
        if ended == "cancelled":
            assert list(tmp_path.iterdir()) == []
            assert one.machine.run_state == "running"
        one.assert_sweep_clean()


def test_a_plain_migration_to_a_file_is_a_snapshot_too(tmp_path: Path) -> None:
    """``migrate file:`` without the capability, loaded by name and by ``migrate-incoming``."""
    with snapshot_side(tmp_path) as one:
        run_some(one.machine)
        before = operations(one.machine)
        one.service.migrate(f"file:{tmp_path}/gone.vmstate")
        assert one.service.wait(60) == "completed"
        one.service.loadvm("gone")
        assert operations(one.machine) == before
        one.assert_sweep_clean()
        one.service.savevm("saved")
        assert set(whole_names(tmp_path)) == {"gone", "saved"}
    with snapshot_side(tmp_path, incoming=True) as other:
        other.service.migrate_incoming(f"file:{tmp_path}/saved.vmstate")
        assert other.service.wait(60) == "completed"
        assert operations(other.machine) == before
        other.assert_sweep_clean()
