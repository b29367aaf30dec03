"""Why kernels answer differently: what is known of each release, beside what was seen.

A failure without an entry here is shown with its own words and called unexplained, so that a
regression is never explained away by being old.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

#: Linux releases, by the man pages; what a kernel has is asked, never read from this table.
SINCE = {
    "PAGEFAULT_FLAG_WP": "5.7",
    "MINOR_HUGETLBFS": "5.13",
    "MINOR_SHMEM": "5.14",
    "EXACT_ADDRESS": "5.18",
    "WP_HUGETLBFS_SHMEM": "5.19",
    "WP_UNPOPULATED": "6.4",
    "POISON": "6.6",
    "WP_ASYNC": "6.7",
    "MOVE": "6.8",
    "RWP": "7.3",
    "RWP_ASYNC": "7.3",
}


@dataclass(frozen=True)
class Fact:
    """``case`` is a glob over case names without their variant; ``below``: the first series that
    was seen to behave as the case says.
    """

    case: str
    below: str
    text: str


FACTS = (
    Fact(
        "unit/wp-fork",
        "6.12",
        "fork copies the write-protect marks of huge pages also for a child that nobody watches "
        "(no fork event): the child may find protected pages",
    ),
    Fact(
        "unit/wp-fork-pin-with-event",
        "6.12",
        "a pinned huge page is copied at fork and its copy is not protected any more: a watcher of "
        "the child misses writes to it",
    ),
    Fact(
        "unit/mmap-changing",
        "6.12",
        "an operation refused with EAGAIN because an event waits leaves its output field as it "
        "was: whoever presets it with anything but 0 sees progress there; `uffd` presets 0",
    ),
    Fact(
        "errors/register-arguments",
        "6.12",
        "a range above every mapping is refused with ENOMEM, not EINVAL",
    ),
)


def why_skipped(reason: str) -> str:
    """The reason, with the release that brings what is missing."""
    names = re.findall(r"[A-Z][A-Z_]{2,}", reason) if "does not report" in reason else []
    known = [f"{name}: Linux {SINCE[name]}" for name in names if name in SINCE]
    return f"{reason} ({', '.join(known)})" if known else reason


def why_failed(case: str, series: str) -> str | None:
    """What explains the failure of ``case`` on a kernel of ``series``, if anything does."""
    for fact in FACTS:
        if fnmatchcase(case.split("[")[0], fact.case) and is_below(series, fact.below):
            return fact.text
    return None


def is_below(series: str, below: str) -> bool:
    return numbers(series) < numbers(below)


def numbers(series: str) -> list[int]:
    """``6.12`` as ``[6, 12]``, to sort by."""
    return [int(part) for part in re.findall(r"\d+", series)]
