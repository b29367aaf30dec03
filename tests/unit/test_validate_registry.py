"""The battery is whole: every case of the kernel's own suites has its counterpart here."""

from __future__ import annotations

import pytest

from scripts.validate.case import FAMILIES, Case, case, select
from scripts.validate.kinds import ALL, page_bytes

IDS = [found.id for found in select()]

FIVE = list(ALL)
SWAP_SIZES = [f"{1 << i}K" for i in (2, *range(4, 11))] + ["2M"]
# The kernel's unit cases, and the memory types each runs on.
UNIT: dict[str, list[str]] = {
    "api-handshake": ["syscall", "device"],
    "register-ioctls": FIVE,
    "zeropage": FIVE,
    "move": ["anon"],
    "move-pmd": ["anon"],
    "move-pmd-split": ["anon"],
    "wp-fork": FIVE,
    "wp-fork-with-event": FIVE,
    "wp-fork-with-event-swapped": ["anon", "shmem", "shmem-private"],
    "wp-fork-pin": FIVE,
    "wp-fork-pin-with-event": FIVE,
    "wp-unpopulated": ["anon"],
    "minor": ["shmem", "hugetlb"],
    "minor-wp": ["shmem", "hugetlb"],
    "minor-collapse": ["shmem"],
    "sigbus": FIVE,
    "sigbus-fork": FIVE,
    "sigbus-wp": FIVE,
    "events": FIVE,
    "events-wp": FIVE,
    "poison": FIVE,
    "mmap-changing": ["shmem"],
}
RWP: dict[str, list[str]] = {
    "rwp-async": FIVE,
    "rwp-sync": FIVE,
    "rwp-pagemap": FIVE,
    "rwp-mprotect": FIVE,
    "rwp-gup": FIVE,
    "rwp-async-toggle": FIVE,
    "rwp-close": FIVE,
    "rwp-fork": FIVE,
    "rwp-fork-pin": ["anon"],
    "rwp-swap-cow": ["anon"],
    "rwp-wp-exclusive": FIVE,
}
EIGHT = ["base pages", "large area", "THP", "hugetlb memfd", "hugetlb anonymous", "hugetlb SysV"]
EIGHT += ["file", "memfd"]


def _wanted() -> list[str]:
    wanted = [f"unit/{name}[{m}]" for name, memories in UNIT.items() for m in memories]
    wanted += [f"rwp/{name}[{m}]" for name, memories in RWP.items() for m in memories]
    wanted += [f"stress/{name}[{m}]" for name in ("stress", "stress-wp") for m in FIVE]
    for memory in ("anon", "shmem"):
        for size in SWAP_SIZES:
            wanted += [f"mremap-wp/wp-across-mremap[{memory}:{size}{s}]" for s in ("", ":swapped")]
    wanted += [f"mremap-wp/wp-across-mremap[{m}:2M]" for m in ("hugetlb", "hugetlb-private")]
    wanted += [f"mremap-wp/wp-across-mremap-gigantic[{m}:1G]" for m in ("shared", "private")]
    six = ("all-clean", "all-written", "all-but-ends", "protect-while-reading")
    wanted += [f"scan/{n}[{m}]" for n in (*six, "only-middle", "two-middle") for m in EIGHT]
    return wanted


@pytest.mark.parametrize("wanted", _wanted())
def test_the_kernels_case_has_a_counterpart(wanted: str) -> None:
    assert wanted in IDS


@pytest.mark.parametrize("number", range(1, 13))
def test_each_gap_is_closed(number: int) -> None:
    assert any(name.startswith(f"gaps/{number:02d}-") for name in IDS)


@pytest.mark.parametrize("number", range(1, 19))
def test_each_trap_is_a_case(number: int) -> None:
    assert any(name.startswith(f"traps/{number:02d}-") for name in IDS)


@pytest.mark.parametrize(
    "group",
    [
        *("scan/bad-arguments", "scan/walk-end", "scan/masks", "scan/transactions", "scan/huge-"),
        *("scan/in-parts", "scan/mprotect", "scan/unmapped-hole", "scan/zero-pages"),
        *("guard/mremap", "guard/fork", "guard/mprotect", "guard/locked", "guard/split-merge"),
        *("guard/populate", "guard/advice", "guard/pagemap", "guard/smaps-flag", "guard/uffd-"),
        *("guard/huge-page", "guard/process-madvise", "populate/protection", "populate/holes"),
        *("populate/pagemap", "advice/hugetlb-", "advice/fault-after-advice", "dontunmap/simple"),
        *("advice/advice-against-mapping", "pmadvise/basic", "pmadvise/remote-collapse"),
        *("pmadvise/dead-process", "pmadvise/bad-pidfd", "pmadvise/bad-vector", "merge/"),
        *("pmadvise/bad-flags", "pmadvise/bad-advice-of-nothing", "mkdirty/"),
    ],
)
def test_each_group_is_there(group: str) -> None:
    assert any(name.startswith(group) for name in IDS)


def test_each_case_says_what_it_validates() -> None:
    silent = [found.id for found in select() if len(found.summary) < 20]
    assert not silent


def test_patterns_choose_by_part_and_by_glob() -> None:
    assert {c.family for c in select(["guard/"])} == {"guard"}
    assert {c.id for c in select(["unit/minor-wp[[]*"])} == {
        "unit/minor-wp[shmem]",
        "unit/minor-wp[hugetlb]",
    }
    assert select(["no such case"]) == []


def test_the_report_is_in_the_order_of_the_families() -> None:
    families = list(dict.fromkeys(found.family for found in select()))
    assert families == list(FAMILIES)


def test_a_variant_names_its_memory() -> None:
    by_id: dict[str, Case] = {found.id: found for found in select()}
    swapped = by_id["mremap-wp/wp-across-mremap[anon:64K:swapped]"]
    assert swapped.kind is not None
    assert swapped.kind.name == "anon"
    assert by_id["unit/feature-bits"].kind is None


def test_two_cases_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two cases"):
        case("unit", on=["anon"], name="minor")(case("unit", on=["anon"], name="minor")(len))  # type: ignore[arg-type]


def test_page_contents_tell_pages_and_salts_apart() -> None:
    seen = {page_bytes(i, salt=s) for i in range(100) for s in range(2)}
    assert len(seen) == 200
