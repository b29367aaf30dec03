"""NUMA policies and placement, as far as a host with one node can show them (two nodes: see
``make test-numa``)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from guestmem import Backing, GuestMemoryError, NumaPolicy, PolicyMode, RAMBlock, RAMList
from guestmem.numa import memory_nodes, policy_of
from guestmem.placement import placement_of, placements
from tests.support.guestmem_memory import KINDS, kind_of_memory
from tests.support.need import need

pytestmark = pytest.mark.kernel

NODE = memory_nodes()[0]


@pytest.fixture(autouse=True)
def numa() -> None:
    need(Path("/proc/self/numa_maps").exists(), "this kernel is built without NUMA")


@pytest.mark.parametrize("mode", [PolicyMode.BIND, PolicyMode.INTERLEAVE, PolicyMode.PREFERRED])
@pytest.mark.parametrize("name", KINDS)
def test_a_policy_is_kept_by_every_mapping(name: str, mode: PolicyMode, tmp_path: Path) -> None:
    wanted = NumaPolicy(mode, (NODE,))
    with kind_of_memory(name, tmp_path) as kind, kind.block(pages=2) as block:
        block.set_policy(wanted)
        assert policy_of(block.host) == wanted
        if block.is_shared:
            assert policy_of(block.add_alias().host) == wanted
        block.fill(0, block.used_length, 1)
        found = placement_of(block)
        assert found.policy == wanted
        assert found.bytes_by_node[NODE] == block.used_length
        assert (found.misplaced, found.problem) == (0, None)


def test_pages_that_do_not_exist_are_nowhere() -> None:
    with RAMBlock.allocate("ram", 1 << 20) as block:
        assert placement_of(block).bytes_by_node == {}
        block.write(0, b"x")
        assert placement_of(block).present == 4096
        assert placement_of(block).policy == NumaPolicy()


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(GuestMemoryError, match=r"bind:1000.*memory on node 0"):
        RAMBlock.allocate("ram", 1 << 20, policy=NumaPolicy(PolicyMode.BIND, (1000,)))


def test_default_takes_the_policy_away_again() -> None:
    bound = NumaPolicy(PolicyMode.BIND, (NODE,))
    with RAMBlock.allocate("ram", 1 << 20, backing=Backing.MEMFD, policy=bound) as block:
        block.set_policy(NumaPolicy())
        assert policy_of(block.host) == NumaPolicy()


def test_every_block_has_its_own_pages() -> None:
    """However many there are, in whatever order they lie; and none."""
    assert placements(RAMList()) == []
    with ExitStack() as stack:
        blocks = [stack.enter_context(RAMBlock.allocate(f"b{n}", 16 << 12)) for n in range(5)]
        for count, block in enumerate(blocks):
            block.fill(0, count << 12, 1)
        present = [each.present for each in placements(RAMList(reversed(blocks)))]
    assert present == [count << 12 for count in reversed(range(5))]
