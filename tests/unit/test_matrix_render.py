"""Saved runs side by side: differences are shown, and explained only where something does it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from scripts.matrix import explain, junit, render, runs, sections, vm
from scripts.matrix.runs import Outcome


def saved(results: Path, series: str, cases: dict[str, tuple[str, str]], **steps: object) -> None:
    folder = results / series
    folder.mkdir(parents=True)
    run = {"type": "run", "kernel": f"{series}.9", "features": 0x1FF}
    lines = [run] + [
        {"type": "case", "case": name, "status": status, "reason": reason}
        for name, (status, reason) in cases.items()
    ]
    (folder / vm.CASES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [{"step": name, "out": out} for name, out in steps.items()]
    (folder / vm.STEPS).write_text("".join(json.dumps(line) + "\n" for line in said))
    runs.save(folder, Outcome(series, f"{series}.9", 60.0))


def test_what_differs_is_shown(tmp_path: Path) -> None:
    row = {"record": "row", "row": "move-anon", "since": "6.8"}
    old = [
        {**row, "status": "no", "detail": "the ioctl is unknown"},
        {"record": "verdict", "missing": ["move-anon"]},
    ]
    new = [{**row, "status": "yes", "detail": "moved"}]
    saved(
        tmp_path,
        "6.12",
        {"unit/x[anon]": ("pass", ""), "unit/x[shmem]": ("pass", ""), "unit/y": ("pass", "")},
        probe="\n".join(map(json.dumps, new)),
        tests="FAILED tests/a.py::b - AssertionError\n1 failed, 2 passed in 3.00s\n",
    )
    broken = ("fail", 'Traceback\n  File "x"\nOSError: at 0x7f00deadbeef: no')
    skipped = ("skip", "the kernel does not report MOVE")
    saved(
        tmp_path,
        "6.1",
        {"unit/x[anon]": broken, "unit/x[shmem]": broken, "unit/y": skipped},
        probe="\n".join(map(json.dumps, old)),
        tests="3 passed in 1.00s\n",
    )
    found = runs.load(tmp_path)
    assert [run.series for run in found] == ["6.1", "6.12"]
    assert [run.is_good for run in found] == [False, False]
    text = render.markdown(sections.sections(found, []), found)
    assert "| 6.1 | 6.1.9 | `0x1ff` | 0 | 2 | 1 | not ready: move-anon | 3 passed | 60 s |" in text
    why = "unexplained on 6.1: OSError: at 0x...: no"
    assert f"| unit/x: anon, shmem | **FAIL** | pass | {why} |" in text
    assert "| the kernel does not report MOVE (MOVE: Linux 6.8) | 1 |  |" in text
    assert "| `move-anon` | no | yes | 6.8 | the ioctl is unknown |" in text
    assert "| 6.12 | `tests/a.py::b` | AssertionError |" in text
    page = render.page(sections.sections(found, []), found)
    assert "<td><code>move-anon</code></td><td>no</td><td>yes</td>" in page
    assert f"<td>{why}</td>" in page


def test_a_fact_explains_only_old_kernels_and_only_what_it_says() -> None:
    for fact in explain.FACTS:
        case = fact.case.replace("[[]", "[").replace("*", "x")
        found = explain.why_failed(case, "5.10", f"so: {fact.says}!")
        assert found is not None
        assert explain.why_failed(case, fact.below, f"so: {fact.says}!") != fact.text
        assert explain.why_failed(case, "5.10", "another reason") is None
    assert explain.why_failed("no/such[anon]", "5.10", "") is None
    assert explain.is_below("6.2", "6.12")
    assert not explain.is_below("6.12", "6.2")


def test_tests_that_break_off(tmp_path: Path) -> None:
    saved(tmp_path, "6.1", {"unit/x": ("pass", "")}, tests="tests/a.py::b PASSED [ 50%]\n")
    (run,) = runs.load(tmp_path)
    assert run.tests_total == "broke off"
    assert not run.is_good


TESTS = """\
tests/a.py::b[delay 20 ms] PASSED                                   [ 25%]
tests/a.py::c SKIPPED (no [real] host (5.14))                       [ 50%]
tests/a.py::d[hugetlb] FAILED                                       [ 75%]
tests/a.py::e[x - y] ERROR                                          [100%]
=========================== short test summary info ============================
SKIPPED [1] tests/a.py:7: no [real] host (5.14)
FAILED tests/a.py::d[hugetlb] - InvalidRequest: mremap - no
ERROR tests/a.py::e[x - y] - OSError
ERROR tests/z.py - ImportError: what
1 failed, 1 passed, 1 skipped, 1 error in 3.00s
"""


def test_what_pytest_ran_is_in_the_junit_file(tmp_path: Path) -> None:
    saved(tmp_path, "6.1", {"unit/x": ("pass", "")}, tests=TESTS)
    junit.write(runs.load(tmp_path), [], tmp_path / "junit.xml")
    suite = ET.parse(tmp_path / "junit.xml").getroot().find("testsuite[@name='tests 6.1']")
    assert suite is not None
    found = {case.get("name"): [(r.tag, r.get("message")) for r in case] for case in suite}
    assert found == {
        "b[delay 20 ms]": [],
        "c": [("skipped", "no [real] host (5.14)")],
        "d[hugetlb]": [("failure", "InvalidRequest: mremap - no")],
        "e[x - y]": [("failure", "OSError")],
    }
    assert runs.load(tmp_path)[0].failed_tests[-1] == "tests/z.py"


def test_migrations_are_shown_and_judged(tmp_path: Path) -> None:
    """One kernel's own, and those between two; a skip is no failure, but for anonymous memory."""
    well = {"status": "ok", "requests": 1234, "oracle": {"pages_checked": 16384, "errors": 0}}
    no = {"status": "skip", "reason": "dirty-shmem: this kernel does not report it"}
    for series, anon, memfd in (("5.10", well, no), ("6.1", no, well)):
        saved(tmp_path, series, {})
        demos = [{"step": "demo", "backing": "anon", **anon}]
        demos += [{"step": "demo", "backing": "memfd", **memfd}]
        (tmp_path / series / vm.STEPS).write_text("\n".join(map(json.dumps, demos)) + "\n")
    folder = tmp_path / runs.CROSSINGS / "5.10-6.1" / "5.10"
    folder.mkdir(parents=True)
    lost = {"status": "fail", "reason": "Traceback\nthe guest is paused"}
    for backing, what in (("anon", well), ("memfd", no), ("hugetlb", lost)):
        record = {"step": "crossing", "backing": backing, "source": "5.10", "destination": "6.1"}
        with open(folder / vm.STEPS, "a") as file:
            file.write(json.dumps({**record, **what}) + "\n")
    runs.save(folder, Outcome("5.10", "5.10.9"))
    found, moves = runs.load(tmp_path), runs.load_crossings(tmp_path)
    assert [run.is_good for run in found] == [True, False]
    assert [move.is_good for move in moves] == [True, True, False]
    text = render.markdown(sections.sections(found, moves), found)
    assert "| 5.10 | anon | ok | 1,234 | 16,384 | 0 |" in text
    assert "| 5.10 | memfd | skip: dirty-shmem: this kernel does not report it |  |  |  |" in text
    assert "| 5.10 | 6.1 | anon | ok | 1,234 | 16,384 | 0 |" in text
    assert "| 5.10 | 6.1 | hugetlb | **FAIL**: the guest is paused |  |  |  |" in text
