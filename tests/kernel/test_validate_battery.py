"""The whole battery on this kernel, once, and two hundred seeds of the stress."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.support.need import need
from tests.support.validate import Run, validate_kernel
from uffd import kernel_support

pytestmark = pytest.mark.kernel

# Nothing on this host helps against these; a skip for another reason would go unnoticed otherwise.
_KNOWN_SKIPS = (
    "the kernel does not report",
    "the kernel has no",
    "no free 1 GiB huge page",
    "no 1 GiB page",
    "there is no empty pool of 1 GiB pages",
    "this processor has no 1 GiB pages",
    "no swap",
    "the kernel gave a folio",
    "the kernel found no huge page",
    "no memfd_secret",
    "no guest_memfd",
    "no /dev/kvm",
    "KVM makes no VM",
    "this KVM does not run user mode",
    "io_uring cannot pin",
    "the temporary directory is in memory",
    "no file system here takes direct writes",
)
_SEEDS = 200


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    need(os.geteuid() == 0, "faults of system calls, huge pages and swap", remedy="run as root")
    junit = tmp_path_factory.mktemp("validate") / "run.xml"
    return validate_kernel("--junit", str(junit)), junit


def test_no_case_fails_on_this_kernel(battery: tuple[Run, Path]) -> None:
    run, _ = battery
    assert run.status == 0, run.explain()
    assert not run.ids("fail")
    assert len(run.ids("pass")) > len(run.ids("skip"))


def test_every_skip_is_one_we_know(battery: tuple[Run, Path]) -> None:
    run, _ = battery
    unknown = [
        f"{r['case']}: {r['reason']}"
        for r in run.records
        if r["status"] == "skip" and not str(r["reason"]).startswith(_KNOWN_SKIPS)
    ]
    assert not unknown


def test_only_what_the_kernel_lacks_is_skipped_of_the_unit_cases(battery: tuple[Run, Path]) -> None:
    run, _ = battery
    reported = kernel_support().features
    need(int(reported) & 0x1FFFF == 0x1FFFF, "a kernel of before 6.8")
    skipped = [name for name in run.ids("skip") if name.startswith(("unit/", "stress/", "traps/"))]
    assert not skipped


def test_junit_and_json_agree(battery: tuple[Run, Path]) -> None:
    run, junit = battery
    (suite,) = ET.parse(junit).getroot()
    assert suite.get("tests") == str(len(run.records))
    assert suite.get("skipped") == str(len(run.ids("skip")))


def test_tap_has_a_line_for_each_case(battery: tuple[Run, Path]) -> None:
    run, _ = battery
    assert f"1..{len(run.records)}" in run.output
    assert run.output.count("\nok ") == len(run.records)


def test_two_hundred_seeds_keep_to_the_model() -> None:
    run = validate_kernel(
        "--stress-seeds", str(_SEEDS), "--seed", "1", "--threads", "3", timeout_s=118
    )
    assert run.status == 0, run.output
    assert f"ok - {_SEEDS} seeds" in run.output


def test_a_seed_replays_its_steps() -> None:
    again = ("--stress-seeds", "1", "--seed", "42", "--threads", "4", "--memory", "anon")
    first, second = (validate_kernel(*again) for _ in range(2))
    assert first.status == 0, first.output
    steps = [line for line in first.output.splitlines() if line.startswith("# ")]
    assert len(steps) > 20
    assert first.output.splitlines()[:-1] == second.output.splitlines()[:-1]
