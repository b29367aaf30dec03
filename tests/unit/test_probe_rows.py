"""The probe's own logic: rows, names, purposes, the letter. No kernel interface is touched."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from migration.probe import (
    PURPOSES,
    Cause,
    Host,
    Outcome,
    Purpose,
    Report,
    Row,
    Status,
    Tier,
)
from migration.probe.catalogue import all_checks, find, nearest
from migration.probe.checks.operations import OPERATIONS, REQUIRED
from migration.probe.letter import Letter
from migration.probe.row import no, untested, yes
from uffd import Feature

HOST = Host(
    kernel="6.18.0",
    machine="x86_64",
    hostname="test",
    cpu_model="",
    cpu_count=2,
    is_virtual=False,
    ram_bytes=3 << 30,
    user="somebody",
    uid=1000,
    capabilities=(),
    container=None,
    is_filtered=False,
)
CHECKS = all_checks()
DENIED = no(Cause.PERMISSION, "not for somebody", "chmod 666 it (as root)")


def report(purpose: str = "postcopy", **special: Outcome) -> Report:
    """Every row says yes but those named (``_`` for ``-``)."""
    answers = {name.replace("_", "-"): outcome for name, outcome in special.items()}
    rows = [Row.of(check.heading(), answers.get(check.name, yes("seen"))) for check in CHECKS]
    assert answers.keys() <= {row.name for row in rows}
    return Report(HOST, PURPOSES[purpose], tuple(rows), 0.5)


def letter(found: Report, *, width: int = 100, everything: bool = True) -> str:
    return "\n".join(Letter(found, width=width).lines(everything=everything))


@pytest.mark.parametrize(
    "outcome",
    [yes(), yes("seen"), DENIED, untested(Cause.RESOURCE, "none left"), no(Cause.DESIGN, "never")],
)
def test_outcomes_survive_the_pipe(outcome: Outcome) -> None:
    """From the child that asked to the parent that tells."""
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_hosts_survive_the_pipe() -> None:
    """As the first record."""
    assert Host.from_json(json.loads(json.dumps(HOST.to_json()))) == HOST


def test_names_are_unique_and_made_for_scripts() -> None:
    """Also against the aliases of others."""
    names = Counter(
        name.lower().replace("_", "-") for check in CHECKS for name in {check.name, *check.aliases}
    )
    assert not [name for name, count in names.items() if count > 1]
    assert all(name == name.strip() and " " not in name for name in names)


def test_every_feature_bit_has_a_row() -> None:
    """Through Linux 7.3, with the release that brings it."""
    for feature in Feature:
        if feature:
            (check,) = find(CHECKS, str(feature.name))
            assert check.since, check.name
            assert find(CHECKS, f"UFFD_FEATURE_{feature.name}") == [check]


def test_every_operation_is_tried_on_every_memory() -> None:
    """The table has no holes."""
    cells = {check.name for check in CHECKS if check.group == "memory"}
    kinds = {name.partition("-")[2] for name in cells}
    assert {"anon", "anon-thp", "shmem", "shmem-private", "file-private"} <= kinds
    assert {"hugetlb-2M", "hugetlb-2M-private", "hugetlb-1G", "hugetlb-1G-private"} <= kinds
    assert cells == {f"{operation.name}-{kind}" for operation in OPERATIONS for kind in kinds}


@pytest.mark.parametrize("purpose", PURPOSES.values(), ids=lambda purpose: purpose.name)
def test_purposes_name_rows_that_exist(purpose: Purpose) -> None:
    """A row that is renamed would otherwise make a purpose ready by accident."""
    names = {check.name for check in CHECKS}
    assert set(purpose.rows) <= names
    assert len(set(purpose.rows)) == len(purpose.rows)
    assert purpose.required


def test_the_default_purpose_is_the_required_tier() -> None:
    """Tiers are what the letter shows; they and the exit status must agree."""
    tier = {check.name for check in CHECKS if check.tier is Tier.REQUIRED}
    assert tier == set(PURPOSES["postcopy"].required)
    assert {f"{operation}-{kind}" for operation, kind in REQUIRED} <= tier


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("open", ["open"]),
        ("OPEN", ["open"]),
        ("wp_async", ["feature-wp-async"]),
        ("UFFD_FEATURE_MOVE", ["feature-move"]),
        ("feature-move", ["feature-move"]),
        ("fd-passing", ["other-process"]),
        ("kvm-dirty-*", ["kvm-dirty-log", "kvm-dirty-ring"]),
        ("mov", []),
        ("", []),
    ],
)
def test_rows_are_found_by_what_people_call_them(word: str, names: list[str]) -> None:
    """Names, feature bits, patterns."""
    assert [check.name for check in find(CHECKS, word)] == names


def test_a_near_miss_is_named() -> None:
    assert nearest(CHECKS, "wpasync")[0] == "feature-wp-async"
    assert nearest(CHECKS, "minor_shm")[0] == "feature-minor-shmem"
    assert nearest(CHECKS, "%%%%") == []


def test_readiness_follows_the_purpose() -> None:
    """The same finding matters to one and not to the other."""
    found = report(kernel_faults=DENIED)
    assert found.is_ready
    assert [row.name for row in found.wanting] == ["kernel-faults"]
    qemu = replace(found, purpose=PURPOSES["qemu-postcopy"])
    assert [row.name for row in qemu.missing] == ["kernel-faults"]
    verdict = found.records()[-1]
    purposes = verdict["purposes"]
    assert isinstance(purposes, dict)
    assert purposes["qemu-postcopy"] == ["kernel-faults"]
    assert purposes["hugetlb"] == []
    assert verdict["root_would_add"] == ["kernel-faults"]


def test_untested_is_not_ready() -> None:
    """A required question that could not be put is no yes."""
    assert not report(copy_anon=untested(Cause.LOST, "it hung")).is_ready


def test_root_would_add_nothing_to_root() -> None:
    found = replace(report(open_syscall=DENIED), host=replace(HOST, uid=0))
    assert found.root_would_add == []


def test_records_are_one_host_rows_one_verdict() -> None:
    """The schema of --json."""
    first, *rows, last = report(move_shmem=no(Cause.DESIGN, "private memory only")).records()
    assert first["record"] == "host"
    assert last["record"] == "verdict"
    assert {row["record"] for row in rows} == {"row"}
    assert len({frozenset(row) for row in rows}) == 1
    (move,) = [row for row in rows if row["row"] == "move-shmem"]
    assert move["reason"] == "design: private memory only"
    assert json.loads(json.dumps(move)) == move


def test_the_letter_begins_with_the_verdict() -> None:
    text = letter(report())
    assert text.splitlines()[3] == "Ready for postcopy migration of toy VMs."
    assert "Missing:" not in text
    assert "  yes      COPY on anonymous memory" in text


def test_the_letter_says_what_is_missing_why_and_what_to_do() -> None:
    text = letter(report(copy_anon=DENIED))
    assert "Not ready for postcopy migration of toy VMs." in text
    missing = text[text.index("Missing:") : text.index("And for")]
    assert "permission: not for somebody" in missing
    assert "try: chmod 666 it (as root)" in missing
    assert "What root would add:" in text


def test_what_only_follows_is_not_listed_as_missing() -> None:
    """One refusal, not ten."""
    follows = untested(Cause.PREREQUISITE, "no userfaultfd to be had", "see above")
    found = report(open=DENIED, copy_anon=follows, wake_anon=follows)
    text = letter(found)
    missing = text[text.index("Missing:") : text.index("And for")]
    assert "not for somebody" in missing
    assert "no userfaultfd to be had" not in missing


def test_a_remedy_is_spelled_out_once_in_a_row() -> None:
    """The same one right after it is "the same"."""
    lines = letter(report(thp=DENIED, thp_shmem=DENIED)).splitlines()
    section = lines[lines.index("Optional, transparent huge pages:") :]
    tries = [line.strip() for line in section if line.strip().startswith("try:")]
    assert tries[:2] == ["try: chmod 666 it (as root)", "try: the same"]


def test_the_table_tells_refusals_from_what_nobody_offers() -> None:
    text = letter(
        report(
            zeropage_hugetlb_2M=no(Cause.DESIGN, "no such page"),
            poison_shmem=no(Cause.KERNEL, "too old", "Linux 6.6 or newer"),
            copy_hugetlb_1G=untested(Cause.RESOURCE, "none left"),
        )
    )
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    order = [operation.name for operation in OPERATIONS]
    assert rows["hugetlb-2M"][order.index("zeropage")] == "-"
    assert rows["shmem"][order.index("poison")] == "no"
    assert rows["hugetlb-1G"][order.index("copy")] == "?"
    assert "no: kernel: too old: POISON on shmem" in text
    assert "?: resource: none left: COPY on hugetlb-1G" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_asked(width: int) -> None:
    """But for single words that cannot be broken, and the table's head."""
    long = no(Cause.SETTING, "a rather long reason " * 8, "a rather long remedy " * 8)
    text = letter(report(kernel_faults=long, thp=long, copy_anon=long), width=width)
    wide = [line for line in text.splitlines() if len(line) > width]
    assert len(wide) == 0 or width == 60, wide


def test_a_purpose_of_its_own_shows_only_its_rows() -> None:
    purpose = PURPOSES["dirty-tracking"]
    found = report("dirty-tracking")
    found = replace(found, rows=tuple(row for row in found.rows if row.name in purpose.rows))
    text = letter(found, everything=False)
    assert "Required:" in text
    assert "Wanted:" in text
    assert sum(line.startswith("  yes") for line in text.splitlines()) == len(purpose.rows)
    assert found.judge(PURPOSES["hugetlb"]) is None


def test_statuses_are_three_words() -> None:
    """Scripts match them."""
    assert [status.value for status in Status] == ["yes", "no", "untested"]
