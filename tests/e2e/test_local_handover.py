"""A guest moves to another process of this host, and its memory stays where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing, MemoryBackend, RAMBlock
from migration.runtime.errors import MigrationError
from migration.toyvm.options import VCpuKind
from tests.support.pair import MIB, Side, pair, side
from tests.support.toyvm_kvm import need_kvm
from tests.support.uffd_memory import hugepages

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

# Each side's, and new ones for the source once it lets go.
HUGEPAGES = 3 * 16
SHARED = [Backing.MEMFD, Backing.HUGETLB]


def inode(block: RAMBlock) -> int:
    assert block.fd is not None
    return os.fstat(block.fd).st_ino


def hand_over(source: Side, target: Side, uri: str) -> None:
    """From ``migrate`` to both ends' completion."""
    listening = target.service.migrate_incoming(uri)
    source.machine.start()
    source.service.set_parameters({"mode": "cpr-transfer"})
    source.service.migrate(listening)


def assert_moved(source: Side, target: Side) -> None:
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()
    target.assert_sweep_clean()


@pytest.mark.parametrize("backing", SHARED)
@pytest.mark.parametrize("vcpu", list(VCpuKind))
def test_the_memory_itself_changes_hands(backing: Backing, vcpu: VCpuKind, tmp_path: Path) -> None:
    """The very same pages, none of them sent; the guest goes on with them, its source lets go."""
    if vcpu is VCpuKind.KVM:
        need_kvm()
    options: dict[str, Any] = {"backing": backing, "vcpu": vcpu, "window_pages": 16}
    with ExitStack() as stack:
        if backing is Backing.HUGETLB:
            stack.enter_context(hugepages(HUGEPAGES))
        source, target = stack.enter_context(pair(postcopy=False, **options))
        (block,), (taken,) = source.machine.ram, target.machine.ram
        before = inode(block)
        hand_over(source, target, f"unix:{tmp_path}/migration")
        assert_moved(source, target)
        assert inode(taken) == before != inode(block)
        figures = source.service.query()["ram"]
        assert isinstance(figures, dict)
        assert (figures["normal"], figures["duplicate"]) == (0, 0)
        assert source.figures["handed-over-bytes"] == block.used_length
        assert "HANDOVER" in source.figures["features"]
        assert block.read(0, 64) == bytes(64)


def test_private_blocks_are_sent_beside_those_handed_over(tmp_path: Path) -> None:
    """What cannot change hands travels as pages, rounds and all."""
    options: dict[str, Any] = {
        "backing": Backing.MEMFD,
        "extra_blocks": (("toy.private", 8 * MIB),),
        "backends": {"toy.private": MemoryBackend(Backing.ANON)},
        "rate": 2000,
    }
    with pair(postcopy=False, **options) as (source, target):
        hand_over(source, target, f"unix:{tmp_path}/migration")
        assert_moved(source, target)
        figures = source.service.query()["ram"]
        assert isinstance(figures, dict)
        assert figures["normal"] + figures["duplicate"] >= 8 * MIB >> 12
        assert source.figures["handed-over-bytes"] == 32 * MIB


def test_the_guest_stays_when_the_destination_cannot_take_it(tmp_path: Path) -> None:
    """A refusal comes before the guest is stopped; source and destination both stay usable."""
    options: dict[str, Any] = {"backing": Backing.MEMFD, "rate": 2000}
    with pair(postcopy=False, destination={"ram_bytes": 16 * MIB}, **options) as (source, target):
        hand_over(source, target, f"unix:{tmp_path}/migration")
        assert source.service.wait(60) == "failed"
        assert source.machine.run_state == "running"
        assert "size mismatch" in str(target.service.query()["error-desc"])
        with side(ram_bytes=32 * MIB, incoming=True, **options) as other:
            source.service.migrate(other.service.migrate_incoming(f"unix:{tmp_path}/again"))
            assert_moved(source, other)


def test_cancelled_with_the_memory_in_both_hands(tmp_path: Path) -> None:
    """The destination forgets the memory before it could ever empty it: the source's guest is
    whole, and the destination takes another one."""
    with pair(postcopy=False, backing=Backing.MEMFD, rate=2000) as (source, target):
        source.service.set_capabilities({"pause-before-switchover": True})
        hand_over(source, target, f"unix:{tmp_path}/migration")
        source.wait_status("pre-switchover")
        (block,), (taken,) = source.machine.ram, target.machine.ram
        assert inode(block) == inode(taken)
        source.service.cancel()
        assert source.service.wait(60) == "cancelled"
        assert target.service.wait(60) == "failed"
        assert source.machine.run_state == "running"
        assert inode(block) != inode(taken)
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/again")  # empties its RAM
        source.service.set_capabilities({"pause-before-switchover": False})
        source.service.migrate(listening)
        assert_moved(source, target)


def test_what_cannot_be_handed_over_is_refused(tmp_path: Path) -> None:
    with pair(postcopy=False, ram_bytes=8 * MIB, rate=500) as (source, target):
        hand_over(source, target, f"unix:{tmp_path}/migration")
        assert source.service.wait(60) == "failed"
        error = str(source.service.query()["error-desc"])
        assert "--backing memfd" in error
        assert source.machine.run_state == "running"
    with pair(postcopy=False, ram_bytes=8 * MIB, backing=Backing.MEMFD, rate=500) as both:
        hand_over(*both, "tcp:127.0.0.1:0")
        assert both[0].service.wait(60) == "failed"
        assert "unix:PATH" in str(both[0].service.query()["error-desc"])
        both[0].service.set_capabilities({"postcopy-ram": True})
        with pytest.raises(MigrationError, match="not compatible with postcopy-ram"):
            both[0].service.migrate(f"unix:{tmp_path}/nobody")


# -- x-ignore-shared: both ends have the file ------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    """A file in memory, which both ends open as their RAM."""
    path = Path("/dev/shm") / f"postcopy-{os.getpid()}-{tmp_path.name}"
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def test_ignore_shared_sends_no_page(file: str, tmp_path: Path) -> None:
    with pair(postcopy=False, backing=Backing.FILE, path=file) as (source, target):
        for each in (source, target):
            each.service.set_capabilities({"x-ignore-shared": True})
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/migration")
        source.machine.start()
        source.service.migrate(listening)
        assert_moved(source, target)
        figures = source.service.query()["ram"]
        assert isinstance(figures, dict)
        assert (figures["normal"], figures["duplicate"]) == (0, 0)


@pytest.mark.parametrize("here", [False, True])
def test_ignore_shared_must_be_on_at_both_ends(here: bool, file: str, tmp_path: Path) -> None:
    """Above all, a destination that knows nothing of it must not empty the source's RAM."""
    with pair(postcopy=False, backing=Backing.FILE, path=file, rate=2000) as (source, target):
        target.service.set_capabilities({"x-ignore-shared": here})
        source.service.set_capabilities({"x-ignore-shared": not here})
        listening = target.service.migrate_incoming(f"unix:{tmp_path}/migration")
        source.machine.start()
        source.service.migrate(listening)
        assert source.service.wait(60) == "failed"
        assert target.service.wait(60) == "failed"
        error = str(target.service.query()["error-desc"])
        wanted = "capability x-ignore-shared is off at the source and on here"
        assert wanted in error if here else "another process's guest RAM" in error
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()
