"""How the cost of a migration grows with the size of RAM when what is in it stays the same.

Pairs of ``postcopy run`` with sparse guests of growing size, the same few MiB filled in each: what
grows then is the price of size itself: bitmaps, page tables, scans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guestmem.geometry import format_size

from .migrations import migrate_by_postcopy
from .runtime import Place, vm_pair
from .tables import Table

SIZES = tuple(1 << bits for bits in (30, 34, 37, 40))
"""1 GiB to 1 TiB."""
FILLED_BYTES = 256 << 20
_POSTCOPY_S = 300.0
_ANY = Place("chosen", None, None)


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """One migration. Times in milliseconds, memory in bytes.

    :ivar setup_ms: from the start to the first page, at the source.
    :ivar sync_ms: one look at what the guest wrote, on average.
    :ivar source_bytes, destination_bytes: at most resident in each process.
    :ivar hole_pages: target pages told of as never written.
    """

    ram_bytes: int
    filled_bytes: int
    setup_ms: float
    sync_ms: float
    downtime_ms: float
    total_ms: float
    fault_p50_us: float
    fault_p99_us: float
    source_bytes: int
    destination_bytes: int
    hole_pages: int
    errors: int

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"record": "scale", **asdict(self)}


def measure_scale(
    sizes: Iterable[int] = SIZES,
    *,
    filled_bytes: int = FILLED_BYTES,
    done: Callable[[ScaleRow], None] = lambda row: None,
) -> list[ScaleRow]:
    """One postcopy migration for each size; the oracle checks each.

    :raises migration.bench.vm.BenchError: a VM did not do what was asked; holds its own words.
    """
    rows = []
    for ram_bytes in sizes:
        rows.append(_one(ram_bytes, min(filled_bytes, ram_bytes)))
        done(rows[-1])
    return rows


def _one(ram_bytes: int, filled_bytes: int) -> ScaleRow:
    guest = ("--fill-share", repr(filled_bytes / ram_bytes), "--rate", "20000")
    with vm_pair(ram_bytes, guest, _ANY) as (source, destination):
        info = migrate_by_postcopy(source, destination, timeout_s=_POSTCOPY_S)
        peaks = [vm.memory_bytes(peak=True) for vm in (source, destination)]
        destination.execute("stop")
        guest_figures = destination.execute("x-query-machine")
        verdict = destination.execute("x-oracle-sweep")
    ours: Mapping[str, Any] = info["x-postcopy"]
    latency = guest_figures["fault_latency_us"]
    return ScaleRow(
        ram_bytes=ram_bytes,
        filled_bytes=filled_bytes,
        setup_ms=float(info["setup-time"]),
        sync_ms=ours["sync-ms"] / max(1, info["ram"]["dirty-sync-count"]),
        downtime_ms=float(guest_figures["downtime_ms"] or 0),
        total_ms=float(info["total-time"]),
        fault_p50_us=float(latency["p50"]),
        fault_p99_us=float(latency["p99"]),
        source_bytes=peaks[0],
        destination_bytes=peaks[1],
        hole_pages=int(ours["hole-pages"]),
        errors=int(verdict["errors"]),
    )


def scale_table(rows: Sequence[ScaleRow]) -> Table:
    """For people, one line for each size."""
    columns = (
        *("RAM", "filled", "set-up ms", "round ms", "downtime ms", "total ms"),
        *("fault p50 µs", "p99 µs", "source MiB", "dest. MiB", "oracle"),
    )
    lines = tuple(
        (
            format_size(row.ram_bytes),
            format_size(row.filled_bytes),
            f"{row.setup_ms:.0f}",
            f"{row.sync_ms:.1f}",
            f"{row.downtime_ms:.0f}",
            f"{row.total_ms:.0f}",
            f"{row.fault_p50_us:.0f}",
            f"{row.fault_p99_us:.0f}",
            f"{row.source_bytes >> 20}",
            f"{row.destination_bytes >> 20}",
            "clean" if not row.errors else f"{row.errors} ERRORS",
        )
        for row in rows
    )
    return Table("The price of size: sparse guests, ours to ours", columns, lines, 2)
