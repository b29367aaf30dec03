"""What the control groups of this process still allow: memory, and huge pages.

Version 2 (``memory.max``, ``hugetlb.2MB.max``) and version 1 (``memory.limit_in_bytes``,
``hugetlb.2MB.limit_in_bytes``), whichever has the controller. Every group up to the root counts.

Source: kernel ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/{memory,hugetlb}.rst``.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestmem.geometry import size_option

# Version 1 says "no limit" with the largest number of whole pages.
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Limit:
    """The tightest limit found.

    :ivar group: the directory that has it. :ivar file: name of the file there that says so.
    :ivar maximum, used: bytes.
    """

    group: Path
    file: str
    maximum: int
    used: int

    @property
    def left(self) -> int:
        """Bytes that may still be had."""
        return max(0, self.maximum - self.used)


def memory_limit() -> Limit | None:
    """The group with the least memory left; ``None`` without any limit.

    Inactive file pages do not count as used: the kernel drops them first.
    """
    found = [
        *_limits("memory", v1=False, names=("memory.max", "memory.current")),
        *_limits("memory", v1=True, names=("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ]
    return min((_without_cache(limit) for limit in found), key=lambda each: each.left, default=None)


def hugetlb_limit(page_size: int) -> Limit | None:
    """The group with the fewest huge pages left, for use or for promising them; ``None``: none."""
    size = _size_name(page_size)
    found: list[Limit] = []
    for kind in ("", "rsvd."):
        stem = f"hugetlb.{size}.{kind}"
        found += _limits("hugetlb", v1=False, names=(f"{stem}max", f"{stem}current"))
        found += _limits(
            "hugetlb", v1=True, names=(f"{stem}limit_in_bytes", f"{stem}usage_in_bytes")
        )
    return min(found, key=lambda each: each.left, default=None)


def _size_name(page_size: int) -> str:
    """``2MB``, ``1GB``: as the controller spells it."""
    return f"{size_option(page_size)}B"


def _limits(controller: str, *, v1: bool, names: tuple[str, str]) -> Iterator[Limit]:
    for group in _groups(controller, v1=v1):
        # A group may go, and the root has no limits.
        with contextlib.suppress(OSError, ValueError):
            text = (group / names[0]).read_text().strip()
            maximum = _UNLIMITED if text == "max" else int(text)
            if maximum < _UNLIMITED:
                yield Limit(group, names[0], maximum, int((group / names[1]).read_text()))


def _without_cache(limit: Limit) -> Limit:
    key = "total_inactive_file" if limit.file == "memory.limit_in_bytes" else "inactive_file"
    with contextlib.suppress(OSError, ValueError):
        for line in (limit.group / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return Limit(
                    limit.group, limit.file, limit.maximum, max(0, limit.used - int(value))
                )
    return limit


def _groups(controller: str, *, v1: bool) -> Iterator[Path]:
    """This process's group in that hierarchy, then its parents up to the mount."""
    path = _membership(controller, v1=v1)
    if path is None:
        return
    for mount, root in _mounts(controller, v1=v1):
        if path != root and not path.startswith(root.rstrip("/") + "/"):
            continue
        inside = path[len(root) :].strip("/")
        group = mount / inside
        while True:
            yield group
            if group == mount:
                return
            group = group.parent


def _membership(controller: str, *, v1: bool) -> str | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controller in controllers.split(",")) if v1 else (number == "0" and not controllers):
            return path
    return None


def _mounts(controller: str, *, v1: bool) -> Iterator[tuple[Path, str]]:
    """Where the hierarchy is mounted, and which of its groups the mount shows as its root."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        fields = before.split()
        is_ours = (
            kind == "cgroup" and controller in options.split()[-1].split(",")
            if v1
            else kind == "cgroup2"
        )
        if is_ours:
            yield Path(fields[4]), fields[3]
