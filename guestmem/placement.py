"""Which NUMA nodes a block's pages are on, as ``/proc/self/numa_maps`` tells.

Source: kernel ``Documentation/filesystems/proc.rst`` (numa_maps counts in kernel pages of the
mapping, ``kernelpagesize_kB``).
"""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from guestmem.geometry import format_size
from guestmem.numa import NumaPolicy, PolicyMode, format_nodes, policy_of
from guestmem.ramblock import RAMBlock
from guestmem.ramlist import RAMList

_ON_NODE = re.compile(r"N(\d+)=(\d+)")
_PAGE_KIB = re.compile(r"kernelpagesize_kB=(\d+)")
_UNEVEN = 0.25


@dataclass(frozen=True)
class Placement:
    """Where one block's pages are.

    :ivar bytes_by_node: bytes present on each node; pages mapped nowhere here are not counted.
    """

    idstr: str
    policy: NumaPolicy
    bytes_by_node: dict[int, int]

    @property
    def present(self) -> int:
        """Bytes, of all nodes."""
        return sum(self.bytes_by_node.values())

    @property
    def misplaced(self) -> int:
        """Bytes on a node the policy does not name; 0 without a policy."""
        if self.policy.mode is PolicyMode.DEFAULT:
            return 0
        return sum(size for node, size in self.bytes_by_node.items() if node not in self._wanted)

    @property
    def _wanted(self) -> tuple[int, ...]:
        nodes = self.policy.nodes
        return nodes[:1] if self.policy.mode is PolicyMode.PREFERRED else nodes

    @property
    def problem(self) -> str | None:
        """A sentence when pages are not where the policy wants them, with what to try."""
        where = ", ".join(
            f"{format_size(size)} on node {node}"
            for node, size in sorted(self.bytes_by_node.items())
        )
        if self.misplaced:
            return (
                f"RAM block {self.idstr!r} wants {self.policy} and has {where}: "
                f"{format_size(self.misplaced)} on the wrong node; free memory on node "
                f"{format_nodes(self._wanted)} (huge pages: reserve them there with --node), or "
                "use prealloc=on to learn of it at the start"
            )
        if self.policy.mode is PolicyMode.INTERLEAVE and self.present and self._is_uneven():
            return f"RAM block {self.idstr!r} wants {self.policy} and has {where}: unevenly spread"
        return None

    def _is_uneven(self) -> bool:
        fair = self.present / len(self.policy.nodes)
        sizes = [self.bytes_by_node.get(node, 0) for node in self.policy.nodes]
        # One page more here than there is no news.
        return max(sizes) - min(sizes) > max(_UNEVEN * fair, 2 << 20)

    def as_json(self) -> dict[str, object]:
        """``policy``, ``host-nodes``, ``bytes-by-node`` (keys are text) and ``misplaced``."""
        return {
            "policy": self.policy.mode.value,
            "host-nodes": list(self.policy.nodes),
            "bytes-by-node": {str(node): size for node, size in sorted(self.bytes_by_node.items())},
            "misplaced": self.misplaced,
        }


def placement_of(block: RAMBlock) -> Placement:
    """Look at the page tables of the block's first mapping; touches no page.

    :raises GuestMemoryError: the policy cannot be read.
    """
    return _placements([block])[0]


def placements(ram: RAMList) -> list[Placement]:
    """Of every block, with one look. The kernel walks the tables of the whole process."""
    return _placements(list(ram))


def _placements(blocks: list[RAMBlock]) -> list[Placement]:
    found: dict[str, Counter[int]] = {block.idstr: Counter() for block in blocks}
    by_host = sorted(blocks, key=lambda block: block.host)
    hosts = [block.host for block in by_host]
    for address, line in _lines():
        # There may be ten thousand of each.
        index = bisect_right(hosts, address) - 1
        if index >= 0 and address < hosts[index] + by_host[index].max_length:
            found[by_host[index].idstr].update(_by_node(line))
    return [
        Placement(block.idstr, policy_of(block.host), dict(found[block.idstr])) for block in blocks
    ]


def _lines() -> list[tuple[int, str]]:
    try:
        text = Path("/proc/self/numa_maps").read_text()
    except FileNotFoundError:  # a kernel without NUMA: nothing can be misplaced
        return []
    return [(int(line.split(" ", 1)[0], 16), line) for line in text.splitlines()]


def _by_node(line: str) -> dict[int, int]:
    size = _PAGE_KIB.search(line)
    unit = int(size[1]) << 10 if size else 0
    return {int(node): int(pages) * unit for node, pages in _ON_NODE.findall(line)}
