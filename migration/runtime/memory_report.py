"""What guest RAM is made of and where it lies: ``query-memdev``, and warnings for people.

Source: QEMU ``qapi/machine.json`` (Memdev).
"""

from __future__ import annotations

from collections.abc import Iterator

from guestmem import GuestMemoryError, RAMBlock, RAMList
from guestmem.geometry import format_size
from guestmem.placement import Placement, placements

STALL_BYTES = 64 << 20
"""Host pages this large or larger are worth a warning."""
NOMINAL_BANDWIDTH = 1_000_000_000


def memdevs(ram: RAMList) -> list[dict[str, object]]:
    """One entry for each block: QEMU's members, and ours under ``x-``.

    Walks the page tables of all of RAM, touches no page.
    """
    return [
        _memdev(block, placement) for block, placement in zip(ram, placements(ram), strict=True)
    ]


def _memdev(block: RAMBlock, placement: Placement) -> dict[str, object]:
    return {
        "id": block.idstr,
        "size": block.used_length,
        "merge": False,
        "dump": False,
        "prealloc": block.was_preallocated,
        "share": block.is_shared,
        # What QEMU means by it: room in the host is set aside. Only huge pages have that here.
        "reserve": block.is_hugetlb and block.is_reserved,
        "host-nodes": list(placement.policy.nodes),
        "policy": placement.policy.mode.value,
        "x-backing": block.backing.value,
        "x-page-size": block.page_size,
        "x-bytes-by-node": placement.as_json()["bytes-by-node"],
        "x-misplaced": placement.misplaced,
    }


def misplaced(ram: RAMList) -> list[str]:
    """A sentence for each block with a policy whose pages are elsewhere. Empty where nothing has
    a policy: then nothing is looked at."""
    if all(block.policy is None for block in ram):
        return []
    try:
        found = placements(ram)
    except (GuestMemoryError, OSError):
        return []
    return [placement.problem for placement in found if placement.problem is not None]


def stalls(ram: RAMList, bandwidth: int = 0) -> Iterator[str]:
    """A sentence for each page size that makes a fault wait noticeably: the whole page travels.

    :param bandwidth: bytes per second; 0: not known, 1 GB/s is assumed and said.
    """
    sizes: dict[int, list[str]] = {}
    for block in ram:
        if block.page_size >= STALL_BYTES:
            sizes.setdefault(block.page_size, []).append(block.idstr)
    rate = bandwidth or NOMINAL_BANDWIDTH
    for size, names in sorted(sizes.items()):
        yield (
            f"RAM block {', '.join(names)} has pages of {format_size(size)}: in postcopy the first "
            f"touch of each stops a vCPU until all of it has come, about {size / rate:.2g} s at "
            f"{rate / 1e9:.2g} GB/s; pages of 2 MiB stall {size >> 21} times shorter"
        )
