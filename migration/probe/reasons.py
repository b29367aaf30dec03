"""Why a userfaultfd cannot be had, found out by trying the other ways, and what would change it."""

from __future__ import annotations

import errno
import grp
import os
import stat
from contextlib import suppress

from uffd import UffdError, Userfaultfd, Way

from . import facts
from .row import Cause, Outcome, no

_DEVICE = "/dev/userfaultfd"
_CONTAINER_DEVICE = f"docker run --device {_DEVICE} …"
_UNPRIVILEGED = "sysctl -w vm.unprivileged_userfaultfd=1 (as root), or run with CAP_SYS_PTRACE"
_FILTER = (
    "allow userfaultfd in the filter (docker run --security-opt seccomp=PROFILE.json), "
    f"or be given {_DEVICE}, which a filter on userfaultfd(2) does not cover"
)


def refusal(way: Way, *, user_mode_only: bool) -> UffdError | None:
    """Try one way; ``None`` when it is open."""
    try:
        with Userfaultfd.open(user_mode_only=user_mode_only, ways=(way,)):
            return None
    except UffdError as error:
        return error


def why_not_device(error: UffdError) -> Outcome:
    """No by the device, as a row."""
    if error.errno == errno.ENOENT:
        return no_device_node("userfaultfd", _DEVICE, "6.1")
    if error.errno == errno.EACCES:
        return no(Cause.PERMISSION, mode_of(_DEVICE), open_file_to_user(_DEVICE))
    if error.errno == errno.EPERM:
        return no(
            Cause.RESTRICTION,
            "a device policy (cgroup) keeps this process from it",
            f"{_CONTAINER_DEVICE}, or DeviceAllow={_DEVICE} rw in the unit",
        )
    return no(Cause.KERNEL, f"{_DEVICE}: {error.strerror}")


def no_device_node(device: str, path: str, since: str | None) -> Outcome:
    """There is no such file: the kernel has no such device, or only /dev lacks it."""
    minor = facts.misc_minor(device)
    if minor is None:
        remedy = f"Linux {since} or newer" if since else None
        return no(Cause.KERNEL, f"no {path}, and the kernel has no such device", remedy)
    if facts.container() is not None:
        remedy = f"docker run --device {path} …"
    else:
        remedy = f"mknod -m 600 {path} c 10 {minor} (as root)"
    return no(Cause.RESTRICTION, f"the kernel has the device, but there is no {path} here", remedy)


def mode_of(path: str) -> str:
    """``/dev/kvm is 0660 root:kvm, this is nobody``."""
    try:
        found = os.stat(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    mode = stat.S_IMODE(found.st_mode)
    owner = f"uid {found.st_uid}, gid {found.st_gid}"
    return f"{path} has mode {mode:04o} ({owner}); this is {facts.user_name()}"


def open_file_to_user(path: str) -> str:
    """The command that lets this very user in: its group, if that has a way in, or an ACL."""
    with suppress(OSError, KeyError):
        found = os.stat(path)
        if found.st_gid and stat.S_IMODE(found.st_mode) & 0o060 == 0o060:
            group = grp.getgrgid(found.st_gid).gr_name
            return f"usermod -aG {group} {facts.user_name()} (as root), then log in again"
    return f"setfacl -m u:{facts.user_name()}:rw {path} (as root)"


def why_not_syscall(error: UffdError, *, user_mode_only: bool) -> Outcome:
    """No by the system call, as a row.

    Anybody may ask for user-mode faults only, so a refusal of that too is no question of
    privilege: something filters.
    """
    if error.errno == errno.ENOSYS and not facts.SYSCTL_UNPRIVILEGED.exists():
        return no(
            Cause.KERNEL,
            "the kernel was built without CONFIG_USERFAULTFD",
            "a kernel with CONFIG_USERFAULTFD=y",
        )
    if error.errno == errno.ENOSYS:
        return no(Cause.RESTRICTION, "a filter answers ENOSYS to userfaultfd(2)", _FILTER)
    if error.errno == errno.EPERM:
        other = error if user_mode_only else refusal(Way.SYSCALL, user_mode_only=True)
        if other is not None and other.errno == errno.EPERM:
            return _why_filtered()
        return _why_unprivileged()
    if error.errno == errno.EINVAL and user_mode_only:
        return no(Cause.KERNEL, "UFFD_USER_MODE_ONLY is unknown", "Linux 5.11 or newer")
    return no(Cause.KERNEL, f"userfaultfd(2): {error.strerror}")


def _why_unprivileged() -> Outcome:
    value = facts.text_of(facts.SYSCTL_UNPRIVILEGED) or "unknown"
    return no(
        Cause.PERMISSION,
        f"vm.unprivileged_userfaultfd={value} and no CAP_SYS_PTRACE",
        _UNPRIVILEGED,
    )


def _why_filtered() -> Outcome:
    if facts.is_filtered():
        return no(
            Cause.RESTRICTION, "a system call filter (seccomp) forbids userfaultfd(2)", _FILTER
        )
    modules = facts.text_of("/sys/kernel/security/lsm") or "unknown"
    return no(
        Cause.RESTRICTION,
        f"a security module forbids userfaultfd(2) (active: {modules})",
        "allow it in the policy; its denial is in the audit log: ausearch -m avc -ts recent",
    )


def why_no_kernel_faults() -> Outcome:
    """Neither way gives a context that sees faults of the kernel and of KVM."""
    device = refusal(Way.DEVICE, user_mode_only=False)
    call = refusal(Way.SYSCALL, user_mode_only=False)
    if call is None or device is None:  # it works by now: somebody changed it meanwhile
        return no(Cause.UNEXPECTED, "it was refused and then allowed", "run the probe again")
    by_call = why_not_syscall(call, user_mode_only=False)
    by_device = why_not_device(device)
    cause = by_call.cause or Cause.PERMISSION
    remedies = [by_call.remedy]
    if by_device.cause in (Cause.PERMISSION, Cause.RESTRICTION):
        remedies.append(by_device.remedy)
    return no(
        cause,
        f"{by_call.reason}; {by_device.reason}",
        "; or ".join(remedy for remedy in dict.fromkeys(remedies) if remedy) or None,
    )


def why_no_fork_event() -> Outcome:
    """EPERM from the handshake: a forked child's memory would be handed to the parent."""
    return no(
        Cause.PERMISSION,
        "EVENT_FORK needs CAP_SYS_PTRACE",
        "run it as root, or with CAP_SYS_PTRACE",
    )
