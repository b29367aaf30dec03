"""Taking huge pages into the kernel's pools and giving back exactly what was taken.

A pool is a number that anybody may change, so "put it back to what it was" would undo others'
changes. Instead each taking is written to a journal before the pool grows, and giving back
shrinks the pool by what that taking added. The journal outlives a crash of the process; it does
not outlive a reboot, and neither do the pages: entries of an earlier boot are dropped.

The kernel has no "add N": growing is read, then write. All who use a journal are kept apart by a
lock of the machine's, whatever directory theirs is in; someone else writing ``nr_hugepages`` in
between is not.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestmem.errors import GuestMemoryError
from guestmem.geometry import format_size
from guestmem.pools import HugepagePool

_JOURNAL = "postcopy-hugepages.json"
_LOCK = "postcopy-hugepages.lock"
# Pools are the machine's, journals may be many. Not on the pool's own file: anyone could lock that.
_POOLS_LOCK = Path("/run/postcopy-hugepages-pools.lock")


@dataclass(frozen=True)
class Taking:
    """One entry of the journal.

    :ivar before: pages of that kind in the pool just before. :ivar wanted: pages asked for.
    :ivar taken: pages the pool grew by; ``None`` while the kernel was being asked.
    :ivar giving_from: pages of that kind in the pool just before giving back began, else ``None``.
    :ivar is_surplus: not pages, but the right to make so many more beyond the pool on demand
        (overcommit).
    :ivar owner: process that gives the pages back by itself: ``[pid, start time]``, or ``None``.
    """

    id: int
    page_size: int
    node: int | None
    before: int
    wanted: int
    taken: int | None
    boot: str
    owner: tuple[int, int] | None = None
    is_surplus: bool = False
    giving_from: int | None = None

    @property
    def pool(self) -> HugepagePool:
        """The pool it grew."""
        return HugepagePool(self.page_size, self.node)

    @property
    def owner_is_alive(self) -> bool:
        """Does the process that promised to give back still run?"""
        return self.owner is not None and _start_time(self.owner[0]) == self.owner[1]


def default_directory() -> Path:
    """``/run`` where we may write, else ``$XDG_RUNTIME_DIR``: both end with the boot.

    :raises GuestMemoryError: neither is there.
    """
    for path in _default_directories():
        if os.access(path, os.W_OK | os.X_OK):
            return path
    raise GuestMemoryError(
        errno.EACCES,
        "no directory for the huge page journal",
        remedy="run as root, or name one: --journal DIRECTORY",
    )


def noted(directory: Path | None = None) -> list[Taking]:
    """What is taken, for whoever may only look: nothing is made, no lock is waited for.

    :param directory: that journal; all default ones unless told.
    """
    places = _default_directories() if directory is None else [directory]
    return [entry for place in places for entry in _load(place)]


def _default_directories() -> list[Path]:
    return [Path(name) for name in ("/run", os.environ.get("XDG_RUNTIME_DIR")) if name]


class HugepageJournal:
    """The journal in one directory. Every method takes its lock, and waits for it."""

    def __init__(self, directory: Path | None = None) -> None:
        """:param directory: made if missing; :func:`default_directory` unless told."""
        self.directory = directory or default_directory()
        self.directory.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[Taking]:
        """What is taken and not given back, oldest first; takings cut short by a crash settled."""
        with self._locked():
            return _load(self.directory)

    def take(
        self,
        pages: int,
        page_size: int,
        *,
        node: int | None = None,
        owned: bool = False,
        owner_pid: int | None = None,
        surplus: bool = False,
    ) -> Taking:
        """Grow a pool by ``pages``.

        :param surplus: not now: allow the kernel to make so many more when somebody needs them,
            from memory that is free then. Of the whole system, not of a node.
        :param owned: this process gives back itself; until it ends, others leave the entry alone.
        :param owner_pid: that process does.
        :raises ValueError: ``pages`` < 1, or surplus of a node.
        :raises GuestMemoryError: no such pool (``ENODEV``), not allowed (``EACCES``), more than
            the host can spare (refused before the kernel is asked, which would push everybody
            else out of memory), or the kernel found fewer pages (``ENOMEM`` both): then what it
            found is given back already.
        """
        if pages < 1:
            raise ValueError(f"cannot take {pages} huge pages")
        if surplus and node is not None:
            raise ValueError("surplus pages are made wherever there is room: name no node")
        pool = HugepagePool(page_size, node)
        if not pool.exists:
            raise GuestMemoryError(errno.ENODEV, f"there is no {_name(pool)}")
        if not surplus:
            _check_spare_memory(pool, pages)
        with self._locked():
            return self._take(pool, pages, os.getpid() if owned else owner_pid, surplus)

    def give_back(self, id_: int | None = None) -> list[Taking]:
        """Shrink the pools by what was taken; the entries given back.

        Pages in use become surplus: the kernel frees them with their user.

        :param id_: this taking only, whoever owns it. ``None``: all whose owner does not run.
        :raises KeyError: no such entry. :raises GuestMemoryError: not allowed.
        """
        with self._locked():
            entries = _load(self.directory)
            if id_ is not None and all(entry.id != id_ for entry in entries):
                raise KeyError(id_)
            returned = [
                entry
                for entry in entries
                if (entry.id == id_ if id_ is not None else not entry.owner_is_alive)
            ]
            for entry in returned:
                self._give(entry, entries)
            return returned

    @contextlib.contextmanager
    def taken(
        self, pages: int, page_size: int, *, node: int | None = None
    ) -> Iterator[HugepagePool]:
        """Take for the length of a ``with`` block. Errors as :meth:`take`."""
        taking = self.take(pages, page_size, node=node, owned=True)
        try:
            yield taking.pool
        finally:
            self.give_back(taking.id)

    def _take(self, pool: HugepagePool, pages: int, owner: int | None, surplus: bool) -> Taking:
        entries = _load(self.directory)
        before = _size(pool, surplus)
        intent = Taking(
            id=max((entry.id for entry in entries), default=0) + 1,
            page_size=pool.page_size,
            node=pool.node,
            before=before,
            wanted=pages,
            taken=None,
            boot=_boot_id(),
            owner=None if owner is None else (owner, _start_time(owner)),
            is_surplus=surplus,
        )
        self._store([*entries, intent])
        try:
            grown = _resize(pool, before + pages, surplus) - before
        except GuestMemoryError:
            self._store(entries)
            raise
        if grown < pages:
            _shrink(pool, max(0, grown), surplus)
            self._store(entries)
            raise GuestMemoryError(
                errno.ENOMEM,
                f"the kernel found memory for {max(0, grown)} of {pages} pages in {_name(pool)}",
                remedy="free some memory, echo 1 > /proc/sys/vm/compact_memory, or reserve at boot",
            )
        done = dataclasses.replace(intent, taken=pages)
        self._store([*entries, done])
        return done

    def _give(self, entry: Taking, entries: list[Taking]) -> None:
        """Noted before and after: a crash in between must not give anything back twice."""
        if entry.taken and entry.pool.exists:
            size = _size(entry.pool, entry.is_surplus)
            entries[entries.index(entry)] = going = dataclasses.replace(entry, giving_from=size)
            self._store(entries)
            _resize(entry.pool, max(0, size - entry.taken), entry.is_surplus)
            entry = going
        entries.remove(entry)
        self._store(entries)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _lock(self.directory / _LOCK), pools_locked():
            yield

    def _store(self, entries: list[Taking]) -> None:
        # Replaced in one step: a reader sees the old journal or the new one.
        fd, name = tempfile.mkstemp(prefix=_JOURNAL, dir=self.directory)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, 0o644)
            json.dump([_to_json(entry) for entry in entries], file)
        os.replace(name, self.directory / _JOURNAL)


@contextlib.contextmanager
def pools_locked() -> Iterator[None]:
    """No journal on this machine changes a pool meanwhile. Not for use around a journal's methods:
    they take it themselves.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # who cannot write there changes no pool
            stack.enter_context(_lock(_POOLS_LOCK))
        yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _load(directory: Path) -> list[Taking]:
    try:
        text = (directory / _JOURNAL).read_text()
    except FileNotFoundError:
        return []
    boot = _boot_id()
    entries = [_from_json(record) for record in json.loads(text)]
    return [_settled(entry) for entry in entries if entry.boot == boot]


