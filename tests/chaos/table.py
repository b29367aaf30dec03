"""Results of many runs as the tables of ``docs/chaos.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tests.chaos.judge import Rest
from tests.chaos.plan import Fault, Phase

Record = Mapping[str, Any]


def tables(records: Sequence[Record]) -> str:
    """Faults by phase they hit, then outcomes by fault, then what it all came to."""
    records = [record for record in records if "lacks" not in record]
    hit = [record for record in records if record.get("hit")]
    phases = [phase.value for phase in Phase]
    faults = [fault.value for fault in Fault]
    by_phase = Counter((record["fault"], record["phase"]) for record in hit)
    rests = [rest.value for rest in Rest]
    outcome = Counter((r["fault"], r["rest"]) for r in records if "rest" in r)
    ends = Counter(str(record.get("end", "INVARIANT VIOLATED")) for record in records)
    operators = sum(bool(record.get("operator")) for record in records)
    lines = [
        _table("fault", faults, phases, by_phase),
        _table("fault", faults, rests, outcome),
        "| end | runs |\n| --- | --- |",
        *(f"| {end} | {count} |" for end, count in ends.most_common()),
        "",
        f"{len(records)} runs, {len(hit)} of them hit their moment; in {operators} an operator "
        f"helped; {sum('violation' in record for record in records)} violated an invariant.",
    ]
    return "\n".join(lines)


def _table(
    corner: str, rows: Sequence[str], columns: Sequence[str], counts: Counter[tuple[str, str]]
) -> str:
    lines = [
        f"| {corner} | {' | '.join(columns)} | all |",
        "| --- " * (len(columns) + 2) + "|",
    ]
    for row in rows:
        cells = [counts[row, column] for column in columns]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(str(c or '') for c in cells)} | {sum(cells)} |")
    sums = [sum(counts[row, column] for row in rows) for column in columns]
    lines.append(f"| all | {' | '.join(map(str, sums))} | {sum(sums)} |")
    return "\n".join([*lines, ""])
