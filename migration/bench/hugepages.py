"""What huge pages cost during a postcopy and are worth after it.

The same guest migrates on small pages that stay small, on small pages that are collapsed at the
end, and on huge pages from a pool. How long its faults took is one side; the other is what a touch
of its memory takes the vCPU afterwards, when everything is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guestmem import HugepagesShort
from guestmem.geometry import THP_BYTES, format_size
from guestmem.shortage import explain_shortage

from .migrations import migrate_by_postcopy
from .runtime import Place, vm_pair
from .tables import Table
from .vm import VM, BenchError

RAM_BYTES = 512 << 20
SMALL, COLLAPSED, POOL = "small", "small, then collapsed", "huge, from the pool"
KINDS: Mapping[str, str] = {SMALL: "anon", COLLAPSED: "anon", POOL: "hugetlb"}
# Each touch depends on the one before, so that what an address translation takes is felt.
_GUEST = ("--workload", "chase", "--write-share", "0")
_ANY = Place("chosen", None, None)
_TOUCHED_S = 1.0
_TIMEOUT_S = 120.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class HugepagesRow:
    """One migration. :ivar collapse_ms: 0 where nothing was collapsed. :ivar huge_bytes: of RAM in
    huge pages afterwards. :ivar touch_ns: processor time of a vCPU for one touch afterwards.
    """

    pages: str
    ram_bytes: int
    fault_p50_us: float
    fault_p99_us: float
    total_ms: float
    collapse_ms: float
    huge_bytes: int
    touch_ns: float
    errors: int

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"record": "hugepages", **asdict(self)}


def pool_shortage(ram_bytes: int) -> HugepagesShort | None:
    """Why both sides cannot be made of huge pages here; ``None``: they can."""
    return explain_shortage("two VMs", THP_BYTES, 2 * ram_bytes)


def measure_hugepages(
    kinds: Sequence[str] = tuple(KINDS),
    *,
    ram_bytes: int = RAM_BYTES,
    done: Callable[[HugepagesRow], None] = lambda row: None,
) -> list[HugepagesRow]:
    """One postcopy migration for each of ``kinds``; the oracle checks each.

    :param ram_bytes: a multiple of 2 MiB.
    :raises migration.bench.vm.BenchError: a VM did not do what was asked; holds its own words.
    """
    rows = []
    for kind in kinds:
        rows.append(_one(kind, ram_bytes))
        done(rows[-1])
    return rows


def _one(kind: str, ram_bytes: int) -> HugepagesRow:
    with vm_pair(ram_bytes, (*_GUEST, "--backing", KINDS[kind]), _ANY) as (source, destination):
        destination.execute("migrate-set-parameters", {"x-collapse": kind == COLLAPSED})
        info = migrate_by_postcopy(source, destination, timeout_s=_TIMEOUT_S)
        collapse = _collapse_end(destination) if kind == COLLAPSED else {}
        touch_ns = _touch_ns(destination)
        destination.execute("stop")
        latency = destination.execute("x-query-machine")["fault_latency_us"]
        verdict = destination.execute("x-oracle-sweep")
    return HugepagesRow(
        pages=kind,
        ram_bytes=ram_bytes,
        fault_p50_us=float(latency["p50"]),
        fault_p99_us=float(latency["p99"]),
        total_ms=float(info["total-time"]),
        collapse_ms=float(collapse.get("elapsed-ms", 0)),
        huge_bytes=ram_bytes if kind == POOL else int(collapse.get("collapsed", 0)) * THP_BYTES,
        touch_ns=touch_ns,
        errors=int(verdict["errors"]),
    )


def _collapse_end(destination: VM) -> Mapping[str, Any]:
    until = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < until:
        figures: Mapping[str, Any] = destination.execute("query-migrate")["x-postcopy"]["collapse"]
        if figures["state"] != "running":
            return figures
        time.sleep(_POLL_S)
    raise BenchError(f"{destination.name}: collapsing did not end")


def _touch_ns(vm: VM) -> float:
    """Of a second of a vCPU's processor time, which other work on the machine does not lengthen."""
    began, until = _spent(vm), time.monotonic() + _TIMEOUT_S
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        now = _spent(vm)
        if now[0] - began[0] >= _TOUCHED_S * 1e9:
            return (now[0] - began[0]) / max(1, now[1] - began[1])
    raise BenchError(f"{vm.name}: its vCPU gets no processor")


def _spent(vm: VM) -> tuple[int, int]:
    """Nanoseconds its vCPU has run, and how often it touched memory; of the same moment, nearly."""
    for task in Path(f"/proc/{vm.pid}/task").iterdir():
        if (task / "comm").read_text().startswith("vcpu"):
            spent = int((task / "schedstat").read_text().split()[0])
            return spent, int(vm.execute("x-query-machine")["ops"])
    raise BenchError(f"{vm.name}: has no vCPU thread")


def hugepages_table(rows: Sequence[HugepagesRow], note: str = "") -> Table:
    """For people, one line for each kind of pages."""
    columns = (
        *("pages", "RAM", "fault p50 µs", "p99 µs", "total ms", "collapse ms", "in huge pages"),
        *("touch ns", "oracle"),
    )
    lines = tuple(
        (
            row.pages,
            format_size(row.ram_bytes),
            f"{row.fault_p50_us:.0f}",
            f"{row.fault_p99_us:.0f}",
            f"{row.total_ms:.0f}",
            f"{row.collapse_ms:.0f}" if row.collapse_ms else "-",
            format_size(row.huge_bytes) if row.huge_bytes else "-",
            f"{row.touch_ns:.0f}",
            "clean" if not row.errors else f"{row.errors} ERRORS",
        )
        for row in rows
    )
    title = "Huge pages: faults in a postcopy, and touches after it"
    return Table(title, columns, lines, 2, note)
