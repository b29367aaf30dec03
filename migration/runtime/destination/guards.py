"""Has this host the memory for a guest? Asked before ADVISE does anything, while the guest is safe
at its source.

A destination that runs out of memory later is killed with the only running copy of the guest, or
pauses for ever; a refusal costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from guestmem import HugepagesShort, NumaPolicy, RAMBlock, RAMList
from guestmem.cgroups import memory_limit
from guestmem.geometry import size_option
from guestmem.shortage import explain_shortage, nodes_short

from ..errors import MigrationError

_MARGIN_BYTES = 32 << 20
"""What the process itself, page tables and buffers take besides."""
_SWITCH = "set x-memory-guard off to try it nevertheless"


@dataclass(frozen=True)
class Need:
    """What the RAM to come takes from where.

    :ivar small: bytes of ordinary memory not there yet. :ivar huge: blocks whose huge pages are
        neither promised nor there.
    """

    small: int
    huge: tuple[RAMBlock, ...]


def need_of(ram: RAMList, populated: int | None) -> Need:
    """:param populated: how much of all RAM holds something at the source; ``None``: not known, so
    all of it counts."""
    small = sum(block.placed_length for block in ram if not block.is_hugetlb)
    if populated is not None:
        small = min(small, populated)
    huge = tuple(
        block
        for block in ram
        if block.is_hugetlb and (not block.is_reserved or block.policy is not None)
    )
    return Need(small, huge)


def check_memory(ram: RAMList, populated: int | None) -> None:
    """Before ADVISE, with RAM emptied.

    :param populated: see :func:`need_of`.
    :raises MigrationError: with the numbers, and what to try.
    """
    need = need_of(ram, populated)
    if need.small:
        _check_host(need.small, is_known=populated is not None)
        _check_cgroup(need.small)
    _check_pools(need.huge)


def _check_pools(blocks: tuple[RAMBlock, ...]) -> None:
    """Blocks that take from the same pages are counted together."""
    unpromised: dict[int, list[RAMBlock]] = {}
    bound: dict[tuple[int, NumaPolicy], list[RAMBlock]] = {}
    for block in blocks:
        if not block.is_reserved:
            unpromised.setdefault(block.page_size, []).append(block)
        if block.policy is not None:
            bound.setdefault((block.page_size, block.policy), []).append(block)
    for page_size, group in unpromised.items():
        _refuse(explain_shortage(_names(group), page_size, _length(group)))
    for (page_size, policy), group in bound.items():
        _refuse(nodes_short(_names(group), page_size, _length(group), policy))


def _refuse(short: HugepagesShort | None) -> None:
    if short is not None:
        raise MigrationError(f"{short}, or {_SWITCH}")


def _names(blocks: list[RAMBlock]) -> str:
    names = ", ".join(repr(block.idstr) for block in blocks)
    return f"RAM of blocks {names}" if len(blocks) > 1 else f"RAM block {names}"


def _length(blocks: list[RAMBlock]) -> int:
    return sum(block.placed_length for block in blocks)


def _check_host(needed: int, *, is_known: bool) -> None:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    room = int(memory.available) + int(swap.free)
    if needed + _MARGIN_BYTES <= room:
        return
    of_what = "hold something" if is_known else "may be filled"
    raise MigrationError(
        f"this host has not enough memory: {_mib(needed)} of guest RAM {of_what}, "
        f"{_mib(int(memory.available))} of {_mib(int(memory.total))} are available and "
        f"{_mib(int(swap.free))} of swap are free; end something here, take a host with "
        f"{_mib(needed + _MARGIN_BYTES - room)} more, add swap, or {_SWITCH}"
    )


def _check_cgroup(needed: int) -> None:
    limit = memory_limit()
    if limit is None or needed + _MARGIN_BYTES <= limit.left:
        return
    more = needed + _MARGIN_BYTES - limit.left
    raise MigrationError(
        f"this process may not take enough memory: {_mib(needed)} of guest RAM are to come, "
        f"cgroup {limit.group} allows {_mib(limit.maximum)} ({limit.file}) and "
        f"{_mib(limit.used)} are used; raise {limit.file} by {size_option(_up_to_mib(more))}, "
        f"start the destination in another group, or {_SWITCH}"
    )


def _up_to_mib(length: int) -> int:
    return -(-length // (1 << 20)) << 20


def _mib(length: int) -> str:
    return f"{length >> 20} MiB"
