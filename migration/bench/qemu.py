"""Stock QEMU to stock QEMU on this machine: the yardstick people know.

The guest is ``-M none``: RAM and nothing else, every page of it different from zero, so that what
is timed is the migration and not the guest. The source's RAM is a file on tmpfs (filled once), the
destination's is anonymous, as in ordinary use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from .native import UNPINNED, Backing, PlaceOp, place
from .vm import VM, BenchError

MIB = 1 << 20
_ATTEMPTS = 5
_UNLIMITED = 1 << 40  # bytes per second; QEMU's default of 128 MiB/s would be all one measures


class NeverPostcopyError(BenchError):
    """A migration meant to be postcopy was over before."""


@dataclass(frozen=True, slots=True)
class MigrationFigures:
    """Several equal migrations as their sources reported them.

    :ivar kind: ``"precopy"``, or ``"postcopy"`` (switched over at once, so that all RAM is pushed).
    :ivar total_ms: median from start to end, with the least and the most beside it.
    :ivar downtime_ms: median; ``None`` where the peer reports nonsense (QEMU 7.2 does in postcopy).
    :ivar gb_per_s: guest RAM over ``total_ms``.
    """

    peer: str
    kind: str
    transport: str
    ram_bytes: int
    total_ms: float
    total_ms_least: float
    total_ms_most: float
    downtime_ms: float | None
    gb_per_s: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """One object for ``--json``."""
        return {"record": "migration", **asdict(self)}


def find_qemu() -> str | None:
    """The installed QEMU's path."""
    return shutil.which("qemu-system-x86_64")


@contextmanager
def filled_file(ram_bytes: int) -> Iterator[Path]:
    """A file on tmpfs without a zero page in it; gone after the block.

    :raises OSError: tmpfs is too small.
    """
    handle, name = tempfile.mkstemp(prefix="postcopy-bench-ram-", dir="/dev/shm")
    try:
        block = os.urandom(64 << 10)
        with os.fdopen(handle, "wb") as file:
            for offset in range(0, ram_bytes, len(block)):
                file.write(block[: ram_bytes - offset])
        yield Path(name)
    finally:
        os.unlink(name)


