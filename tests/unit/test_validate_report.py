"""What a run looks like to others: TAP, JUnit, the table of several kernels, and the red cell."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts.validate import cli, compare, report
from scripts.validate.host import Host
from scripts.validate.runner import STRICT_VARIABLE, Result, skipped

PASSED = Result("unit/one[anon]", "pass", 0.01, checks=3, remarks=["seen so (up to 7.2)"])
FAILED = Result("unit/one[shmem]", "fail", 0.02, "byte 0x1 is 0x00, not 0x01\nsecond line")
SKIPPED = Result("gaps/two", "skip", 0.0, "no swap", "modprobe zram")


def test_tap_has_plan_marks_skips_and_reasons() -> None:
    out = io.StringIO()
    tap = report.Tap(out, 3)
    for result in (PASSED, FAILED, SKIPPED):
        tap.add(result)
    tap.end([PASSED, FAILED, SKIPPED])
    assert out.getvalue().splitlines() == [
        "TAP version 14",
        "1..3",
        "ok 1 - unit/one[anon]",
        "# seen so (up to 7.2)",
        "not ok 2 - unit/one[shmem]",
        "  ---",
        "  message: |",
        "    byte 0x1 is 0x00, not 0x01",
        "    second line",
        "  ...",
        "ok 3 - gaps/two # SKIP no swap; remedy: modprobe zram",
        "# 3 cases: 1 pass, 1 fail, 1 skip; 3 checks in 0.0 s",
    ]


def test_junit_counts_and_keeps_reasons(tmp_path: Path) -> None:
    path = tmp_path / "run.xml"
    report.write_junit(path, [PASSED, FAILED, SKIPPED], Host(hugepages=0))
    (suite,) = ET.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    names = [(case.get("classname"), case.get("name")) for case in suite]
    assert names == [("unit", "one[anon]"), ("unit", "one[shmem]"), ("gaps", "two")]
    failure = suite[1].find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "second line" in failure.text


def _saved(path: Path, kernel: str, results: list[Result]) -> Path:
    header = {"type": "run", "kernel": kernel, "features": 0x1FFFF}
    lines = [json.dumps(header), *(json.dumps(r.record()) for r in results)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """An older kernel, and a newer one that broke one case and lacks another."""
    broken = Result("unit/one[anon]", "fail", 0.1, "wrong | bytes")
    return [
        _saved(tmp_path / "old", "6.18", [PASSED, FAILED, SKIPPED]),
        _saved(tmp_path / "new", "7.3", [broken, Result("unit/one[shmem]", "pass")]),
    ]


def test_a_regression_is_one_red_cell(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "table.html"
    assert cli.main(["--compare", *map(str, runs), "--html", str(page)]) == 1
    text = page.read_text()
    assert text.count('class="regression"') == 1
    assert 'class="regression" title="wrong | bytes"' in text
    # What failed before is no regression, nor is what is missing.
    assert text.count('class="fail"') == 1
    assert text.count('class="-"') == 1


def test_markdown_joins_variants_that_agree(runs: list[Path]) -> None:
    old, new = map(compare.load, runs)
    text = compare.markdown([old, new])
    assert "| one: anon | pass | **FAIL** |" in text
    assert "| one: shmem | **FAIL** | pass |" in text
    assert "| two | skip | - |" in text
    alone = compare.markdown([new])
    assert "7.3" in alone
    same = compare.SavedRun("x", None, {c: {"status": "pass"} for c in ("a/b[1]", "a/b[2]")})
    assert "| b: 1, 2 | pass |" in compare.markdown([same])


def test_without_a_regression_the_status_is_good(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--compare", str(runs[0]), str(runs[0])]) == 0
    assert "### unit" in capsys.readouterr().out


def test_what_is_no_saved_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").write_text("{}\n")
    assert cli.main(["--compare", str(tmp_path / "other")]) == 2
    assert "no run saved" in capsys.readouterr().err


def test_a_promise_turns_a_skip_with_a_remedy_into_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    assert skipped("a/b", "no swap", "modprobe zram").status == "fail"
    assert skipped("a/b", "the kernel is older", None).status == "skip"
    monkeypatch.setenv(STRICT_VARIABLE, "0")
    assert skipped("a/b", "no swap", "modprobe zram").status == "skip"


def test_listing_names_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list", "--only", "unit/minor-collapse"]) == 0
    assert "MADV_COLLAPSE" in capsys.readouterr().out
    assert cli.main(["--only", "no such case"]) == 2
