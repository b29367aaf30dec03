"""One bench from start to end: the parts in order, each result handed on as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import tables
from .compare import Comparison, compare
from .jobs import Job
from .limits import FULL, NORMAL, QUICK, Effort, measure_limits
from .machine import Machine, Processors, describe
from .native import Transport
from .qemu import MigrationFigures, find_qemu, measure_qemu
from .results import Measurement, Skipped
from .runtime import RuntimeEffort, measure_runtime
from .vm import BenchError

PARTS = ("limits", "runtime", "qemu")
TRANSPORTS = ("unix", "tcp")
EFFORTS: Mapping[str, tuple[Effort, RuntimeEffort]] = {
    "quick": (QUICK, RuntimeEffort(runs=1, ram_bytes=64 << 20, idle_touches=300)),
    "normal": (NORMAL, RuntimeEffort(runs=2, ram_bytes=256 << 20, idle_touches=1500)),
    "full": (
        FULL,
        RuntimeEffort(runs=5, ram_bytes=1 << 30, idle_touches=5000, is_full=True),
    ),
}

Emit = Callable[[Iterable[Mapping[str, Any]]], None]
Advance = Callable[[str, int], None]  # what is measured next, and how many such steps there are


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: see ``postcopy bench --help``."""

    processors: Processors
    effort: str = "normal"
    parts: Sequence[str] = PARTS
    transports: Sequence[str] = TRANSPORTS
    ram_bytes: int | None = None  # None: what the effort says

    @property
    def runtime_effort(self) -> RuntimeEffort:
        """The runtime's effort with the wanted RAM size."""
        return EFFORTS[self.effort][1].with_ram(self.ram_bytes)


@dataclass
class Outcome:
    """All there is to show, in the order it was measured.

    :ivar failures: part -> why it could not be measured to its end.
    """

    machine: Machine
    limits: list[Measurement] = field(default_factory=list)
    runtime: list[Measurement] = field(default_factory=list)
    migrations: list[MigrationFigures] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def tables(self) -> list[tables.Table]:
        """Every table that has rows."""
        return [
            *tables.measurement_tables("Limits of this machine", self.limits),
            *tables.measurement_tables("The runtime", self.runtime),
            *tables.migration_table(self.migrations),
            *tables.comparison_table(self.comparisons),
        ]

    def to_markdown(self) -> str:
        """The whole outcome as a document."""
        parts = [tables.describe_machine(self.machine), ""]
        return "\n".join([*parts, *(table.to_markdown() for table in self.tables())])


def measure(plan: Plan, emit: Emit, advance: Advance) -> Outcome:
    """Measure all parts of ``plan``. A part that fails is noted, the others still run.

    :param emit: gets the ``--json`` records as they come.
    """
    outcome = Outcome(describe(plan.processors))
    emit([outcome.machine.to_json()])
    steps = {"limits": _limits, "runtime": _runtime, "qemu": _qemu}
    for part in PARTS:
        if part not in plan.parts:
            continue
        try:
            emit(steps[part](plan, outcome, advance))
        except (BenchError, OSError) as error:
            outcome.failures[part] = str(error)
            emit([{"record": "error", "part": part, "error": str(error)}])
    outcome.comparisons = compare(outcome.limits, outcome.runtime)
    emit(row.to_json() for row in outcome.comparisons)
    return outcome


Records = Iterable[Mapping[str, Any]]


def _limits(plan: Plan, outcome: Outcome, advance: Advance) -> Records:
    def step(job: Job, total: int) -> None:
        advance(f"limits: {job.name} {job.placement}", total)

    transports = [Transport[name.upper()] for name in plan.transports]
    effort = EFFORTS[plan.effort][0]
    outcome.limits = measure_limits(plan.processors, effort, transports, step)
    return (row.to_json("limit") for row in outcome.limits)


def _runtime(plan: Plan, outcome: Outcome, advance: Advance) -> Records:
    result = measure_runtime(plan.processors, plan.runtime_effort, plan.transports, advance)
    outcome.runtime = list(result.rows)
    outcome.migrations += result.migrations
    if result.failures:
        outcome.failures["runtime"] = "\n".join(result.failures)
    return [
        *({"record": "error", "part": "runtime", "error": text} for text in result.failures),
        *(row.to_json("runtime") for row in result.rows),
        *(row.to_json() for row in result.migrations),
    ]


def _qemu(plan: Plan, outcome: Outcome, advance: Advance) -> Records:
    binary = find_qemu()
    if binary is None:
        missing = Skipped("qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86")
        row = Measurement("migration", missing, {"peer": "qemu"})
        if list(plan.parts) == ["qemu"]:  # asked for by name: its absence is a failure
            raise BenchError(f"{missing.reason}; {missing.remedy}")
        return [row.to_json("migration")]
    effort = plan.runtime_effort
    rows = measure_qemu(
        binary,
        effort.ram_bytes,
        plan.transports,
        runs=effort.runs,
        kinds=("postcopy",) if plan.effort == "quick" else ("postcopy", "precopy"),
        advance=advance,
    )
    outcome.migrations += rows
    return (row.to_json() for row in rows)
