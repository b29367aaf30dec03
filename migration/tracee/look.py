"""What a live process's memory is made of, and who watches it. Reads /proc, stops nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from uffd import Feature, UffdError
from uffd.opening import features_in, read_fdinfo

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
        contexts=tuple(_contexts(pid)),
        waiting=tuple((tid, _read(process / "task" / str(tid) / "comm")) for tid in waiting),
    )


def _contexts(pid: int) -> Iterator[Context]:
    for fd in userfaultfds(pid):
        try:
            fields = read_fdinfo(fd, pid)
            yield Context(
                fd, features_in(fields), int(fields.get("pending", 0)), int(fields.get("total", 0))
            )
        except UffdError:
            continue  # closed meanwhile


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
