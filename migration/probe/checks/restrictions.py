"""What stands between this process and the kernel: filters, containers, namespaces, cgroups."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from uffd import Advice, UffdError, memfd_create, process_madvise
from uffd.processes import pidfd_getfd, pidfd_open

from .. import facts
from ..kinds import ANON
from ..row import Cause, Check, Outcome, Tier, no, yes

_GROUP = "restrictions"
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # cgroup v1 has a number near the largest instead of a word


def _own_memory() -> None:
    region = ANON.map()
    pidfd = pidfd_open(os.getpid())
    process_madvise(pidfd, [(region.address, region.length)], Advice.COLD)


def _pass_fd() -> None:
    os.close(pidfd_getfd(pidfd_open(os.getpid()), 0))


def _memory_file() -> None:
    os.close(memfd_create("probe"))


#: Calls the runtime makes and containers like to forbid, each with arguments that do no harm.
_CALLS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("memfd_create", _memory_file),
    ("process_madvise", _own_memory),
    ("pidfd_getfd", _pass_fd),
    ("eventfd2", lambda: os.close(os.eventfd(0))),
)


def system_calls() -> Outcome:
    """The calls are made; userfaultfd(2) itself has rows of its own."""
    forbidden = []
    for name, call in _CALLS:
        try:
            call()
        except (UffdError, OSError) as error:
            # EINVAL and the like are an answer of the call itself: it was let through.
            if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                forbidden.append(f"{name} ({errno.errorcode[error.errno]})")
    state = "a filter lies over this process" if facts.is_filtered() else "no filter"
    if not forbidden:
        return yes(state)
    return no(
        Cause.RESTRICTION if facts.is_filtered() else Cause.KERNEL,
        f"refused: {', '.join(forbidden)}; {state}",
        "docker run --security-opt seccomp=PROFILE.json, with these calls allowed"
        if facts.is_filtered()
        else "Linux 5.10 or newer",
    )


def privileges() -> Outcome:
    """The capabilities that decide here."""
    held = facts.capabilities()
    detail = ", ".join(sorted(held)) or "none of those that matter here"
    if facts.has_user_namespace():
        detail += "; in a user namespace, so they do not count for the host's settings"
    if "CAP_SYS_PTRACE" in held:
        return yes(detail)
    return no(
        Cause.PERMISSION,
        f"no CAP_SYS_PTRACE (in effect: {detail})",
        "run it as root, or docker run --cap-add SYS_PTRACE …",
    )


def container() -> Outcome:
    """A container is no fault; it decides where the remedies have to be applied."""
    kind = facts.container()
    if kind is None:
        return yes("the kernel's first namespaces")
    return no(
        Cause.RESTRICTION,
        f"in a container ({kind}): settings under /proc/sys and /sys are the host's",
        "apply remedies on the host, and hand devices in with docker run --device",
    )


def memory_limit() -> Outcome:
    """Guest RAM is charged to the cgroup of whoever places the page."""
    limits = [limit for path in _limit_files() if (limit := _limit(path)) is not None]
    if not limits:
        return yes("none")
    least = min(limits)
    text = f"{least >> 20} MiB"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    if least >= total:
        return yes(f"{text}, more than this host has")
    return no(
        Cause.SETTING,
        f"{text} for this cgroup, of {total >> 20} MiB",
        "docker run --memory SIZE, or MemoryMax=SIZE in the unit, if guests are larger",
    )


def _limit(path: Path) -> int | None:
    text = facts.text_of(path)
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _limit_files() -> list[Path]:
    """memory.max of our cgroup and of those above it; both cgroup versions."""
    found = []
    for line in facts.text_of("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        below = Path(path.lstrip("/"))
        found += [top / part / name for part in (below, *below.parents)]
    return found


def security_modules() -> Outcome:
    """Which ones are active; what they forbid shows in the other rows."""
    active = facts.text_of("/sys/kernel/security/lsm")
    if facts.text_of("/sys/fs/selinux/enforce") == "1":
        active += " (SELinux enforcing)"
    return yes(active or "not shown here")


def checks() -> list[Check]:
    """The rows about restrictions."""
    optional = Tier.OPTIONAL
    return [
        Check("privileges", "CAP_SYS_PTRACE", optional, _GROUP, privileges),
        Check(
            "system-calls", "needed system calls are let through", optional, _GROUP, system_calls
        ),
        Check("no-container", "not in a container", optional, _GROUP, container),
        Check("memory-limit", "no memory limit below RAM", optional, _GROUP, memory_limit),
        Check("security-modules", "security modules", optional, _GROUP, security_modules),
    ]