def _to_json(entry: Taking) -> dict[str, object]:
    record = dataclasses.asdict(entry)
    # An older reader of this journal does not know these fields.
    if not entry.is_surplus:
        del record["is_surplus"]
    if entry.giving_from is None:
        del record["giving_from"]
    return record


def _from_json(record: dict[str, object]) -> Taking:
    owner = record.pop("owner")
    entry = Taking(**record)  # type: ignore[arg-type]
    return dataclasses.replace(entry, owner=tuple(owner) if isinstance(owner, list) else None)


def _settled(entry: Taking) -> Taking:
    """A taking or giving back cut short: the pool itself tells how much of it happened."""
    if entry.taken is not None and entry.giving_from is None:
        return entry
    size = _size(entry.pool, entry.is_surplus) if entry.pool.exists else 0
    taken = entry.taken
    if taken is None:
        taken = min(max(0, size - entry.before), entry.wanted)
    if entry.giving_from is not None:
        taken = max(0, taken - max(0, entry.giving_from - size))
    return dataclasses.replace(entry, taken=taken, giving_from=None)


def _size(pool: HugepagePool, surplus: bool) -> int:
    state = pool.state()
    return state.overcommit if surplus else state.persistent


def _resize(pool: HugepagePool, pages: int, surplus: bool) -> int:
    try:
        return pool.set_overcommit(pages) if surplus else pool.set_persistent(pages)
    except OSError as error:
        remedy = "run as root"
        if error.errno == errno.EINVAL:
            remedy = "the kernel makes no surplus pages of this size: reserve pages instead"
        raise GuestMemoryError(
            error.errno or errno.EIO, f"changing {_name(pool)}", remedy=remedy
        ) from None


def _shrink(pool: HugepagePool, pages: int, surplus: bool) -> None:
    if pages and pool.exists:
        _resize(pool, max(0, _size(pool, surplus) - pages), surplus)


def _check_spare_memory(pool: HugepagePool, pages: int) -> None:
    meminfo = Path("/proc/meminfo").read_text()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    spare = int(match[1]) << 10 if match else 0
    if pages * pool.page_size > spare:
        raise GuestMemoryError(
            errno.ENOMEM,
            f"{pages} pages for the {_name(pool)} are more than the {spare >> 20} MiB available",
            remedy="free some memory, or take fewer pages",
        )


def _name(pool: HugepagePool) -> str:
    where = "" if pool.node is None else f" on node {pool.node}"
    return f"pool of {format_size(pool.page_size)} pages{where}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int:
    """When a process started, in ticks since boot (a pid alone may be somebody else's by now);
    -1 if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    # The command's name, in parentheses, may hold anything; field 22 is the 20th after it.
    return int(stat.rpartition(")")[2].split()[19])
