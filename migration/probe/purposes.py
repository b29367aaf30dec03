"""What a user wants to do, and which rows that takes.

``required`` rows decide about the exit status; ``wanted`` ones make it better: faster, safer under
a lost link, or fit for more kinds of guest RAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Purpose:
    """A use of userfaultfd.

    :ivar title: completes "ready for ..." in the letter.
    :ivar required: names of rows that must say yes.
    :ivar wanted: names of rows that should.
    """

    name: str
    title: str
    required: tuple[str, ...]
    wanted: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """All names."""
        return self.required + self.wanted


_PLACING = ("register-anon", "copy-anon", "zeropage-anon", "wake-anon")
_BASIS = ("open", "handshake", *_PLACING, "discard-anon")
_SHARED = tuple(f"{what}-shmem" for what in ("register", "copy", "zeropage", "wake", "discard"))
_HUGE = ("register", "copy", "wake", "discard")


def _huge(size: str, *, wanted: tuple[str, ...] = ()) -> Purpose:
    rows = tuple(f"{what}-hugetlb-{size}" for what in _HUGE)
    more = tuple(f"{what}-hugetlb-{size}" for what in ("continue", "poison"))
    return Purpose(
        f"hugetlb-{size.lower()}" if size != "2M" else "hugetlb",
        f"postcopy of guests on {size[:-1]} {size[-1]}iB pages",
        ("open", "handshake", f"hugepages-{size}", "feature-missing-hugetlbfs", *rows),
        ("kernel-faults", "feature-minor-hugetlbfs", *more, *wanted),
    )


PURPOSES: Mapping[str, Purpose] = {
    purpose.name: purpose
    for purpose in (
        Purpose(
            "postcopy",
            "postcopy migration of toy VMs",
            (*_BASIS, "dirty-anon"),
            ("kernel-faults", "feature-thread-id", "poison-anon", "net-tcp", "net-unix"),
        ),
        Purpose(
            "qemu-postcopy",
            "postcopy migration of QEMU guests",
            ("kernel-faults", *_BASIS),
            (
                *("feature-thread-id", "feature-missing-shmem", "feature-missing-hugetlbfs"),
                *("kvm", "kvm-run", "kvm-native-kernel", "kvm-fault", "kvm-fault-kernel"),
                *("memlock", "socket-buffers", "net-way-out"),
            ),
        ),
        _huge("2M", wanted=("dirty-hugetlb-2M",)),
        _huge("1G"),
        Purpose(
            "shared-memory",
            "postcopy of guests on shared memory (memfd, vhost-user)",
            ("open", "handshake", "feature-missing-shmem", *_SHARED),
            (
                *("kernel-faults", "feature-minor-shmem", "continue-shmem", "poison-shmem"),
                *("dirty-shmem", "other-process"),
            ),
        ),
        Purpose(
            "kvm",
            "postcopy of KVM guests",
            ("kernel-faults", *_BASIS, "kvm", "kvm-run", "kvm-fault"),
            (
                *("kvm-fault-kernel", "kvm-kick", "kvm-kick-kernel", "kvm-native"),
                *("kvm-native-kernel", "kvm-dirty-log", "kvm-dirty-ring"),
            ),
        ),
        Purpose(
            "firecracker",
            "restoring Firecracker snapshots through a page-fault handler",
            (
                *("kernel-faults", *_PLACING, "other-process", "feature-event-remove"),
                *("kvm", "kvm-run", "kvm-fault"),
            ),
            (
                *("kvm-native-kernel", "kvm-fault-kernel", "hugepages-2M"),
                *("copy-hugetlb-2M-private", "thp"),
            ),
        ),
        Purpose(
            "snapshot",
            "snapshots of running guests by write protection",
            ("kernel-faults", "feature-pagefault-flag-wp", "writeprotect-anon", "wake-anon"),
            (
                *("feature-wp-unpopulated", "feature-wp-hugetlbfs-shmem", "writeprotect-shmem"),
                *("writeprotect-hugetlb-2M", "kvm-fault"),
            ),
        ),
        Purpose(
            "dirty-tracking",
            "finding out what a process wrote",
            ("open", "feature-wp-async", "pagemap-scan", "dirty-anon"),
            (
                *("dirty-shmem", "dirty-hugetlb-2M", "dirty-file-private"),
                *("kvm-dirty-log", "kvm-dirty-ring"),
            ),
        ),
        Purpose(
            "criu",
            "lazy restore of processes (CRIU lazy-pages)",
            (
                *("kernel-faults", *_PLACING, "other-process"),
                *(f"feature-event-{what}" for what in ("fork", "remap", "remove", "unmap")),
            ),
            ("feature-missing-shmem", "feature-missing-hugetlbfs"),
        ),
        Purpose(
            "unprivileged",
            "trying it without root (user-mode faults only)",
            ("open-user-mode", "handshake", *_PLACING, "discard-anon", "dirty-anon"),
            ("register-shmem", "copy-shmem", "poison-anon", "net-unix"),
        ),
    )
}
DEFAULT = "postcopy"
