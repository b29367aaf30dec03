"""The saved runs side by side: Markdown, HTML, one JUnit file."""

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.matrix import explain, vm
from scripts.validate import compare

OUTCOME = "outcome.json"
_CASES_SHOWN = 6


@dataclass
class Outcome:
    """What became of one kernel; ``problem`` is empty when the VM came to its plan's end."""

    series: str
    release: str = ""
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """One kernel: ``cases`` by id, ``probe`` rows by name; ``tests`` is what pytest said."""

    folder: Path
    outcome: Outcome
    cases: dict[str, dict[str, object]] = field(default_factory=dict)
    probe: dict[str, dict[str, object]] = field(default_factory=dict)
    verdict: dict[str, object] = field(default_factory=dict)
    tests: str = ""
    features: int | None = None

    @property
    def series(self) -> str:
        return self.outcome.series

    @property
    def counts(self) -> Counter[str]:
        return Counter(str(case["status"]) for case in self.cases.values())

    @property
    def failed_tests(self) -> list[str]:
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", self.tests, re.MULTILINE)

    @property
    def probe_says(self) -> str:
        """Whether a migration could start and end here."""
        missing = self.verdict.get("missing")
        if not self.verdict:
            return "-"
        return (
            f"not ready: {', '.join(missing)}" if isinstance(missing, list) and missing else "ready"
        )

    @property
    def tests_total(self) -> str:
        """pytest's last line; a run that broke off has none."""
        last = self.tests.strip().splitlines()[-1:] or ["-"]
        total = re.search(r"\d+ (?:passed|failed|skipped|errors?)\b.*(?= in [\d.]+s)", last[0])
        return total[0] if total else ("broke off" if self.tests else "-")

    @property
    def is_good(self) -> bool:
        broke_off = self.tests_total == "broke off"
        return not (self.outcome.problem or self.counts["fail"] or self.failed_tests or broke_off)

    def status(self, case: str) -> str:
        return str(self.cases[case]["status"]) if case in self.cases else "-"


def save(folder: Path, outcome: Outcome) -> None:
    """What became of it, beside what it said; lines that a dying guest wrote half go."""
    (folder / OUTCOME).write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    for name in (vm.CASES, vm.STEPS):
        lines = [json.dumps(record) + "\n" for record in vm.records(folder / name)]
        (folder / name).write_text("".join(lines))


def load(results: Path) -> list[Run]:
    """The kernels that ``results`` holds, the oldest first."""
    runs = [_load(path.parent) for path in results.glob(f"*/{OUTCOME}")]
    return sorted(runs, key=lambda run: explain.numbers(run.series))


def _load(folder: Path) -> Run:
    outcome = Outcome(**json.loads((folder / OUTCOME).read_text()))
    records = vm.records(folder / vm.CASES)
    steps = {str(step["step"]): step for step in vm.records(folder / vm.STEPS) if "step" in step}
    rows = [json.loads(line) for line in str(steps.get("probe", {}).get("out", "")).splitlines()]
    features = records[0].get("features") if records else None
    return Run(
        folder,
        outcome,
        {str(r["case"]): r for r in records if r.get("type") == "case"},
        {str(row["row"]): row for row in rows if row.get("record") == "row"},
        next((row for row in rows if row.get("record") == "verdict"), {}),
        str(steps.get("tests", {}).get("out", "")),
        features if isinstance(features, int) else None,
    )


def write_html(runs: Sequence[Run], path: Path) -> None:
    path.write_text(compare.html_page(_comparable(runs)))


def write_markdown(runs: Sequence[Run], path: Path) -> None:
    path.write_text(markdown(runs))


def _comparable(runs: Sequence[Run]) -> list[compare.SavedRun]:
    return [compare.load(run.folder / vm.CASES) for run in runs if run.cases]


def markdown(runs: Sequence[Run]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION, *_kernels(runs), *_problems(runs), *_failures(runs), *_skips(runs)]
    parts += [*_probe(runs), *_tests(runs)]
    if any(run.cases for run in runs):
        parts += ["", "## Every case", "", compare.markdown(_comparable(runs))]
    return "\n".join(parts).rstrip() + "\n"


_INTRODUCTION = """\
# Kernels side by side

Written by `scripts/kernel-matrix`: each kernel is Debian's own, booted in an emulated machine
(QEMU's TCG) whose root file system is Debian with Python and this project as it was built. Inside
run the cases of `scripts/validate-kernel`, `postcopy probe`, and the tests of the `uffd` room.
`make kernel-matrix` writes this page again. What the differences mean for a program:
[kernel-support.md](kernel-support.md).

An emulated processor is slow: the cases' time limits are raised there, those of the probe are not,
so a row of the probe may be "lost" that is none of the kernel's fault."""


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _kernels(runs: Sequence[Run]) -> list[str]:
    lines = ["", "## Kernels", ""]
    lines += _head("series", "release", "features", "pass", "fail", "skip", "probe", "tests", "run")
    for run in runs:
        states = [run.counts[state] for state in ("pass", "fail", "skip")]
        features = "-" if run.features is None else f"`{run.features:#x}`"
        whole = f"{run.outcome.seconds:.0f} s"
        lines.append(
            _line(
                [
                    run.series,
                    run.outcome.release,
                    features,
                    *states,
                    run.probe_says,
                    run.tests_total,
                    whole,
                ]
            )
        )
    return lines


