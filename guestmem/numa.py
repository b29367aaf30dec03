"""NUMA policies: which nodes a stretch of memory may, or should, take its pages from."""

import enum
import errno
import re
from dataclasses import dataclass
from pathlib import Path

from guestmem._native import ffi, lib
from guestmem.errors import GuestMemoryError

_NODES = Path("/sys/devices/system/node")


class PolicyMode(enum.Enum):
    """QEMU's names (``policy=`` of a memory backend)."""

    DEFAULT = "default"
    PREFERRED = "preferred"
    BIND = "bind"
    INTERLEAVE = "interleave"


_NUMBERS = {
    PolicyMode.DEFAULT: lib.NUMA_DEFAULT,
    PolicyMode.PREFERRED: lib.NUMA_PREFERRED,
    PolicyMode.BIND: lib.NUMA_BIND,
    PolicyMode.INTERLEAVE: lib.NUMA_INTERLEAVE,
}


@dataclass(frozen=True)
class NumaPolicy:
    """Where pages are to come from.

    :ivar nodes: sorted node numbers; none for ``default``, at least one otherwise.

    ``bind``: these nodes and no others (a shortage there is an error though others have memory);
    ``preferred``: the first of them while it has any; ``interleave``: turn by turn.
    """

    mode: PolicyMode = PolicyMode.DEFAULT
    nodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.mode is PolicyMode.DEFAULT) != (not self.nodes):
            raise ValueError(
                f"policy {self.mode.value} with nodes {format_nodes(self.nodes) or 'none'}: "
                "'default' takes none, every other policy at least one"
            )
        if any(not 0 <= node < lib.NUMA_MAX_NODES for node in self.nodes):
            raise ValueError(f"nodes {self.nodes}: numbers from 0 to {lib.NUMA_MAX_NODES - 1}")

    def __str__(self) -> str:
        nodes = format_nodes(self.nodes)
        return f"{self.mode.value}:{nodes}" if nodes else self.mode.value

    def apply(self, start: int, length: int, what: str) -> None:
        """Give the policy to a mapped range; pages that are there already move.

        Shared memory keeps it with the file, so every mapping of it follows. Takes no memory.

        :param what: names the block in errors.
        :raises GuestMemoryError: ``EINVAL`` no such node, or one without memory; ``EIO`` a page
            that is there cannot move; ``ENOSYS`` a kernel without NUMA.
        """
        words = ffi.new(f"uint64_t[{lib.NUMA_MAX_NODES // 64}]")
        for node in self.nodes:
            words[node // 64] |= 1 << node % 64
        result = lib.numa_set_policy(start, length, _NUMBERS[self.mode], words)
        if result == -errno.EINVAL:
            raise GuestMemoryError(
                errno.EINVAL,
                f"{what}: policy {self}",
                remedy=f"this host has memory on node {format_nodes(memory_nodes())}",
            )
        if result < 0:
            raise GuestMemoryError(-result, f"{what}: policy {self}")


def policy_of(address: int) -> NumaPolicy:
    """The policy of the mapping at an address of ours.

    :raises GuestMemoryError: nothing is mapped there, or it is of a kind not known here.
    """
    mode = ffi.new("int32_t *")
    words = ffi.new(f"uint64_t[{lib.NUMA_MAX_NODES // 64}]")
    result = lib.numa_get_policy(address, mode, words)
    if result < 0:
        raise GuestMemoryError(-result, f"policy of {address:#x}")
    kinds = {number: kind for kind, number in _NUMBERS.items()}
    if mode[0] not in kinds:
        raise GuestMemoryError(errno.ENOTSUP, f"policy {mode[0]} of {address:#x}")
    kind = kinds[mode[0]]
    nodes = [node for node in range(lib.NUMA_MAX_NODES) if words[node // 64] >> node % 64 & 1]
    return NumaPolicy(kind, () if kind is PolicyMode.DEFAULT else tuple(nodes))


def parse_nodes(text: str) -> tuple[int, ...]:
    """``0``, ``0-1``, ``0,2-3``: the kernel's and QEMU's lists of nodes, sorted.

    :raises ValueError: not such a list.
    """
    found: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r} is not a list of nodes: write 0, 0-1 or 0,2")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def format_nodes(nodes: tuple[int, ...]) -> str:
    """The shortest list :func:`parse_nodes` reads back: ``0-1,3``."""
    parts: list[list[int]] = []
    for node in sorted(nodes):
        if parts and parts[-1][-1] == node - 1:
            parts[-1].append(node)
        else:
            parts.append([node])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in parts)


def memory_nodes() -> tuple[int, ...]:
    """Nodes of this host that have memory; node 0 alone on a kernel without NUMA."""
    try:
        return parse_nodes((_NODES / "has_memory").read_text())
    except (OSError, ValueError):
        return (0,)
