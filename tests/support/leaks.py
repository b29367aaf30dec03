"""What a migration may leave behind: descriptors, threads, guest mappings, hugepages, files.

Take a :func:`snapshot` of a process before, and ask :func:`leaked` after. Memory that the C library
keeps for itself (heaps, cached thread stacks) is no leak and is told apart by what guest RAM alone
has: a name (memfd, file), or the flags of guest mappings (not dumped, not forked, registered with a
userfaultfd, hugetlb) in ``/proc/PID/smaps``, proc(5).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# VmFlags: dd not dumped, dc not forked, um/uw/ui userfaultfd (each mode), ht hugetlb.
_GUEST_FLAGS = frozenset({"dd", "dc", "um", "uw", "ui", "ht"})
_HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
# A joined thread's task disappears from /proc a moment after the join, and nothing tells when.
_SETTLE_S = 5.0
_POLL_S = 0.01


@dataclass(frozen=True)
class Snapshot:
    """One process at one moment; ``hugepages`` and ``files`` belong to the whole machine."""

    pid: int
    descriptors: Counter[str]  # by what they point to: socket, memfd:..., anon_inode:[userfaultfd]
    threads: dict[int, str]
    mappings: Counter[str]  # guest-like ones, "NAME LENGTH"
    children: dict[int, str]
    hugepages: dict[str, int]
    files: frozenset[str]


def snapshot(pid: int | None = None, *, prefixes: tuple[str, ...] = ("postcopy",)) -> Snapshot:
    """Look at a process (default: this one).

    :param prefixes: temporary files that count are those whose name begins with one of these, in
        the temporary folder and in /dev/shm.
    :raises ProcessLookupError: no such process.
    """
    pid = os.getpid() if pid is None else pid
    root = Path(f"/proc/{pid}")
    if not root.exists():
        raise ProcessLookupError(pid)
    return Snapshot(
        pid,
        Counter(_descriptors(root)),
        dict(_threads(root)),
        Counter(_guest_mappings(root)),
        dict(_children(root)),
        _hugepages(),
        frozenset(_files(prefixes)),
    )


def leaked(
    before: Snapshot, *, prefixes: tuple[str, ...] = ("postcopy",), settle_s: float = _SETTLE_S
) -> list[str]:
    """What the process of ``before`` has more than then, one line each; waits a little for ends."""
    deadline = time.monotonic() + settle_s
    while True:
        found = list(_more(before, snapshot(before.pid, prefixes=prefixes)))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S)


@contextmanager
def no_leaks(
    pid: int | None = None, *, prefixes: tuple[str, ...] = ("postcopy",)
) -> Iterator[None]:
    """Fail if the block leaves something behind in a process (default: this one)."""
    before = snapshot(pid, prefixes=prefixes)
    yield
    found = leaked(before, prefixes=prefixes)
    assert not found, "left behind:\n" + "\n".join(found)


def no_process_left(*pids: int) -> None:
    """Fail if one of these processes still runs (a zombie of ours counts: nobody waited for it)."""
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not left, f"still there: {[(pid, _name(Path(f'/proc/{pid}'))) for pid in left]}"


def _more(before: Snapshot, after: Snapshot) -> Iterator[str]:
    for what, count in (after.descriptors - before.descriptors).items():
        yield f"descriptor: {count} x {what}"
    for tid in after.threads.keys() - before.threads.keys():
        yield f"thread: {after.threads[tid]} ({tid})"
    for what, count in (after.mappings - before.mappings).items():
        yield f"mapping: {count} x {what}"
    for pid in after.children.keys() - before.children.keys():
        yield f"child: {after.children[pid]} ({pid})"
    for name, value in after.hugepages.items():
        if value != before.hugepages.get(name, value):
            yield f"2 MiB hugepages: {name} {before.hugepages[name]} -> {value}"
    for path in sorted(after.files - before.files):
        yield f"file: {path}"


def _descriptors(root: Path) -> Iterator[str]:
    for link in (root / "fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue  # the one that lists this folder
        if target.startswith("/proc/"):
            continue
        # Inode numbers of sockets and pipes differ from one to the next: count the kind.
        yield target.split(":", 1)[0] if target.startswith(("socket:", "pipe:")) else target


def _name(root: Path) -> str:
    try:
        return (root / "comm").read_text().strip()
    except OSError:
        return "?"


def _threads(root: Path) -> Iterator[tuple[int, str]]:
    for task in (root / "task").iterdir():
        yield int(task.name), _name(task)


def _children(root: Path) -> Iterator[tuple[int, str]]:
    for task in (root / "task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue  # the thread ended, or the kernel has no such file
        for pid in pids:
            yield int(pid), _name(Path(f"/proc/{pid}"))


def _guest_mappings(root: Path) -> Iterator[str]:
    name, length = "", 0
    for line in (root / "smaps").read_text(errors="replace").splitlines():
        first, _, rest = line.partition(" ")
        if first == "VmFlags:":
            is_named = name.startswith(("/memfd:", "/dev/hugepages", "anon_inode:"))
            if is_named or _GUEST_FLAGS & set(rest.split()):
                yield f"{name or 'anonymous'} {length:#x}"
        elif not first.endswith(":"):
            start, _, end = first.partition("-")
            length = int(end, 16) - int(start, 16)
            name = rest.split(maxsplit=4)[4] if len(rest.split(maxsplit=4)) > 4 else ""


def _hugepages() -> dict[str, int]:
    names = ("nr_hugepages", "free_hugepages", "resv_hugepages", "surplus_hugepages")
    return {n: int((_HUGEPAGES / n).read_text()) for n in names if (_HUGEPAGES / n).exists()}


def _files(prefixes: tuple[str, ...]) -> Iterator[str]:
    for folder in {tempfile.gettempdir(), "/dev/shm"}:
        if os.path.isdir(folder):
            for name in os.listdir(folder):
                if name.startswith(prefixes):
                    yield os.path.join(folder, name)
