"""Policies and placement on a host with two NUMA nodes: ``make test-numa`` boots one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from guestmem import (
    Backing,
    HugepagesShort,
    MemoryBackend,
    NumaPolicy,
    PolicyMode,
    RAMBlock,
    preallocate,
)
from guestmem.hugejournal import HugepageJournal
from guestmem.numa import memory_nodes
from guestmem.placement import placement_of
from guestmem.pools import HugepagePool, nodes
from migration.runtime.memory_report import misplaced
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import HUGE
from tests.support.need import need
from tests.support.pair import MIB, pair

pytestmark = pytest.mark.kernel

LENGTH = 16 * MIB


def bind(node: int) -> NumaPolicy:
    return NumaPolicy(PolicyMode.BIND, (node,))


@pytest.fixture(autouse=True)
def two_nodes() -> None:
    need(len(memory_nodes()) >= 2, "this host has one NUMA node; make test-numa boots one with two")


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_bound_pages_are_where_they_are_bound(backing: Backing, node: int) -> None:
    with RAMBlock.allocate("ram", LENGTH, backing=backing, policy=bind(node)) as block:
        preallocate(block, threads=2)
        found = placement_of(block)
        assert found.bytes_by_node == {node: LENGTH}
        assert found.problem is None


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_interleaved_pages_are_on_both(backing: Backing) -> None:
    policy = NumaPolicy(PolicyMode.INTERLEAVE, (0, 1))
    with RAMBlock.allocate("ram", LENGTH, backing=backing, policy=policy) as block:
        preallocate(block)
        found = placement_of(block)
        assert found.bytes_by_node == {0: LENGTH // 2, 1: LENGTH // 2}
        assert found.problem is None


def test_pages_that_exist_are_moved() -> None:
    with RAMBlock.allocate("ram", LENGTH, policy=bind(0)) as block:
        block.fill(0, LENGTH, 7)
        block.set_policy(bind(1))
        assert placement_of(block).bytes_by_node == {1: LENGTH}
        assert block.read(LENGTH - 1, 1) == b"\x07"


def test_pages_on_the_wrong_node_are_told_of() -> None:
    """A file that was there before, with its pages on the other node."""
    with RAMBlock.allocate("ram", LENGTH, backing=Backing.MEMFD, policy=bind(0)) as block:
        preallocate(block)
        block.policy = bind(1)  # as if it had been asked for
        found = placement_of(block)
        # What counts is the kernel's policy, which is still the other one.
        assert found.problem is None
        wrong = type(found)(found.idstr, bind(1), found.bytes_by_node)
        assert wrong.misplaced == LENGTH
        assert wrong.problem is not None
        assert "wants bind:1 and has 16 MiB on node 0: 16 MiB on the wrong node" in wrong.problem


def test_hugepages_of_a_node(tmp_path: Path) -> None:
    """Reserved on one node, used from there; bound to the other one they are explained as short."""
    assert nodes() == [0, 1]
    journal = HugepageJournal(tmp_path / "journal")
    before = [HugepagePool(HUGE, node).state().free for node in (0, 1)]
    taking = journal.take(4, HUGE, node=1)
    try:
        assert HugepagePool(HUGE, 1).state().free == before[1] + 4
        with RAMBlock.allocate("ram", 2 * HUGE, backing=Backing.HUGETLB, policy=bind(1)) as block:
            preallocate(block)
            assert placement_of(block).bytes_by_node == {1: 2 * HUGE}
        pages = before[0] + 2
        need(pages <= before[0] + before[1] + 4, "pools of another shape")
        with (
            RAMBlock.allocate(
                "ram", pages * HUGE, backing=Backing.HUGETLB, policy=bind(0)
            ) as block,
            pytest.raises(HugepagesShort) as caught,
        ):
            preallocate(block)
        assert "huge page" in str(caught.value)
        assert "on node 0" in str(caught.value)
        assert "--node 0" in str(caught.value)
    finally:
        journal.give_back(taking.id)
    assert [HugepagePool(HUGE, node).state().free for node in (0, 1)] == before


def test_a_migration_keeps_to_the_destinations_nodes(tmp_path: Path) -> None:
    """From node 0 to node 1: placed there by UFFDIO_COPY, and nothing to warn of."""
    backends = [{"toy.ram": MemoryBackend(Backing.ANON, policy=bind(node))} for node in (0, 1)]
    with pair(ram_bytes=8 * MIB, backends=backends[0], destination={"backends": backends[1]}) as (
        source,
        target,
    ):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(120) == "completed", source.service.query()
        assert target.service.wait(120) == "completed", target.service.query()
        (device,) = target.service.query_memdev()
        assert device["host-nodes"] == [1]
        assert device["x-bytes-by-node"] == {"1": 8 * MIB}
        assert misplaced(target.machine.ram) == []
        assert "warnings" not in target.figures
        target.assert_sweep_clean()


def test_a_full_node_shows_in_a_warning(tmp_path: Path) -> None:
    """Preferred, not bound: when the node has no page left the other one's are taken, and the end
    of the migration tells."""
    pool = HugepagePool(HUGE, 1)
    journal = HugepageJournal(tmp_path / "journal")
    taking = journal.take(4, HUGE, node=0)
    policy = NumaPolicy(PolicyMode.PREFERRED, (1,))
    backend = MemoryBackend(Backing.HUGETLB, policy=policy)
    said = threading.Event()
    try:
        need(pool.state().free == 0, "huge pages left on node 1")
        with pair(ram_bytes=4 * MIB, backends={"toy.ram": backend}, ring_pages=0, smp=1) as (
            source,
            target,
        ):
            target.service.add_listener(
                lambda name, data: said.set() if name == "X_WARNING" else None
            )
            source.machine.start()
            target.service.migrate_incoming(f"unix:{tmp_path}/m")
            migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
            assert source.service.wait(120) == "completed", source.service.query()
            assert target.service.wait(120) == "completed", target.service.query()
            assert said.is_set()
            (text,) = target.figures["warnings"]
            assert "wants preferred:1 and has 4 MiB on node 0: 4 MiB on the wrong node" in text
            target.assert_sweep_clean()
    finally:
        journal.give_back(taking.id)
