"""Huge pages: the pools of hugetlb, in all and per NUMA node, and the transparent ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from guestmem.geometry import THP_BYTES, format_size, size_option
from guestmem.pools import HugepagePool, nodes, page_sizes
from uffd import Advice, Mapping, UffdError, touch

from .. import facts
from ..attempt import MARK, Answer, Unexpected, answer_for, expect, open_context
from ..kinds import ANON_THP, Kind, fill_pool, hugetlb_kinds, is_huge, no_pool
from ..row import Cause, Check, Outcome, Status, Tier, no, yes
from . import operations

_POOLS, _THP = "pools", "thp"
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


def pool(kind: Kind) -> Outcome:
    """A page is taken out of the pool by mapping it, and given back."""
    size = kind.page_size
    if not HugepagePool(size).exists:
        return no_pool(size)
    state = HugepagePool(size).state()
    try:
        kind.map(fill=False)
    except Answer as answer:
        if answer.outcome.status is not Status.UNTESTED:
            return answer.outcome
        counts = f"{state.total} pages, {state.free} free, {state.reserved} promised"
        return no(Cause.RESOURCE, counts, fill_pool(size))
    return yes(f"{state.available} of {state.total} to be had")


def pool_of_node(page_size: int, node: int) -> Outcome:
    """What lies on one node: guest RAM bound to it can have no other."""
    found = HugepagePool(page_size, node)
    state = found.state()
    if state.free:
        return yes(f"{state.free} of {state.total} free")
    counts = f"{state.total} pages, {state.free} free"
    return no(Cause.RESOURCE, counts, fill_pool(page_size, node))


def thp() -> Outcome:
    """Advise 2 MiB of anonymous memory, touch one byte, look whether 2 MiB came."""
    region = ANON_THP.map()
    touch.store(region.address, MARK)
    setting = facts.chosen(facts.text_of(_SETTINGS / "enabled"))
    defrag = facts.chosen(facts.text_of(_SETTINGS / "defrag"))
    if is_huge(region):
        return yes(f"enabled={setting}, defrag={defrag}")
    return _no_thp("enabled", setting, "madvise")


def thp_shmem() -> Outcome:
    """The same in a memory file."""
    region = Mapping.memfd(2 * THP_BYTES)
    start = -(-region.address // THP_BYTES) * THP_BYTES
    # Huge pages form where address and file offset agree; the kernel aligns most new mappings so.
    inside = Mapping(start, THP_BYTES, page_size=region.page_size, fd=None, is_shared=True)
    setting = facts.chosen(facts.text_of(_SETTINGS / "shmem_enabled"))
    try:
        inside.advise(Advice.HUGEPAGE)
    except UffdError:
        return no(Cause.KERNEL, "no transparent huge pages for files in this kernel", None)
    touch.store(inside.address, MARK)
    return yes(f"shmem_enabled={setting}") if is_huge(inside) else _no_thp("shmem_enabled", setting)


def _no_thp(name: str, setting: str, wanted: str = "advise") -> Outcome:
    if setting in ("never", "deny"):
        command = f"echo {wanted} > {_SETTINGS}/{name} (as root)"
        return no(Cause.SETTING, f"{name}={setting}", command)
    return no(Cause.RESOURCE, f"{name}={setting}, but only small pages came", "free some memory")


def mthp(setting: str) -> Outcome:
    """Which sizes below 2 MiB may come, as the administrator set them."""
    sizes = {}
    for entry in _SETTINGS.glob("hugepages-*kB"):
        match = re.fullmatch(r"hugepages-(\d+)kB", entry.name)
        value = facts.chosen(facts.text_of(entry / setting))
        if match and value and int(match[1]) << 10 < THP_BYTES:
            sizes[int(match[1]) << 10] = value
    since = "6.8" if setting == "enabled" else "6.11"
    if not sizes:
        return no(Cause.KERNEL, "no sizes between 4 KiB and 2 MiB here", f"Linux {since} or newer")
    on = {size: value for size, value in sorted(sizes.items()) if value != "never"}
    if on:
        return yes(", ".join(f"{size_option(size)} {value}" for size, value in on.items()))
    example = _SETTINGS / "hugepages-64kB" / setting
    wanted = "madvise" if setting == "enabled" else "advise"
    return no(
        Cause.SETTING,
        "never, for all of " + ", ".join(size_option(size) for size in sorted(sizes)),
        f"echo {wanted} > {example} (as root)",
    )


def collapse() -> Outcome:
    """After postcopy: small pages that were placed one by one become a huge one again."""
    try:
        return _collapse()
    except (Answer, Unexpected, UffdError) as error:
        return answer_for(error, "6.1")


def _collapse() -> Outcome:
    region, uffd = ANON_THP.map(), open_context()
    uffd.register(region)
    operations.place(uffd, region.address, region.length)
    expect(not is_huge(region), "COPY placed a huge page")
    region.advise(Advice.COLLAPSE)
    expect(is_huge(region), "MADV_COLLAPSE left small pages")
    return yes("512 placed pages became one")


def pool_checks() -> list[Check]:
    """The rows about pools."""
    found = []
    for kind in (kind for kind in hugetlb_kinds() if kind.is_shared):
        size = kind.page_size
        found.append(_pool_check(f"hugepages-{size_option(size)}", size, partial(pool, kind)))
        if size in page_sizes():
            found += [
                _pool_check(
                    f"hugepages-{size_option(size)}-node{node}",
                    size,
                    partial(pool_of_node, size, node),
                    f", node {node}",
                )
                for node in nodes()
            ]
    return found


def _pool_check(name: str, size: int, run: Callable[[], Outcome], where: str = "") -> Check:
    title = f"pool of {format_size(size)} pages{where}"
    return Check(name, title, Tier.HUGEPAGES, _POOLS, run, lock=f"hugetlb-{size}")


def thp_checks() -> list[Check]:
    """The rows about transparent huge pages."""
    optional = Tier.OPTIONAL
    return [
        Check("thp", "transparent huge pages", optional, _THP, thp, "2.6.38"),
        Check("thp-shmem", "transparent huge pages, shared", optional, _THP, thp_shmem, "4.8"),
        Check("mthp", "sizes between, anonymous", optional, _THP, partial(mthp, "enabled"), "6.8"),
        Check(
            "mthp-shmem",
            "sizes between, shared",
            optional,
            _THP,
            partial(mthp, "shmem_enabled"),
            "6.11",
        ),
        Check("collapse", "MADV_COLLAPSE of placed pages", optional, _THP, collapse, "6.1"),
    ]
