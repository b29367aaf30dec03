"""Several saved runs side by side: kernel x case, so that a regression is one red cell."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

_VARIANTS_SHOWN = 8


@dataclass(frozen=True)
class SavedRun:
    """One ``--json`` file. ``cells`` maps a case's id to its record."""

    kernel: str
    features: int | None
    cells: dict[str, dict[str, object]] = field(default_factory=dict)


def load(path: Path) -> SavedRun:
    """:raises ValueError: not a saved run."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not records or records[0].get("type") != "run":
        raise ValueError(f"{path} is no run saved by --json")
    cells = {str(r["case"]): r for r in records if r.get("type") == "case"}
    return SavedRun(str(records[0]["kernel"]), records[0].get("features"), cells)


@dataclass(frozen=True)
class Cell:
    """One run's word on one case. ``is_regression``: an earlier run passed, this one fails."""

    status: str
    note: str
    is_regression: bool = False

    @property
    def text(self) -> str:
        return {"pass": "pass", "fail": "FAIL", "skip": "skip"}.get(self.status, "-")


@dataclass(frozen=True)
class Row:
    case: str
    cells: tuple[Cell, ...]

    @property
    def family(self) -> str:
        return self.case.partition("/")[0]


def table(runs: Sequence[SavedRun]) -> list[Row]:
    """One row for each case of any run, in the order of the runs that have it."""
    ids = list(dict.fromkeys(case for run in runs for case in run.cells))
    return [Row(case, tuple(_cells(case, runs))) for case in ids]


def _cells(case: str, runs: Sequence[SavedRun]) -> list[Cell]:
    found: list[Cell] = []
    for run in runs:
        record = run.cells.get(case, {})
        status = str(record.get("status", "-"))
        remarks = record.get("remarks")
        notes = [str(record.get("reason", ""))] if record.get("reason") else []
        notes += [str(r) for r in remarks] if isinstance(remarks, list) else []
        passed_before = any(cell.status == "pass" for cell in found)
        found.append(Cell(status, "; ".join(notes), status == "fail" and passed_before))
    return found


def _totals(runs: Sequence[SavedRun]) -> list[str]:
    out = []
    for run in runs:
        states = [str(r.get("status")) for r in run.cells.values()]
        out.append(" / ".join(f"{states.count(s)} {s}" for s in ("pass", "fail", "skip")))
    return out


def markdown(runs: Sequence[SavedRun]) -> str:
    """A table per family, then what was skipped, failed or remarked, by reason."""
    rows = table(runs)
    lines = ["| kernel | features | cases |", "| --- | --- | --- |"]
    for run, total in zip(runs, _totals(runs), strict=True):
        features = "-" if run.features is None else f"`{run.features:#x}`"
        lines.append(f"| {run.kernel} | {features} | {total} |")
    for family, members in groupby(rows, key=lambda row: row.family):
        head = [f"{family}", *(run.kernel for run in runs)]
        lines += ["", f"### {family}", "", _md(head), _md(["---"] * len(head))]
        for name, cells in _by_name(list(members)):
            lines.append(_md([name, *cells]))
    lines += _md_notes(rows, runs)
    return "\n".join(lines) + "\n"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _by_name(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """The variants of a case on one line, where all runs agree about them."""
    out: list[tuple[str, list[str]]] = []
    for name, group in groupby(rows, key=lambda row: row.case.split("[")[0]):
        variants: dict[tuple[str, ...], list[str]] = {}
        for row in group:
            words = tuple(f"**{c.text}**" if c.status == "fail" else c.text for c in row.cells)
            variants.setdefault(words, []).append(row.case[len(name) :].strip("[]"))
        for words, names in variants.items():
            out.append((name.partition("/")[2] + _listed(names), list(words)))
    return out


def _listed(names: Sequence[str]) -> str:
    """``: anon, shmem``; a long list by its number."""
    if not any(names):
        return ""
    return f": {', '.join(names)}" if len(names) <= _VARIANTS_SHOWN else f" ({len(names)} variants)"


def _agree(row: Row) -> bool:
    """All of several kernels pass and say the same: nothing to remark on."""
    return len(row.cells) > 1 and {(c.status, c.note) for c in row.cells} == {
        ("pass", row.cells[0].note)
    }


def _md_notes(rows: Sequence[Row], runs: Sequence[SavedRun]) -> list[str]:
    lines: list[str] = []
    for i, run in enumerate(runs):
        notes: dict[str, list[str]] = {}
        for row in rows:
            if row.cells[i].note and not _agree(row):
                key = f"{row.cells[i].text}: {row.cells[i].note.splitlines()[0]}"
                notes.setdefault(key, []).append(f"`{row.case}`")
        if notes:
            lines += ["", f"### Remarks, {run.kernel}", ""]
        for note, cases in notes.items():
            shown = cases[:4] + ([f"and {len(cases) - 4} more"] if len(cases) > 4 else [])
            lines.append(f"- {note.replace('|', chr(92) + '|')} ({', '.join(shown)})")
    return lines


_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}
table{border-collapse:collapse}td,th{padding:2px 10px;border:1px solid #ddd;text-align:left}
th{position:sticky;top:0;background:#fff}.family td{background:#f3f3f3;font-weight:600}
.pass{background:#e8f6e8}.skip{color:#888}.fail{background:#f8d0a0}
.regression{background:#d02020;color:#fff;font-weight:700}
"""


def html_page(runs: Sequence[SavedRun], *, before: str = "") -> str:
    """One self-contained page; a regression is red, its reason in the cell's title.

    :param before: HTML to stand above the table.
    """
    rows = table(runs)
    out = [
        "<!doctype html><meta charset=utf-8><title>userfaultfd: kernel x case</title>",
        f"<style>{_STYLE}</style>{before}<h1>userfaultfd: kernel x case</h1>",
        "<table><tr><th>case</th>",
        *(f"<th>{html.escape(run.kernel)}<br>{t}</th>" for run, t in _with_totals(runs)),
        "</tr>",
    ]
    for family, members in groupby(rows, key=lambda row: row.family):
        out.append(f"<tr class=family><td colspan={len(runs) + 1}>{html.escape(family)}</td></tr>")
        for row in members:
            out.append(f"<tr><td>{html.escape(row.case.partition('/')[2])}</td>")
            out += [_html_cell(cell) for cell in row.cells]
            out.append("</tr>")
    return "\n".join([*out, "</table>"]) + "\n"


def _with_totals(runs: Sequence[SavedRun]) -> list[tuple[SavedRun, str]]:
    return list(zip(runs, _totals(runs), strict=True))


def _html_cell(cell: Cell) -> str:
    style = "regression" if cell.is_regression else cell.status
    return f'<td class="{style}" title="{html.escape(cell.note, quote=True)}">{cell.text}</td>'
