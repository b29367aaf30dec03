"""What the probe says of this very host, held against the interfaces themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migration.probe import Cause, Findings, Row, Status, probe, run_checks
from migration.probe.catalogue import all_checks
from tests.support.need import need
from tests.support.uffd_memory import HUGE, hugepages
from uffd import Feature, Ioctls, Mapping, Mode, Pagemap, UffdError, Userfaultfd, kernel_support

pytestmark = pytest.mark.kernel

Rows = dict[str, Row]
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


def by_name(found: Findings) -> Rows:
    return {row.name: row for row in found.rows}


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Everything, asked once, with huge pages in the pool if this user can put some there."""
    if os.geteuid() != 0:
        return by_name(run_checks())
    with hugepages(8):
        return by_name(run_checks())


@pytest.fixture(scope="module")
def as_nobody() -> Rows:
    """The same, asked as a user without any rights: really dropped to, in the child."""
    need(os.geteuid() == 0, "dropping privileges takes root", remedy="sudo -E python -m pytest")
    found = run_checks(user="nobody")
    assert found.host.user == "nobody"
    assert found.host.uid != 0
    assert found.host.capabilities == ()
    return by_name(found)


def reported() -> Feature:
    try:
        return kernel_support().features
    except UffdError as error:
        need(False, str(error), remedy="sudo -E python -m pytest")
        raise AssertionError from error


def test_no_check_is_lost(rows: Rows, as_nobody: Rows) -> None:
    """Nothing crashed, hung, or saw what it did not expect, whoever asked."""
    for found in (rows, as_nobody):
        odd = [
            (row.name, row.reason)
            for row in found.values()
            if row.outcome.cause in (Cause.LOST, Cause.UNEXPECTED)
        ]
        assert not odd
    assert list(rows) == [check.name for check in all_checks()]


def test_every_refusal_has_a_reason_and_what_can_be_helped_a_remedy(
    rows: Rows, as_nobody: Rows
) -> None:
    """A row that says no without saying why is of no use."""
    helped = {Cause.PERMISSION, Cause.SETTING, Cause.RESOURCE, Cause.PREREQUISITE}
    for row in [*rows.values(), *as_nobody.values()]:
        if row.is_yes:
            assert row.reason is None
            assert row.outcome.remedy is None
        else:
            assert row.reason
            assert row.outcome.remedy or row.outcome.cause not in helped, row


def test_feature_rows_are_what_the_kernel_reports(rows: Rows) -> None:
    """Yes for every reported bit: each was shown to work. No for every other."""
    kernel = reported()
    for feature in Feature:
        if feature:
            row = rows[f"feature-{str(feature.name).lower().replace('_', '-')}"]
            if feature in kernel:
                assert row.is_yes, row
            else:
                assert row.outcome.cause is Cause.KERNEL, row
                assert (row.outcome.remedy or "").startswith("Linux "), row


@pytest.mark.parametrize("kind", ["anon", "shmem", "shmem-private"])
def test_operation_rows_are_what_registering_offers(rows: Rows, kind: str) -> None:
    """Except MOVE, which the kernel's own answer over-promises and the probe does not."""
    mapping = {
        "anon": lambda: Mapping.anonymous(os.sysconf("SC_PAGESIZE")),
        "shmem": lambda: Mapping.memfd(os.sysconf("SC_PAGESIZE")),
        "shmem-private": lambda: Mapping.memfd(os.sysconf("SC_PAGESIZE"), shared=False),
    }[kind]()
    with mapping, Userfaultfd.open() as uffd:
        offered = uffd.register(mapping, Mode.MISSING | Mode.WP).ioctls
        uffd.unregister(mapping)
        if kind != "anon":
            offered |= uffd.register(mapping, Mode.MISSING | Mode.MINOR).ioctls
    for operation in Ioctls:
        row = rows.get(f"{str(operation.name).lower()}-{kind}")
        if row is not None and operation not in (Ioctls.MOVE, Ioctls.REGISTER):
            assert row.is_yes == (operation in offered), row
    assert rows[f"move-{kind}"].is_yes == (kind == "anon" and Feature.MOVE in reported())


def test_huge_page_rows_with_pages_in_the_pool(rows: Rows) -> None:
    """What the kernel offers works, and what it does not is refused by design."""
    need(os.geteuid() == 0, "the huge page pool needs root", remedy="sudo -E python -m pytest")
    assert rows["hugepages-2M"].is_yes, rows["hugepages-2M"]
    for kind in ("hugetlb-2M", "hugetlb-2M-private"):
        for operation in ("register", "copy", "wake"):
            assert rows[f"{operation}-{kind}"].is_yes, rows[f"{operation}-{kind}"]
        for operation in ("zeropage", "move"):
            assert rows[f"{operation}-{kind}"].is_by_design
    for operation in ("discard", "dirty", "continue", "poison", "writeprotect"):
        assert rows[f"{operation}-hugetlb-2M"].status is not Status.UNTESTED


