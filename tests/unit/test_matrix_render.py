"""Saved runs side by side: differences are shown, and explained only where something does it."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.matrix import explain, render, vm
from scripts.matrix.render import Outcome


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
    render.save(folder, Outcome(series, f"{series}.9", 60.0))


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
    runs = render.load(tmp_path)
    assert [run.series for run in runs] == ["6.1", "6.12"]
    assert [run.is_good for run in runs] == [False, False]
    text = render.markdown(runs)
    assert "| 6.1 | 6.1.9 | `0x1ff` | 0 | 2 | 1 | not ready: move-anon | 3 passed | 60 s |" in text
    why = "unexplained on 6.1: OSError: at 0x...: no"
    assert f"| unit/x: anon, shmem | **FAIL** | pass | {why} |" in text
    assert "| the kernel does not report MOVE (MOVE: Linux 6.8) | 1 |  |" in text
    assert "| `move-anon` | no | yes | 6.8 | the ioctl is unknown |" in text
    assert "- 6.12: `tests/a.py::b`: AssertionError" in text


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
    (run,) = render.load(tmp_path)
    assert run.tests_total == "broke off"
    assert not run.is_good
