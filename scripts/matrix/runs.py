"""What the VMs left behind, as saved and as loaded again."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scripts.matrix import explain, vm

OUTCOME, CROSSINGS = "outcome.json", "crossings"


@dataclass
class Outcome:
    """What became of one VM; ``problem`` is empty when it came to its plan's end.

    ``key`` stands for all that went into it; ``is_cached``: not booted now, an earlier run is it.
    """

    series: str
    release: str = ""
    seconds: float = 0.0
    problem: str = ""
    key: str = ""
    is_cached: bool = False


@dataclass(frozen=True)
class Run:
    """One kernel: ``cases`` by id, ``probe`` rows by name; ``tests`` is what pytest said;
    ``demos`` what became of ``postcopy demo``, by kind of RAM.
    """

    folder: Path
    outcome: Outcome
    cases: dict[str, dict[str, object]] = field(default_factory=dict)
    probe: dict[str, dict[str, object]] = field(default_factory=dict)
    verdict: dict[str, object] = field(default_factory=dict)
    demos: dict[str, dict[str, object]] = field(default_factory=dict)
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
        return list(self.why_tests_failed)

    @property
    def why_tests_failed(self) -> dict[str, str]:
        """By name, in pytest's words."""
        name = r"\S+\.py(?:::[\w:]+(?:\[.*?\])?)?"
        line = rf"^(?:FAILED|ERROR) ({name})(?: - (.*))?$"
        return dict(re.findall(line, self.tests, re.MULTILINE))

    @property
    def test_results(self) -> dict[str, str]:
        """``PASSED``, ``FAILED``, ``SKIPPED``, ``ERROR`` and what pytest says beside it, by name;
        a test whose tear-down failed is an error.
        """
        line = r"^(\S+::.+?) ((?:PASSED|FAILED|SKIPPED|ERROR)\b.*?) +\[ *\d+%\]$"
        return dict(re.findall(line, self.tests, re.MULTILINE))

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
    def unexplained(self) -> list[str]:
        """Cases that fail for no known reason."""
        return [
            name
            for name, case in self.cases.items()
            if case["status"] == "fail"
            and explain.why_failed(name, self.series, str(case.get("reason", ""))) is None
        ]

    @property
    def is_good(self) -> bool:
        """It came to its end, the toy VM's demo is in order, nothing failed but what is explained.

        A demo may be skipped for want of a feature, but not the one on anonymous memory.
        """
        broke_off = self.tests_total == "broke off"
        demos_fail = any(
            demo["status"] == "fail" or (kind == "anon" and demo["status"] != "ok")
            for kind, demo in self.demos.items()
        )
        bad = self.outcome.problem or self.unexplained or self.failed_tests
        return not (bad or broke_off or demos_fail)

    def status(self, case: str) -> str:
        return str(self.cases[case]["status"]) if case in self.cases else "-"


@dataclass(frozen=True)
class Crossing:
    """A migration from one VM to another one with another kernel."""

    source: str
    destination: str
    record: Mapping[str, object]

    @property
    def is_good(self) -> bool:
        return self.record["status"] != "fail"


def save(folder: Path, result: Outcome) -> None:
    """What became of it, beside what it said; lines that a dying guest wrote half go."""
    (folder / OUTCOME).write_text(json.dumps(asdict(result), indent=1) + "\n")
    for name in (vm.CASES, vm.STEPS):
        lines = [json.dumps(record) + "\n" for record in vm.records(folder / name)]
        (folder / name).write_text("".join(lines))


def outcome(folder: Path) -> Outcome | None:
    """What :func:`save` noted there; None: nothing, or an older version's."""
    try:
        return Outcome(**json.loads((folder / OUTCOME).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def load(results: Path) -> list[Run]:
    """The kernels that ``results`` holds, the oldest first."""
    found = [(path.parent, outcome(path.parent)) for path in results.glob(f"*/{OUTCOME}")]
    runs = [_load(folder, result) for folder, result in found if result]
    return sorted(runs, key=lambda run: explain.numbers(run.series))


def load_crossings(results: Path) -> list[Crossing]:
    """Every migration between kernels, and for a VM that broke off its problem."""
    found: list[Crossing] = []
    for path in sorted((results / CROSSINGS).glob(f"*/*/{OUTCOME}")):
        result = outcome(path.parent)
        if result is None:
            continue
        for step in vm.records(path.parent / vm.STEPS):
            if step.get("step") == "crossing":
                found.append(Crossing(str(step["source"]), str(step["destination"]), step))
        if result.problem:
            other = path.parent.parent.name.replace(result.series, "", 1).strip("-")
            record = {"status": "fail", "backing": "-", "reason": result.problem}
            found.append(Crossing(result.series, other, record))
    return found


def _load(folder: Path, result: Outcome) -> Run:
    records = vm.records(folder / vm.CASES)
    said = vm.records(folder / vm.STEPS)
    steps = {str(step["step"]): step for step in said if "step" in step}
    rows = [
        json.loads(line)
        for line in str(steps.get("probe", {}).get("out", "")).splitlines()
        if line.startswith("{")
    ]
    features = records[0].get("features") if records else None
    return Run(
        folder,
        result,
        cases={str(r["case"]): r for r in records if r.get("type") == "case"},
        probe={str(row["row"]): row for row in rows if row.get("record") == "row"},
        verdict=next((row for row in rows if row.get("record") == "verdict"), {}),
        demos={str(step["backing"]): step for step in said if step.get("step") == "demo"},
        tests=str(steps.get("tests", {}).get("out", "")),
        features=features if isinstance(features, int) else None,
    )