def test_the_pool_is_as_it_was(rows: Rows) -> None:
    """Asking takes no page for longer than the asking."""
    need(os.geteuid() == 0, "the huge page pool needs root", remedy="sudo -E python -m pytest")
    with hugepages(1):
        found = by_name(run_checks(["copy-hugetlb-2M", "discard-hugetlb-2M", "poison-hugetlb-2M"]))
        assert all(row.is_yes for row in found.values()), found
        with Mapping.memfd(HUGE, hugepage_size=HUGE) as mapping:  # the one page is free again
            mapping.store(0, 1)


def test_an_empty_pool_is_untested_and_names_the_command(rows: Rows) -> None:
    """1 GiB pages are hardly ever set aside; if they are here, this proves the other half."""
    row = rows["copy-hugetlb-1G"]
    pool = rows["hugepages-1G"]
    if pool.is_yes:
        assert row.is_yes
        return
    assert row.status in (Status.UNTESTED, Status.NO)
    if row.outcome.cause is Cause.RESOURCE:
        assert "hugepages reserve 1 --size 1G" in (row.outcome.remedy or "")


def test_nobody_is_told_why_and_what_root_would_add(as_nobody: Rows) -> None:
    """The words of the refusal, and the exact command."""
    need(
        SYSCTL.read_text().strip() == "0",
        "vm.unprivileged_userfaultfd is not 0 here",
        remedy="sysctl -w vm.unprivileged_userfaultfd=0",
    )
    call = as_nobody["open-syscall"]
    assert call.reason == "permission: vm.unprivileged_userfaultfd=0 and no CAP_SYS_PTRACE"
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in (call.outcome.remedy or "")
    assert as_nobody["feature-event-fork"].reason == "permission: EVENT_FORK needs CAP_SYS_PTRACE"
    for name in ("open-user-mode", "open", "copy-anon", "feature-wp-async", "dirty-anon"):
        assert as_nobody[name].is_yes, as_nobody[name]


def test_nobody_has_no_kernel_faults(as_nobody: Rows) -> None:
    """Neither way in; and what needs one says that it was not tried."""
    if as_nobody["open-device"].is_yes:
        need(False, "/dev/userfaultfd is open to everybody here")
    row = as_nobody["kernel-faults"]
    assert row.outcome.cause is Cause.PERMISSION
    assert "/dev/userfaultfd has mode" in (row.reason or "")
    assert as_nobody["populate"].outcome.cause is Cause.PREREQUISITE


def test_kernel_faults_are_what_they_are(rows: Rows) -> None:
    """Held against opening one without the limit to user mode."""
    try:
        Userfaultfd.open(user_mode_only=False).close()
        can = True
    except UffdError:
        can = False
    assert rows["kernel-faults"].is_yes == can


def test_kvm_rows_agree_with_each_other(rows: Rows) -> None:
    """Faults, dirty pages and speed are only told of a guest that ran."""
    kvm = [row for row in rows.values() if row.group == "kvm"]
    if not rows["kvm"].is_yes:
        assert not any(row.is_yes for row in kvm)
        return
    if rows["kvm-run"].is_yes and rows["kernel-faults"].is_yes:
        assert rows["kvm-fault"].is_yes, rows["kvm-fault"]
    assert rows["kvm-native-kernel"].status is not Status.UNTESTED


def test_tracking_row_is_true(rows: Rows) -> None:
    """Done here by hand, step by step, where the row says it works."""
    need(rows["dirty-anon"].is_yes, "no asynchronous write protection here")
    page = os.sysconf("SC_PAGESIZE")
    features = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Mapping.anonymous(4 * page) as region, Userfaultfd.open(features) as uffd:
        uffd.register(region, Mode.WP)
        uffd.write_protect(region)
        region.store(page, 1)
        with Pagemap() as pagemap:
            found = list(pagemap.written_and_protect(region.address, region.address + 4 * page))
        assert [(part.start, part.end) for part in found] == [(region.page(1), region.page(2))]


def test_a_purpose_asks_only_what_it_takes() -> None:
    """And judges by it."""
    report = probe("dirty-tracking", everything=False)
    assert {row.name for row in report.rows} == set(report.purpose.rows)
    assert report.is_ready == all(row.is_yes for row in report.of(report.purpose.required))
