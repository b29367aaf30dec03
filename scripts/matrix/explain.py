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
    """``below``: the first release that behaves as the case says, or the first series of ours that
    was seen to. ``case``: a glob over case names without their variant; ``says``: a part of the
    failure's own words, so that one fact explains nothing else of that case.
    """

    case: str
    says: str
    below: str
    text: str


_NO_DONTNEED = "DONTNEED of huge pages is new in Linux 5.18"
_NO_COLLAPSE = "MADV_COLLAPSE is new in Linux 6.1"
_NO_POPULATE = "MADV_POPULATE_READ and MADV_POPULATE_WRITE are new in Linux 5.14"

FACTS = (
    Fact("gaps/12-kvm-user-mode-only", "open", "5.11", "UFFD_USER_MODE_ONLY is new in Linux 5.11"),
    Fact("*", "/dev/userfaultfd", "6.1", "there is no /dev/userfaultfd before Linux 6.1"),
    Fact("*[[]device]", "ENOENT", "6.1", "there is no /dev/userfaultfd before Linux 6.1"),
    Fact("unit/open-flags", "0x1", "5.11", "UFFD_USER_MODE_ONLY is new in Linux 5.11"),
    Fact(
        "unit/fork-event-privilege",
        "UFFD_USER_MODE_ONLY",
        "5.11",
        "UFFD_USER_MODE_ONLY, which the unprivileged child opens with, is new in Linux 5.11",
    ),
    Fact("*", "mark", "5.14", "/proc/PID/pagemap shows write-protect marks from Linux 5.14 on"),
    # Each looks at the marks before it forks; its watcher then waits for a fork that never is.
    *(
        Fact(
            case,
            "no message came",
            "5.14",
            "/proc/PID/pagemap shows write-protect marks from Linux 5.14 on; the case looks there "
            "before it forks",
        )
        for case in (
            "unit/wp-fork-with-event",
            "unit/wp-fork-with-event-swapped",
            "unit/wp-fork-pin-with-event",
            "unit/wp-fork-pin-child-with-event",
        )
    ),
    Fact(
        "advice/hugetlb-remove-part",
        "contents: byte",
        "6.1",
        "a hole punched in a part of a huge page leaves that part's bytes as they were",
    ),
    Fact("*", "mremap", "5.16", "mremap of huge pages is new in Linux 5.16"),
    Fact("*", "madvise DONTNEED", "5.18", _NO_DONTNEED),
    Fact("unit/mmap-changing[[]hugetlb*", "the remove message waits", "5.18", _NO_DONTNEED),
    Fact("traps/05-*[[]hugetlb*", "an event waits", "5.18", _NO_DONTNEED),
    Fact("*", "madvise POPULATE", "5.14", _NO_POPULATE),
    Fact("traps/13-populating-a-registered-range", "no message came", "5.14", _NO_POPULATE),
    Fact("pmadvise/remote-collapse", "COLLAPSE", "6.1", _NO_COLLAPSE),
    Fact("*-collapse-while-registered", "EINVAL, not EBUSY", "6.1", _NO_COLLAPSE),
    Fact(
        "unit/wp-fork",
        "marks in the child",
        "6.12",
        "fork copies the write-protect marks of huge pages also for a child that nobody watches "
        "(no fork event): the child may find protected pages",
    ),
    Fact(
        "unit/wp-fork-pin-with-event",
        "marks in the child",
        "6.12",
        "a pinned huge page is copied at fork and its copy is not protected any more: a watcher of "
        "the child misses writes to it",
    ),
    *(
        Fact(
            case,
            "error=11",
            "6.12",
            "an operation refused with EAGAIN because an event waits leaves its output field as "
            "it was: whoever presets it with anything but 0 sees progress there; `uffd` presets 0",
        )
        for case in ("unit/mmap-changing", "traps/05-again-means-two-things")
    ),
    Fact(
        "errors/register-arguments",
        "ENOMEM, not EINVAL",
        "6.12",
        "a range above every mapping is refused with ENOMEM, not EINVAL",
    ),
    Fact(
        "gaps/06-dead-process",
        "POISON",
        "6.6",
        "UFFDIO_POISON is new in Linux 6.6; an unknown ioctl is refused with EINVAL at once",
    ),
    Fact(
        "*-collapse-while-registered",
        "EINVAL, not EBUSY",
        "6.12",
        "MADV_COLLAPSE of registered anonymous memory with a hole is refused with another error",
    ),
    Fact(
        "*-collapse-while-registered",
        "succeeded, not EBUSY",
        "6.12",
        "MADV_COLLAPSE of shared memory with a hole succeeds although it is registered: what was "
        "missing is there then, without a message",
    ),
    Fact(
        "gaps/12-kvm-signal",
        "goes on",
        "6.12",
        "KVM waits for a missing page without looking at signals: a vCPU asleep there comes out "
        "only when the page does",
    ),
)


def why_skipped(reason: str) -> str:
    """The reason, with the release that brings what is missing."""
    names = re.findall(r"[A-Z][A-Z_]{2,}", reason) if "does not report" in reason else []
    known = [f"{name}: Linux {SINCE[name]}" for name in names if name in SINCE]
    return f"{reason} ({', '.join(known)})" if known else reason


def why_failed(case: str, series: str, reason: str) -> str | None:
    """What explains that ``case`` failed with ``reason`` on a kernel of ``series``, if anything."""
    for fact in FACTS:
        matches = fnmatchcase(case, fact.case) or fnmatchcase(case.split("[")[0], fact.case)
        if matches and fact.says in reason and is_below(series, fact.below):
            return fact.text
    return None


def is_below(series: str, below: str) -> bool:
    return numbers(series) < numbers(below)


def numbers(series: str) -> list[int]:
    """``6.12`` as ``[6, 12]``, to sort by."""
    return [int(part) for part in re.findall(r"\d+", series)]
