"""The comparison as sections: what a page shows, whatever it is written in.

Cells and texts use Markdown's back-quotes and double stars, nothing else of it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scripts.matrix import explain
from scripts.matrix.runs import Crossing, Run

INTRODUCTION = """\
Written by `scripts/kernel-matrix`: each kernel is Debian's own, booted in an emulated machine
(QEMU's TCG) whose root file system is Debian with Python and this project as it was built. Inside
run the cases of `scripts/validate-kernel`, `postcopy probe`, `postcopy demo` on each kind of RAM,
and the tests of the `uffd` room. Then machines with different kernels, connected by QEMU's socket
netdev, send each other a toy VM by postcopy. `make kernel-matrix` writes this page again.

An emulated processor is slow: the time limits of cases and probe are raised there, so that what
fails is the kernel's doing. Figures of time mean nothing here."""


@dataclass(frozen=True)
class Section:
    """A heading, a text, a table or a list, and words as they came from a machine."""

    title: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    verbatim: str = ""


def sections(runs: Sequence[Run], crossings: Sequence[Crossing]) -> list[Section]:
    """All of the page but the table of every case."""
    found = [_kernels(runs), *_problems(runs), *_demos(runs), *_crossings(crossings)]
    return [*found, _failures(runs), *_skips(runs), *_probe(runs), *_tests(runs)]


def _kernels(runs: Sequence[Run]) -> Section:
    head = ("series", "release", "features", "pass", "fail", "skip", "probe", "tests", "run")
    rows = []
    for run in runs:
        states = [str(run.counts[state]) for state in ("pass", "fail", "skip")]
        features = "-" if run.features is None else f"`{run.features:#x}`"
        row = [run.series, run.outcome.release, features, *states, run.probe_says, run.tests_total]
        rows.append((*row, f"{run.outcome.seconds:.0f} s"))
    return Section("Kernels", head=head, rows=tuple(rows))


def _problems(runs: Sequence[Run]) -> list[Section]:
    return [
        Section(f"{run.series} did not come to its end", verbatim=run.outcome.problem)
        for run in runs
        if run.outcome.problem
    ]


def _demos(runs: Sequence[Run]) -> list[Section]:
    """The toy VM moves between two processes of one machine."""
    rows = tuple(
        (run.series, backing, *_moved(demo)) for run in runs for backing, demo in run.demos.items()
    )
    text = "`postcopy demo`: two processes, one toy VM, all of its memory checked after the move."
    return [Section("The toy VM moves on each kernel", text, ("kernel", *_MOVED), rows)][
        : len(rows)
    ]


def _crossings(crossings: Sequence[Crossing]) -> list[Section]:
    rows = tuple(
        (move.source, move.destination, str(move.record["backing"]), *_moved(move.record))
        for move in crossings
    )
    text = "Two machines, one toy VM, postcopy by TCP, all of its memory checked after the move."
    head = ("from", "to", *_MOVED)
    return [Section("The toy VM moves from kernel to kernel", text, head, rows)][: len(rows)]


_MOVED = ("RAM", "result", "page requests", "pages checked", "damaged")


def _moved(record: Mapping[str, object]) -> tuple[str, ...]:
    """What there is to say about one migration."""
    if record["status"] != "ok":
        word = "skip" if record["status"] == "skip" else "**FAIL**"
        return f"{word}: {_last_line(str(record.get('reason', '')))}", "", "", ""
    oracle = record.get("oracle")
    assert isinstance(oracle, Mapping)
    checked, errors = oracle["pages_checked"], oracle["errors"]
    return "ok", f"{record['requests']:,}", f"{checked:,}", str(errors)


def _failures(runs: Sequence[Run]) -> Section:
    """Cases that some kernel fails, variants on one line where the kernels agree about them."""
    groups: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for case in dict.fromkeys(name for run in runs for name in run.cases):
        states = tuple(run.status(case) for run in runs)
        if "fail" in states:
            name, _, variant = case.partition("[")
            key = (name, states, _why_failed(case, runs))
            groups.setdefault(key, []).append(variant.rstrip("]"))
    if not groups:
        return Section("What fails, and why", "No case failed on any of them.")
    rows = []
    for (name, states, why), variants in groups.items():
        words = ["**FAIL**" if state == "fail" else state for state in states]
        rows.append((f"{name}: {', '.join(variants)}" if any(variants) else name, *words, why))
    head = ("case", *(run.series for run in runs), "why")
    return Section("What fails, and why", head=head, rows=tuple(rows))


def _why_failed(case: str, runs: Sequence[Run]) -> str:
    """What explains it on every kernel that fails it; else the failure's own words."""
    known: dict[str, None] = {}
    for run in runs:
        if run.status(case) == "fail":
            reason = str(run.cases[case].get("reason", ""))
            why = explain.why_failed(case, run.series, reason)
            if why is None:
                return f"unexplained on {run.series}: {_last_line(reason)}"
            known[why] = None
    return "; ".join(known)


def _last_line(text: str) -> str:
    """The error itself, of a traceback too; without addresses, which differ each time."""
    last = text.strip().splitlines()[-1] if text.strip() else "no reason given"
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", last)


def _skips(runs: Sequence[Run]) -> list[Section]:
    """How many cases each kernel skipped, by reason."""
    reasons: dict[str, list[list[str]]] = {}
    for i, run in enumerate(runs):
        for case, record in run.cases.items():
            if record["status"] == "skip":
                why = explain.why_skipped(_last_line(str(record.get("reason", ""))))
                reasons.setdefault(why, [[] for _ in runs])[i].append(case)
    rows = tuple(
        (why, *(str(len(found) or "") for found in cases))
        for why, cases in sorted(reasons.items(), key=lambda item: -sum(map(len, item[1])))
    )
    head = ("reason", *(run.series for run in runs))
    return [Section("What is skipped, and why", "Numbers of cases.", head, rows)][: len(rows)]


def _probe(runs: Sequence[Run]) -> list[Section]:
    """The rows of ``postcopy probe`` that are not the same everywhere."""
    rows: list[tuple[str, ...]] = []
    for row in dict.fromkeys(name for run in runs for name in run.probe):
        found = [run.probe.get(row, {}) for run in runs]
        states = [str(record.get("status", "-")) for record in found]
        if len(set(states)) > 1:
            notes = [str(r.get("detail") or r.get("reason") or "") for r in found]
            note = next((n for n, state in zip(notes, states, strict=True) if state != "yes"), "")
            since = next((str(r["since"]) for r in found if r.get("since")), "")
            rows.append((f"`{row}`", *states, since, note))
    head = ("row", *(run.series for run in runs), "since", "where it is not yes")
    title = "What `postcopy probe` finds differently"
    return [Section(title, head=head, rows=tuple(rows))][: len(rows)]


def _tests(runs: Sequence[Run]) -> list[Section]:
    """Tests that fail, and what old kernels make them skip."""
    failed, skipped = [], Counter[tuple[str, str]]()
    for run in runs:
        for name, words in run.why_tests_failed.items():
            failed.append((run.series, f"`{name}`", words))
        for number, why in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", run.tests, re.MULTILINE):
            skipped[run.series, why] += int(number)
    rows = tuple((series, why, str(number)) for (series, why), number in skipped.items())
    bad = Section("Tests that fail", head=("kernel", "test", "words"), rows=tuple(failed))
    left = Section("Tests that are skipped", head=("kernel", "why", "tests"), rows=rows)
    return [section for section in (bad, left) if section.rows]