def _argv(
    binary: str, ram_bytes: int, memory: Path | None, incoming: str | None, qmp: Path
) -> list[str]:
    backend = f"memory-backend-ram,id=ram,size={ram_bytes}"
    if memory is not None:
        backend = f"memory-backend-file,id=ram,size={ram_bytes},mem-path={memory},share=on"
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-object", backend, "-M", "none,memory-backend=ram", "-m", f"{ram_bytes // MIB}M"]
    argv += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    return argv if incoming is None else [*argv, "-incoming", incoming]


@contextmanager
def qemu_pair(
    binary: str,
    ram_bytes: int,
    memory: Path,
) -> Iterator[tuple[VM, VM]]:
    """A source with the filled RAM and an empty destination that waits to be told where."""
    with (
        VM("qemu source", ram_bytes, partial(_argv, binary, ram_bytes, memory, None)) as src,
        VM("qemu destination", ram_bytes, partial(_argv, binary, ram_bytes, None, "defer")) as dst,
    ):
        yield src, dst


def listen_uri(transport: str, folder: Path) -> str:
    """Where a destination may listen: a path nobody has yet, or any free port."""
    return f"unix:{folder / 'migrate'}" if transport == "unix" else "tcp:127.0.0.1:0"


def resolve_uri(destination: VM, uri: str) -> str:
    """The URI to connect to: the port is known only once the destination listens."""
    if not uri.endswith(":0"):
        return uri
    answer = destination.execute("query-migrate")
    for address in answer.get("socket-address", ()):
        return f"tcp:{address['host']}:{address['port']}"
    raise BenchError(f"{destination.name} names no address it listens on: {answer}")


def warm_memory(length: int) -> None:
    """Touch ``length`` bytes of free memory and give them back: the next who asks gets those."""
    whole = length + length // 4
    place(Backing.ANON, PlaceOp.MEMCPY, batch_bytes=2 * MIB, length=whole, passes=1, cpu=UNPINNED)


@contextmanager
def start_migration(
    source: VM,
    destination: VM,
    *,
    kind: str,
    transport: str,
    precopy_bandwidth: int = _UNLIMITED,
    multifd_channels: int = 0,
) -> Iterator[None]:
    """Start one migration between two VMs that speak QEMU's QMP.

    :param kind: ``"precopy"``; ``"postcopy"``: switched over at once; ``"precopy-first"``: postcopy
        is possible and left to the caller.
    :param precopy_bandwidth: bytes per second until ``"postcopy"`` has switched over. Little of it
        keeps a small guest from being copied before; a QEMU then notices the wish 100 ms late.
    :param multifd_channels: so many beside the main one; 0: capability multifd stays off.

    Free memory is touched first, as much as the destination will need: on a virtual machine whose
    host takes free pages back, the first touch of each costs a fault of the *host*, several times
    what placing a page costs here. That is a price of the machine, not of a migration.
    """
    warm_memory(source.ram_bytes)
    names = () if kind == "precopy" else ("postcopy-ram",)
    if multifd_channels:
        names = (*names, "multifd")
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as folder:
        for vm in (destination, source):
            vm.set_capabilities(*names)
            if multifd_channels:
                vm.execute("migrate-set-parameters", {"multifd-channels": multifd_channels})
        # 0 ms of pause allowed: a precopy phase that is not meant to be the whole ends only when
        # the caller says so, or when every page was sent and none written since.
        limit = {} if kind == "precopy" else {"downtime-limit": 0}
        bandwidth = precopy_bandwidth if kind == "postcopy" else _UNLIMITED
        source.execute("migrate-set-parameters", {"max-bandwidth": bandwidth, **limit})
        uri = listen_uri(transport, Path(folder))
        destination.execute("migrate-incoming", {"uri": uri})
        source.execute("migrate", {"uri": resolve_uri(destination, uri)})
        if kind == "postcopy":
            source.execute("migrate-start-postcopy")
        yield


def migrate(
    source: VM,
    destination: VM,
    *,
    kind: str,
    transport: str,
    precopy_bandwidth: int = _UNLIMITED,
    multifd_channels: int = 0,
) -> Mapping[str, Any]:
    """One whole migration; the source's last ``query-migrate``.

    :raises BenchError: it did not complete.
    :raises NeverPostcopyError: everything was copied before it could switch over.
    """
    with start_migration(
        source,
        destination,
        kind=kind,
        transport=transport,
        precopy_bandwidth=precopy_bandwidth,
        multifd_channels=multifd_channels,
    ):
        source.wait_status("completed")
        destination.wait_status("completed")
    if kind == "postcopy" and "postcopy-active" not in source.status_times_s:
        raise NeverPostcopyError(
            f"{source.name}: the precopy was faster than the switch to postcopy"
        )
    answer: Mapping[str, Any] = source.execute("query-migrate")
    return answer


def figures(
    peer: str, kind: str, transport: str, ram_bytes: int, answers: Sequence[Mapping[str, Any]]
) -> MigrationFigures:
    """The peers' own numbers (``query-migrate`` of completed sources), in our units."""
    totals = [float(answer["total-time"]) for answer in answers]
    pauses = [float(answer.get("downtime", -1)) for answer in answers]
    # QEMU 7.2 subtracts a start it never noted: its "downtime" is then the host's uptime.
    sane = [pause for pause, total in zip(pauses, totals, strict=True) if 0 <= pause <= total]
    return MigrationFigures(
        peer=peer,
        kind=kind,
        transport=transport,
        ram_bytes=ram_bytes,
        total_ms=median(totals),
        total_ms_least=min(totals),
        total_ms_most=max(totals),
        downtime_ms=median(sane) if sane else None,
        gb_per_s=round(ram_bytes / max(median(totals), 1) / 1e6, 3),
        runs=len(totals),
    )


def _migrate_pair(
    binary: str, ram_bytes: int, memory: Path, kind: str, transport: str
) -> Mapping[str, Any]:
    """A fresh pair; again when a busy host let the precopy be over too early."""
    for attempt in range(_ATTEMPTS):
        with qemu_pair(binary, ram_bytes, memory) as (source, destination):
            try:
                return migrate(source, destination, kind=kind, transport=transport)
            except NeverPostcopyError:
                if attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError("the loop ends by return or raise")


def measure_qemu(
    binary: str,
    ram_bytes: int,
    transports: Sequence[str],
    *,
    runs: int = 3,
    kinds: Sequence[str] = ("postcopy", "precopy"),
    advance: Callable[[str, int], None] = lambda text, total: None,
) -> list[MigrationFigures]:
    """Every kind over every transport, each run with fresh processes, taking turns.

    :raises BenchError: QEMU refused something.
    :raises OSError: no room on tmpfs.
    """
    rows = [(kind, transport) for transport in transports for kind in kinds]
    answers: dict[tuple[str, str], list[Mapping[str, Any]]] = {row: [] for row in rows}
    with filled_file(ram_bytes) as memory:
        for _ in range(runs):
            for kind, transport in rows:
                advance(f"qemu: {kind} over {transport}", runs * len(rows))
                answer = _migrate_pair(binary, ram_bytes, memory, kind, transport)
                answers[kind, transport].append(answer)
    return [
        figures("qemu", kind, transport, ram_bytes, answers[kind, transport])
        for kind, transport in rows
    ]
