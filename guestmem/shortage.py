"""Why huge pages were not to be had: the pool, a node's share of it, or a cgroup's limit.

The kernel's own answers mislead: ``ENOMEM`` from mmap(2) for all three, SIGBUS at a touch, and
``EEXIST`` from ``UFFDIO_COPY`` when the pool is empty.
"""

from guestmem.cgroups import Limit, hugetlb_limit
from guestmem.errors import HugepagesShort
from guestmem.geometry import format_size, size_option
from guestmem.numa import NumaPolicy, PolicyMode
from guestmem.pools import HugepagePool


def explain_shortage(
    what: str, page_size: int, length: int, policy: NumaPolicy | None = None
) -> HugepagesShort | None:
    """The error that explains why ``length`` bytes more were refused; ``None`` if nothing does.

    :param what: names the block in the error. :param policy: the nodes the pages must come from.
    """
    needed = -(-length // page_size)
    limit = hugetlb_limit(page_size)
    if limit is not None and limit.left < length:
        return _by_cgroup(what, page_size, needed, limit)
    if (short := nodes_short(what, page_size, length, policy)) is not None:
        return short
    pool = HugepagePool(page_size)
    if not pool.exists:
        return None
    state = pool.state()
    if state.obtainable >= needed:
        return None
    return HugepagesShort(
        what,
        page_size=page_size,
        pages_needed=needed,
        pages_free=state.available,
        surplus_room=state.obtainable - state.available,
    )


def nodes_short(
    what: str, page_size: int, length: int, policy: NumaPolicy | None
) -> HugepagesShort | None:
    """The nodes that ``length`` bytes are bound to have too few free pages; ``None``: they have, or
    there is no such policy. A promise does not help: it is the whole system's, of no node's.
    """
    if policy is None or policy.mode is not PolicyMode.BIND:
        return None
    return _on_nodes(what, page_size, -(-length // page_size), policy.nodes)


def _on_nodes(
    what: str, page_size: int, needed: int, nodes: tuple[int, ...]
) -> HugepagesShort | None:
    pools = [HugepagePool(page_size, node) for node in nodes]
    free = sum(pool.state().free for pool in pools if pool.exists)
    if free >= needed:
        return None
    return HugepagesShort(
        what, page_size=page_size, pages_needed=needed, pages_free=free, nodes=nodes
    )


def _by_cgroup(what: str, page_size: int, needed: int, limit: Limit) -> HugepagesShort:
    return HugepagesShort(
        what,
        page_size=page_size,
        pages_needed=needed,
        pages_free=limit.left // page_size,
        reason=f"cgroup {limit.group} allows {format_size(limit.maximum)} ({limit.file}), "
        f"{format_size(limit.used)} are used",
        remedy=f"raise {limit.group}/{limit.file} by "
        f"{size_option(needed * page_size - limit.left)}, or leave the group",
    )
