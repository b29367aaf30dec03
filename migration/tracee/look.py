"""What a live process's memory is made of, and who watches it. Reads /proc, stops nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uffd import Feature

from .mappings import ProcessMapping, mappings
from .memory import userfaultfds

_WAITS_FOR_PAGE = "handle_userfault"


@dataclass(frozen=True, slots=True)
class Context:
    """A userfaultfd that the process holds.

    :ivar features: enabled ones; ``None``: its handshake has not been done.
    :ivar pending: messages nobody has read. :ivar total: these and the ones not yet answered.
    """

    fd: int
    features: Feature | None
    pending: int
    total: int


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One look at a process.

    :ivar waiting: threads asleep on a missing or protected page, as (tid, name).
    """

    pid: int
    name: str
    thread_count: int
    mappings: tuple[ProcessMapping, ...]
    contexts: tuple[Context, ...]
    waiting: tuple[tuple[int, str], ...]

    @property
    def registered(self) -> tuple[ProcessMapping, ...]:
        """Mappings that a userfaultfd watches, whoever holds it."""
        return tuple(m for m in self.mappings if m.uffd_modes)


def look(pid: int) -> ProcessView:
    """:raises TraceeGone: no such process. :raises TraceeError: it is somebody else's."""
    maps = mappings(pid)
    process = Path(f"/proc/{pid}")
    tasks = sorted(int(task.name) for task in (process / "task").iterdir())
    waiting = [
        tid for tid in tasks if _read(process / "task" / str(tid) / "wchan") == _WAITS_FOR_PAGE
    ]
    return ProcessView(
        pid=pid,
        name=_read(process / "comm"),
        thread_count=len(tasks),
        mappings=tuple(maps),
        contexts=tuple(_context(process, fd) for fd in userfaultfds(pid)),
        waiting=tuple((tid, _read(process / "task" / str(tid) / "comm")) for tid in waiting),
    )


def _context(process: Path, fd: int) -> Context:
    pairs = (line.partition(":") for line in _read(process / "fdinfo" / str(fd)).splitlines())
    fields = {name: value.strip() for name, _, value in pairs}
    _, _, rest = fields.get("API", "").partition(":")
    features = int(rest.partition(":")[0] or "0", 16)
    return Context(
        fd=fd,
        features=_without_internal(features) if features else None,
        pending=int(fields.get("pending", "0")),
        total=int(fields.get("total", "0")),
    )


def _without_internal(features: int) -> Feature:
    # The kernel shows a bit of its own: the handshake is done.
    return Feature(features & ~(1 << 31))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
