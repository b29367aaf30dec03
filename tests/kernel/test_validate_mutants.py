"""Every family's cases can fail: on a broken kernel they do.

A sample here; ``scripts/validate-kernel --mutate FAMILY`` does it for every case of a family.
"""

from __future__ import annotations

import os

import pytest

from scripts.validate import mutants
from scripts.validate.case import FAMILIES
from tests.support.need import need
from tests.support.validate import validate_kernel

pytestmark = pytest.mark.kernel

# Patterns of a few cases per family that are cheap and unlike each other.
_SAMPLES: dict[str, tuple[str, ...]] = {
    "unit": ("unit/*[[]anon]", "unit/minor[[]shmem]", "unit/api-handshake", "unit/feature-bits"),
    "stress": ("stress/*[[]anon]",),
    "mremap-wp": ("mremap-wp/*[[]anon:4K]", "mremap-wp/*[[]shmem:64K]"),
    "scan": (
        "scan/masks[[]w*",
        "scan/walk-end-empty",
        "scan/max-pages",
        "scan/only-middle[[]memfd]",
        "scan/bad-arguments[[]unknown flag]",
    ),
    "guard": ("guard/install-remove[[]anon]", "guard/fork[[]shmem]", "guard/uffd-wp[[]anon]"),
    "populate": ("populate/*[[]anon:read*]",),
    "advice": ("advice/on-registered", "advice/hugetlb-dontneed[[]hugetlb]"),
    "dontunmap": ("dontunmap/simple[[]anon]", "dontunmap/makes-missing"),
    "pmadvise": ("pmadvise/bad-*",),
    "mkdirty": ("mkdirty/copy[[]anon]", "mkdirty/split-huge"),
    "merge": ("merge/*[[]anon]",),
    "errors": ("errors/register-arguments", "errors/copy[[]anon]", "errors/wake"),
    "gaps": ("gaps/0[2-6]-*[[]anon]", "gaps/11-exact-addresses[[]anon]"),
    "traps": ("traps/0*[[]anon]", "traps/08-*", "traps/15-*[[]anon]"),
}


def _only(patterns: tuple[str, ...]) -> list[str]:
    return [word for pattern in patterns for word in ("--only", pattern)]


@pytest.fixture(autouse=True)
def _root() -> None:
    need(os.geteuid() == 0, "faults of system calls and huge pages", remedy="run as root")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_case_of_the_sample_catches_a_broken_kernel(family: str) -> None:
    if family == "rwp":
        from uffd import Feature, kernel_support

        has_rwp = Feature.RWP in kernel_support().features
        need(has_rwp, "the kernel does not report RWP (Linux 7.3)")
    run = validate_kernel("--mutate", family, *_only(_SAMPLES.get(family, (f"{family}/*",))))
    assert run.status == 0, run.explain()
    assert run.ids("pass")
    assert "catches " in run.output


@pytest.mark.parametrize(
    ("defect", "victim", "reason"),
    [
        ("copy-wrong-bytes", "unit/copy[[]anon]", "contents of page 1"),
        ("copy-no-wake", "unit/copy[[]shmem]", "goes on"),
        ("flags-lost", "unit/wp-write[[]anon]", "message of the write"),
        ("address-off", "unit/copy[[]anon]", "message of a reader"),
        ("protect-lost", "unit/wp-fork[[]anon]", "marks before the fork"),
        ("output-untouched", "unit/mmap-changing[[]shmem]", "COPY with output preset"),
        ("guards-lost", "guard/install-remove[[]anon]", "guarded pages for loads"),
        ("scan-forgets", "scan/only-middle[[]memfd]", "written pages"),
        ("scan-no-protect", "scan/max-pages", "what is left"),
        ("populate-lost", "populate/pagemap[[]anon:read]", "pages present"),
    ],
)
def test_a_defect_is_called_by_its_name(defect: str, victim: str, reason: str) -> None:
    run = validate_kernel("--mutate", defect, "--only", victim)
    assert run.status == 1
    (record,) = run.records
    assert reason in str(record["reason"])


@pytest.mark.parametrize("defect", ["copy-wrong-bytes", "protect-lost", "advice-lost", "reads-off"])
def test_the_stress_finds_a_broken_kernel_and_prints_its_seed(defect: str) -> None:
    run = validate_kernel(
        "--stress-seeds", "20", "--seed", "1", "--memory", "anon", "--mutate", defect
    )
    assert run.status == 1
    assert "not ok - seed " in run.output
    assert "# again: --stress-seeds 1 --seed " in run.output


def test_each_defect_is_for_some_family() -> None:
    used = {name for family in FAMILIES for name in mutants.of_family(family)}
    assert used == set(mutants.MUTANTS)
