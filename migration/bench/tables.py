"""The bench's results as tables of text, ready for a terminal or for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from guestmem.geometry import size_option

from .compare import Comparison
from .machine import Machine
from .qemu import MigrationFigures
from .results import (
    Cost,
    Duration,
    Footprint,
    GuestLatency,
    Latency,
    Measurement,
    Skipped,
    Throughput,
    Value,
)

_BYTE_PARAMETERS = frozenset({"batch_bytes", "write_bytes", "ram_bytes"})


@dataclass(frozen=True, slots=True)
class Table:
    """One table: cells are text; the first ``text_columns`` are words, the rest figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int
    note: str = ""

    def to_markdown(self) -> str:
        """GitHub's table syntax, with the title as a heading."""
        alignment = ["---" if i < self.text_columns else "---:" for i in range(len(self.columns))]
        lines = [f"### {self.title}", ""]
        for row in (self.columns, alignment, *self.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        return "\n".join([*lines, *(["", self.note] if self.note else []), ""])


def describe_machine(machine: Machine) -> str:
    """Two lines that explain the figures."""
    kind = "virtual" if machine.is_virtual else "bare metal"
    return (
        f"{machine.cpu_model or 'unknown processor'}, {machine.cpu_count} cpus ({kind}), "
        f"Linux {machine.kernel}, clock {machine.clocksource} ({machine.clock_read_ns:.0f} ns a "
        f"reading), {machine.ram_bytes / 2**30:.1f} GiB RAM, load {machine.load_1min:.2f}; "
        f"pinned rows use cpu {', '.join(str(cpu) for cpu in machine.cpus)}"
    )


def _what(row: Measurement) -> str:
    words = [row.name.replace("_", " ")]
    for name, value in row.parameters.items():
        is_bytes = name in _BYTE_PARAMETERS and isinstance(value, int)
        words.append(size_option(int(value)) if is_bytes else str(value))
    return " ".join(words)


def _where(row: Measurement) -> str:
    if not row.cpus:
        return row.placement
    return f"{row.placement} ({','.join(str(cpu) for cpu in row.cpus.values())})"


def _latency_cells(value: Latency | GuestLatency) -> tuple[str, ...]:
    spread = f"{value.p50_us_least:.1f}..{value.p50_us_most:.1f}"
    figures = (value.p50_us, value.p90_us, value.p99_us, value.max_us)
    return (*(f"{figure:.1f}" for figure in figures), spread)


def _rows_of(
    rows: Sequence[Measurement], kinds: tuple[type, ...]
) -> list[tuple[Measurement, Value]]:
    return [(row, row.value) for row in rows if isinstance(row.value, kinds)]


def measurement_tables(title: str, rows: Sequence[Measurement]) -> list[Table]:
    """One table a kind of value; empty ones are left out."""
    latencies = [
        (_what(row), _where(row), *_latency_cells(value))
        for row, value in _rows_of(rows, (Latency, GuestLatency))
        if isinstance(value, Latency | GuestLatency)
    ]
    rates = [
        (_what(row), _where(row), *(f"{figure:.2f}" for figure in figures))
        for row, value in _rows_of(rows, (Throughput,))
        if isinstance(value, Throughput)
        for figures in [(value.gb_per_s, value.gb_per_s_least, value.gb_per_s_most)]
    ]
    costs = [
        (_what(row), _where(row), *(f"{figure:.2f}" for figure in figures))
        for row, value in _rows_of(rows, (Cost,))
        if isinstance(value, Cost)
        for figures in [(value.ms_per_gib, value.ms_per_gib_least, value.ms_per_gib_most)]
    ]
    spans = [
        (_what(row), _where(row), *(f"{figure:.2f}" for figure in figures))
        for row, value in _rows_of(rows, (Duration,))
        if isinstance(value, Duration)
        for figures in [(value.ms, value.ms_least, value.ms_most)]
    ]
    sizes = [
        (_what(row), _where(row), f"{value.above_idle_bytes / 2**20:.1f}", f"{share:.2f}")
        for row, value in _rows_of(rows, (Footprint,))
        if isinstance(value, Footprint)
        for share in [100 * value.above_idle_bytes / value.ram_bytes]
    ]
    skipped = [
        (_what(row), _where(row), value.reason, value.remedy or "-")
        for row, value in _rows_of(rows, (Skipped,))
        if isinstance(value, Skipped)
    ]
    head = ("what", "placement")
    spread = ("median", "least", "most")
    tables = [
        _table(
            f"{title}: latency, us", (*head, "p50", "p90", "p99", "max", "p50 spread"), latencies
        ),
        _table(f"{title}: throughput, GB/s", (*head, *spread), rates),
        _table(f"{title}: cost, ms per GiB", (*head, *spread), costs),
        _table(f"{title}: time, ms", (*head, *spread), spans),
        _table(f"{title}: memory above idle", (*head, "MiB", "% of RAM"), sizes),
        _table(f"{title}: not measured", (*head, "reason", "remedy"), skipped, 4),
    ]
    return [table for table in tables if table.rows]


def _table(
    title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], text_columns: int = 2
) -> Table:
    return Table(title, columns, tuple(rows), text_columns)


def migration_table(rows: Sequence[MigrationFigures]) -> list[Table]:
    """Whole migrations, ours and QEMU's, side by side."""
    cells = [
        (
            row.peer,
            row.kind,
            row.transport,
            size_option(row.ram_bytes),
            f"{row.total_ms:.0f}",
            f"{row.total_ms_least:.0f}..{row.total_ms_most:.0f}",
            f"{row.gb_per_s:.2f}",
            "-" if row.downtime_ms is None else f"{row.downtime_ms:.1f}",
        )
        for row in rows
    ]
    columns = ("peer", "kind", "transport", "RAM", "total ms", "spread", "GB/s", "downtime ms")
    table = Table("Whole migrations of an idle guest, no page zero", columns, tuple(cells), 3)
    return [table] if cells else []


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.2f} {unit.replace('gb_per_s', 'GB/s')}"


def comparison_table(rows: Sequence[Comparison]) -> list[Table]:
    """Limit, reached, ratio: the page this bench exists for."""
    cells = [
        (
            row.name.replace("_", " "),
            row.case,
            row.limit_name,
            _figure(row.limit, row.unit),
            _figure(row.reached, row.unit),
            f"{row.ratio:.2f}",
            f"{'<=' if row.is_ceiling else '>='} {row.aim:g}",
            "yes" if row.is_met else "no",
        )
        for row in rows
    ]
    columns = ("what", "case", "against", "limit", "reached", "ratio", "aim", "met")
    return [Table("Reached against the limits", columns, tuple(cells), 3)] if cells else []
