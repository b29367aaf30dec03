"""The report as a letter: the verdict first, then what to do, then every finding."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby

from .purposes import PURPOSES
from .report import Report
from .row import Cause, Row, Status, Tier

#: Styles for a terminal: a pattern and how what it matches is shown (rich's words).
STYLES = (
    (r"^ +yes(?= )", "green"),
    (r"^ +no(?= )", "bold red"),
    (r"^ +untested(?= )", "yellow"),
    (r"^ +try: .*", "cyan"),
    (r"^\S.*:$", "bold"),
    (r"^(Ready|Not ready) .*", "bold"),
)
_TIERS = {
    Tier.REQUIRED: "Required",
    Tier.HUGEPAGES: "For huge pages",
    Tier.SHARED: "For shared memory",
    Tier.KVM: "For KVM guests",
    Tier.OPTIONAL: "Optional",
}
_GROUPS = {
    "opening": "ways to open one",
    "tracking": "tracking and discarding",
    "features": "feature bits",
    "thp": "transparent huge pages",
    "limits": "limits",
    "restrictions": "restrictions",
    "network": "the way the pages go",
}
_SHORT = {
    "REGISTER": "REG",
    "ZEROPAGE": "ZERO",
    "CONTINUE": "CONT",
    "WRITEPROTECT": "WP",
    "RWPROTECT": "RWP",
}
_CELL = {Status.YES: "yes", Status.NO: "no", Status.UNTESTED: "?"}


class Letter:
    """Writes lines of text. Plain: colours are the printer's business.

    :param width: columns; what is longer is wrapped.
    :param with_names: also the rows' names, as ``--feature`` takes them.
    """

    def __init__(self, report: Report, *, width: int = 100, with_names: bool = False) -> None:
        self._report = report
        self._width = max(60, width)
        self._with_names = with_names
        self._title_width = 0

    def lines(self, *, everything: bool) -> Iterator[str]:
        """The whole letter.

        :param everything: by tiers, with the table of operations; else by what the purpose needs.
        """
        self._align([row for row in self._report.rows if not everything or _is_line(row)])
        yield from self._head()
        yield ""
        ready = "Ready" if self._report.is_ready else "Not ready"
        yield from self._wrap(f"{ready} for {self._report.purpose.title}.", "")
        if everything:
            yield from self._short_of()
            yield from self._purposes()
            yield from self._root()
            yield from self._by_tier()
        else:
            yield from self._root()
            yield from self._by_need()
        yield ""
        yield from self._foot()

    def rows(self) -> Iterator[str]:
        """Nothing but the rows: for ``--feature``."""
        self._align(self._report.rows)
        yield from self._lines_of(self._report.rows, indent="")

    def _align(self, rows: Iterable[Row]) -> None:
        titles = [len(self._title(row)) for row in rows]
        self._title_width = min(max(titles, default=0), self._width // 2)

    # -- the parts ------------------------------------------------------------------------------

    def _head(self) -> Iterator[str]:
        host = self._report.host
        processors = "1 processor" if host.cpu_count == 1 else f"{host.cpu_count} processors"
        ram = f"{host.ram_bytes / (1 << 30):.1f} GiB"
        kind = " in a virtual machine" if host.is_virtual else ""
        where = f", container ({host.container})" if host.container else ""
        yield f"{host.hostname}: Linux {host.kernel}, {host.machine}{kind}{where}"
        yield f"{host.cpu_model or 'processor unknown'}, {processors}, {ram}; asked as {host.user}"

    def _short_of(self) -> Iterator[str]:
        """What decided, without what only follows from it."""
        report = self._report
        for heading, rows in (("Missing", report.missing), ("Better with", report.wanting)):
            first = [row for row in rows if row.outcome.cause is not Cause.PREREQUISITE]
            yield from self._section(heading, first or rows)

    def _purposes(self) -> Iterator[str]:
        """What else this host would do for, and what is in the way."""
        judged = {
            purpose: lacking
            for name, purpose in PURPOSES.items()
            if name != self._report.purpose.name
            and (lacking := self._report.judge(purpose)) is not None
        }
        yield ""
        yield "And for (--for NAME tells more):"
        wide = max(len(purpose.name) for purpose in judged)
        for purpose, lacking in judged.items():
            answer, without = _judgement(lacking)
            text = f"  {answer:<8} {purpose.name:<{wide}}  {purpose.title}{without}"
            yield from self._wrap(text, " " * (wide + 13))

    def _root(self) -> Iterator[str]:
        rows = self._report.root_would_add
        if rows:
            yield ""
            yield "What root would add:"
            for row in rows:
                yield from self._wrap(f"  {row.title} ({row.outcome.reason})", " " * 4)

    def _by_tier(self) -> Iterator[str]:
        for tier, heading in _TIERS.items():
            rows = [row for row in self._report.rows if row.tier is tier and _is_line(row)]
            if tier is not Tier.OPTIONAL:
                yield from self._section(heading, rows)
                continue
            yield from self._table()
            for group, part in groupby(rows, key=lambda row: row.group):
                yield from self._section(f"{heading}, {_GROUPS.get(group, group)}", part)

    def _by_need(self) -> Iterator[str]:
        for need, heading in (("required", "Required"), ("wanted", "Wanted")):
            rows = [row for row in self._report.rows if self._report.need(row) == need]
            yield from self._section(heading, rows)

    def _section(self, heading: str, rows: Iterable[Row]) -> Iterator[str]:
        found = list(rows)
        if found:
            yield ""
            yield f"{heading}:"
            yield from self._lines_of(found)

    def _lines_of(self, rows: Iterable[Row], indent: str = "  ") -> Iterator[str]:
        """A remedy that was just given is not spelled out again."""
        given: str | None = None
        for row in rows:
            yield from self._row(row, indent, given)
            given = row.outcome.remedy or given

    def _row(self, row: Row, indent: str, given: str | None) -> Iterator[str]:
        outcome = row.outcome
        start = f"{indent}{row.status.value:<8} "
        told = outcome.detail if row.is_yes else row.reason or ""
        if outcome.detail and not row.is_yes:
            told += f" ({outcome.detail})"
        since = f"[{row.since}]" if row.since else ""
        text = f"{start}{self._title(row):<{self._title_width}}  {since:<8} {told}"
        hanging = " " * (len(start) + self._title_width + 11)
        yield from self._wrap(text, hanging)
        if outcome.remedy and outcome.remedy == given:
            yield f"{' ' * len(start)}try: the same"
        elif outcome.remedy:
            yield from self._wrap(f"{' ' * len(start)}try: {outcome.remedy}", " " * len(start))

    def _title(self, row: Row) -> str:
        return f"{row.name}: {row.title}" if self._with_names else row.title

    def _table(self) -> Iterator[str]:
        """Operations across, kinds of memory down."""
        cells = {row.name: row for row in self._report.rows if row.group == "memory"}
        operations = list(dict.fromkeys(name.partition("-")[0] for name in cells))
        kinds = list(dict.fromkeys(name.partition("-")[2] for name in cells))
        if not cells:
            return
        yield ""
        yield "Every operation on every kind of memory:"
        wide = max(len(kind) for kind in kinds)
        heads = [operation.upper() for operation in operations]
        if wide + 2 + sum(len(head) + 2 for head in heads) > self._width:
            heads = [_SHORT.get(head, head) for head in heads]
        yield f"  {'':<{wide}}  " + "  ".join(heads)
        for kind in kinds:
            words = [
                _cell(cells[f"{operation}-{kind}"]).center(len(head))
                for operation, head in zip(operations, heads, strict=True)
            ]
            yield f"  {kind:<{wide}}  {'  '.join(words)}".rstrip()
        yield "  -: no kernel offers it, and nothing needs it"
        yield from self._table_notes(list(cells.values()))

    def _table_notes(self, cells: list[Row]) -> Iterator[str]:
        """Why a cell says no or ?: once per reason."""
        notes: dict[tuple[str, str, str | None], list[str]] = {}
        for row in cells:
            if not row.is_yes and not row.is_by_design:
                key = (_CELL[row.status], row.reason or "", row.outcome.remedy)
                notes.setdefault(key, []).append(row.name)
        for (mark, reason, remedy), names in notes.items():
            yield from self._wrap(f"  {mark}: {reason}: {_cells_listed(names)}", " " * 6)
            if remedy:
                yield from self._wrap(f"      try: {remedy}", " " * 6)

    def _foot(self) -> Iterator[str]:
        counts = [
            f"{sum(row.status is status for row in self._report.rows)} {status.value}"
            for status in Status
        ]
        yield f"{', '.join(counts)}, in {self._report.duration_s:.1f} s."
        yield "[6.8] names the Linux release that brings it; the answers come from trying."

    def _wrap(self, text: str, hanging: str) -> Iterator[str]:
        if len(text) <= self._width:
            yield text.rstrip()
            return
        # Inner runs of blanks are columns: only what follows them may be wrapped.
        yield from textwrap.wrap(
            text,
            self._width,
            subsequent_indent=hanging if len(hanging) < self._width * 2 // 3 else " " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )


def _cell(row: Row) -> str:
    return "-" if row.is_by_design else _CELL[row.status]


def _is_line(row: Row) -> bool:
    """Cells of the table are no lines of their own, unless all depends on them."""
    return row.group != "memory" or row.tier is Tier.REQUIRED


def _judgement(lacking: list[Row]) -> tuple[str, str]:
    """A purpose's status, and what it hangs on."""
    if not lacking:
        return "yes", ""
    refused = [row.name for row in lacking if row.status is Status.NO]
    if refused:
        return "no", f" (lacks {_listed(refused)})"
    return "untested", f" (untested: {_listed([row.name for row in lacking])})"


def _cells_listed(names: list[str]) -> str:
    """``COPY, CONTINUE on hugetlb-1G, hugetlb-1G-private``, where the names are all of these."""
    operations = list(dict.fromkeys(name.partition("-")[0] for name in names))
    kinds = list(dict.fromkeys(name.partition("-")[2] for name in names))
    if len(names) != len(operations) * len(kinds):
        return _listed(names)
    return f"{', '.join(word.upper() for word in operations)} on {_listed(kinds)}"


def _listed(names: list[str], most: int = 4) -> str:
    """``a, b, c, d and 3 more``."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