def _problems(runs: Sequence[Run]) -> list[str]:
    lines: list[str] = []
    for run in runs:
        if run.outcome.problem:
            lines += ["", f"**{run.series} did not come to its end**:", "", "```"]
            lines += [run.outcome.problem, "```"]
    return lines


def _failures(runs: Sequence[Run]) -> list[str]:
    """Cases that some kernel fails, variants on one line where the kernels agree about them."""
    groups: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for case in dict.fromkeys(name for run in runs for name in run.cases):
        states = tuple(run.status(case) for run in runs)
        if "fail" in states:
            name, _, variant = case.partition("[")
            key = (name, states, _why_failed(case, runs))
            groups.setdefault(key, []).append(variant.rstrip("]"))
    if not groups:
        return ["", "No case failed on any of them."]
    lines = ["", "## What fails, and why", ""]
    lines += _head("case", *(run.series for run in runs), "why")
    for (name, states, why), variants in groups.items():
        words = ["**FAIL**" if state == "fail" else state for state in states]
        lines.append(
            _line([f"{name}: {', '.join(variants)}" if any(variants) else name, *words, why])
        )
    return lines


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


def _skips(runs: Sequence[Run]) -> list[str]:
    """How many cases each kernel skipped, by reason."""
    reasons: dict[str, list[list[str]]] = {}
    for i, run in enumerate(runs):
        for case, record in run.cases.items():
            if record["status"] == "skip":
                why = explain.why_skipped(_last_line(str(record.get("reason", ""))))
                reasons.setdefault(why, [[] for _ in runs])[i].append(case)
    if not reasons:
        return []
    lines = ["", "## What is skipped, and why", "", "Numbers of cases.", ""]
    lines += _head("reason", *(run.series for run in runs))
    for why, cases in sorted(reasons.items(), key=lambda item: -sum(map(len, item[1]))):
        lines.append(_line([why, *(len(found) or "" for found in cases)]))
    return lines


def _probe(runs: Sequence[Run]) -> list[str]:
    """The rows of ``postcopy probe`` that are not the same everywhere."""
    lines: list[str] = []
    for row in dict.fromkeys(name for run in runs for name in run.probe):
        found = [run.probe.get(row, {}) for run in runs]
        states = [str(record.get("status", "-")) for record in found]
        if len(set(states)) > 1:
            notes = [str(r.get("detail") or r.get("reason") or "") for r in found]
            note = next((n for n, state in zip(notes, states, strict=True) if state != "yes"), "")
            since = next((r["since"] for r in found if r.get("since")), None)
            lines.append(_line([f"`{row}`", *states, since or "", note]))
    if not lines:
        return []
    head = _head("row", *(run.series for run in runs), "since", "where it is not yes")
    return ["", "## What `postcopy probe` finds differently", "", *head, *lines]


def _tests(runs: Sequence[Run]) -> list[str]:
    lines: list[str] = []
    for run in runs:
        for name in run.failed_tests:
            word = re.search(
                rf"^(?:FAILED|ERROR) {re.escape(name)} - (.*)$", run.tests, re.MULTILINE
            )
            lines.append(f"- {run.series}: `{name}`{': ' + word[1] if word else ''}")
    return ["", "## Tests that fail", "", *lines] if lines else []


def merge_junit(runs: Sequence[Run], path: Path) -> None:
    """One file, a suite for each kernel; a VM that broke off is an error in it."""
    root = ET.Element("testsuites")
    for run in runs:
        written = run.folder / vm.JUNIT
        suite = ET.Element("testsuite", name="validate-kernel")
        if written.exists() and written.stat().st_size:
            try:
                found = ET.parse(written).getroot().find("testsuite")
                suite = suite if found is None else found
            except ET.ParseError:
                pass  # cut off; the problem says so
        suite.set("name", f"{suite.get('name')} {run.series}")
        if run.outcome.problem:
            case = ET.SubElement(suite, "testcase", classname="vm", name=run.series)
            first = run.outcome.problem.splitlines()[0]
            ET.SubElement(case, "error", message=first).text = run.outcome.problem
        root.append(suite)
    tree = ET.ElementTree(root)
    ET.indent(tree)
    tree.write(path, encoding="unicode", xml_declaration=True)
