"""``postcopy bench`` as its users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import leaked, snapshot
from tests.support.qemu import require_qemu
from tests.support.uffd_memory import hugepages

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

Record = dict[str, Any]


def bench(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the verb; its exit status is checked."""
    argv = [sys.executable, "-m", "migration", "bench", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def records(*words: str) -> list[Record]:
    """The objects of ``--json``: one a line, nothing else on stdout."""
    before = snapshot()
    lines = bench("--json", *words).stdout.splitlines()
    # The pool of huge pages belongs to the whole machine, and the bench never changes it.
    left = [line for line in leaked(before) if "hugepages" not in line]
    assert not left, left
    return [json.loads(line) for line in lines]


def of_kind(found: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in found if record["record"] == kind]


def test_limits_as_json() -> None:
    """The machine first, then rows that have either a value with units or a reason."""
    found = records("--quick", "--only", "limits", "--transport", "unix")
    machine = found[0]
    assert machine["record"] == "machine"
    assert machine["cpus"]
    assert machine["kernel"]
    rows = of_kind(found, "limit")
    assert len(rows) == len(found) - 1
    for row in rows:
        units = {"p50_us", "gb_per_s", "ms_per_gib", "skipped"} & row.keys()
        assert len(units) == 1, row
        assert row["placement"] in ("same", "cross", "split", "unpinned")
    floors = [row for row in rows if row["name"] == "remote_fault_floor"]
    assert {row["transport"] for row in floors} == {"unix"}
    assert all(row["counts"]["touches"] == row["counts"]["messages"] for row in floors)


def test_limits_as_text_and_markdown(tmp_path: Path) -> None:
    """Tables for people; the same in a file, which is not overwritten unless told to."""
    file = tmp_path / "bench.md"
    words = ["--quick", "--only", "limits", "--transport", "tcp", "--export-markdown", str(file)]
    text = bench(*words).stdout
    assert "remote fault floor tcp anon" in text
    assert "latency, us" in text
    markdown = file.read_text()
    assert "### Limits of this machine: latency, us" in markdown
    assert markdown.count("|") > 100
    assert "--force" in bench(*words, code=2).stderr


@pytest.mark.timeout(120)
def test_the_runtime_against_the_limits() -> None:
    """Every scenario over one transport; each guest figure is of real faults, each has a ratio."""
    found = records("--quick", "--only", "limits", "--only", "runtime", "--transport", "unix")
    assert not of_kind(found, "error")
    rows = {(row["name"], row["placement"]): row for row in of_kind(found, "runtime")}
    names = {name for name, _ in rows}
    assert names == {
        "guest_fault_idle_stream",
        "guest_fault_under_push",
        "push",
        "downtime",
        "destination_memory",
    }
    for (name, _), row in rows.items():
        if name.startswith("guest_fault"):
            assert row["touches"] > 0
            assert row["requests"] > 0
            ordered = [row["p50_us"], row["p90_us"], row["p99_us"], row["max_us"]]
            assert ordered[0] > 0
            assert ordered == sorted(ordered), row
        if name == "push":
            assert row["gb_per_s"] > 0
            assert row["pass_bytes"] > 0
        if name == "downtime":
            assert row["ms"] > 0
    pauses = [row["guest"] for row in of_kind(found, "runtime") if row["name"] == "downtime"]
    assert sorted(pauses) == ["all of RAM redirtied", "idle"]
    ratios = {row["name"] for row in of_kind(found, "comparison")}
    assert ratios == {
        "idle_stream_fault_p50",
        "under_push_fault_p99",
        "push_throughput",
        "push_throughput_as_one_path",
        "downtime",
        "destination_memory_above_idle",
    }
    assert [row["peer"] for row in of_kind(found, "migration")] == ["postcopy"]


def test_qemu_beside_it() -> None:
    """A stock QEMU by the same steps, whole migrations."""
    require_qemu()
    found = records("--quick", "--only", "qemu", "--transport", "unix", "-m", "32M")
    rows = of_kind(found, "migration")
    assert [(row["peer"], row["kind"]) for row in rows] == [("qemu", "postcopy")]
    for row in rows:
        assert row["total_ms"] > 0
        assert row["gb_per_s"] > 0
        assert row["ram_bytes"] == 32 << 20


def test_what_huge_pages_are_worth() -> None:
    """The same guest on each kind of pages; all memory intact, and in the pages it says."""
    with hugepages(32):
        rows = {row["pages"]: row for row in records("--hugepages", "-m", "32M")}
    assert list(rows) == ["small", "small, then collapsed", "huge, from the pool"]
    small, collapsed, pool = (row["huge_bytes"] for row in rows.values())
    assert (small, pool) == (0, 32 << 20)
    # The kernel promises nothing: a machine short of memory in one piece leaves regions small.
    assert collapsed in range(0, (32 << 20) + 1, 2 << 20)
    for row in rows.values():
        assert row["errors"] == 0
        assert row["touch_ns"] > 0
        assert row["total_ms"] > 0
    assert rows["small, then collapsed"]["collapse_ms"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "one"], "list of processors"),
        (["--cpus", "99999"], "99999"),
        (["-m", "3"], "at least 16M"),
        (["-m", "lots"], "not a size"),
        (["--hugepages", "-m", "17M"], "whole pages of 2 MiB"),
        (["--hugepages", "--scale"], "not allowed"),
        (["--quick", "--full"], "not allowed"),
        (["--only", "everything"], "invalid choice"),
    ],
)
def test_wrong_use(words: list[str], said: str) -> None:
    """Refused before anything is measured, in words."""
    done = bench(*words, code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_help_has_examples() -> None:
    text = bench("--help").stdout
    assert "examples:" in text
    assert "--export-markdown" in text
