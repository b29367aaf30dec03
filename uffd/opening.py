"""Getting a userfaultfd: the three ways, and the two-step handshake.

The kernel answers an unknown feature bit by refusing the whole handshake and telling nothing, and a
handshake cannot be repeated on the same fd. So the reported set is learnt on a throw-away fd
first, and the real one asks for a subset of it.
"""

import errno
import os
from dataclasses import dataclass
from enum import Enum

from uffd._native import ffi, lib
from uffd.errors import FeatureUnsupported, NotPermitted, UffdError, check, error_for
from uffd.flags import API_INITIALISED, USER_MODE_ONLY, Feature, Ioctls


class Way(Enum):
    """How the fd came to be."""

    DEVICE = "/dev/userfaultfd"
    SYSCALL = "userfaultfd(2)"
    RECEIVED = "received from another process"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One way that was tried and refused, with the reason as the kernel gave it and what it
    means.
    """

    way: Way
    user_mode_only: bool
    errno: int
    reason: str


@dataclass(frozen=True, slots=True)
class Opening:
    """How a context was obtained.

    ``user_mode_only`` contexts do not trap faults raised inside system calls (those fail with
    EFAULT) nor KVM's: they are no use for a KVM guest.
    """

    way: Way
    user_mode_only: bool
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What the running kernel reports, whatever a context enables."""

    features: Feature
    ioctls: Ioctls


_REASONS = {
    (Way.DEVICE, errno.ENOENT): "no /dev/userfaultfd (Linux before 6.1, or not in this container)",
    (Way.DEVICE, errno.EACCES): "the file mode of /dev/userfaultfd does not let this user in",
    (Way.DEVICE, errno.EPERM): "a device policy keeps this process from /dev/userfaultfd",
    (Way.SYSCALL, errno.EPERM): "vm.unprivileged_userfaultfd=0 and no CAP_SYS_PTRACE",
    (Way.SYSCALL, errno.ENOSYS): "the kernel was built without CONFIG_USERFAULTFD",
}


def _try(way: Way, flags: int, user_mode_only: bool) -> int | Refusal:
    if user_mode_only:
        flags |= USER_MODE_ONLY
    opener = lib.uffd_open_dev if way is Way.DEVICE else lib.uffd_open_syscall
    result = opener(flags)
    if result >= 0:
        return result
    if user_mode_only and way is Way.SYSCALL and result == -errno.EINVAL:
        reason = "the kernel does not know UFFD_USER_MODE_ONLY (Linux before 5.11)"
    else:
        reason = _REASONS.get((way, -result), os.strerror(-result))
    return Refusal(way, user_mode_only, -result, reason)


def open_fd(
    *, user_mode_only: bool | None, nonblocking: bool, ways: tuple[Way, ...]
) -> tuple[int, Opening]:
    """Open a context, before its handshake: device, then syscall, then user-mode-only.

    :param user_mode_only: ``None`` falls back to it when everything else was refused; ``True``
        asks for it outright; ``False`` never does.
    :raises NotPermitted: every way was refused for want of permission.
    :raises UffdError: every way was refused for another reason.
    """
    flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
    attempts = [(way, bool(user_mode_only)) for way in ways]
    if user_mode_only is None:
        attempts += [(Way.SYSCALL, True)] if Way.SYSCALL in ways else []
    refusals: list[Refusal] = []
    for way, restricted in attempts:
        got = _try(way, flags, restricted)
        if isinstance(got, int):
            return got, Opening(way, restricted, tuple(refusals))
        refusals.append(got)
    raise _refused(refusals)


def _refused(refusals: list[Refusal]) -> UffdError:
    note = "; ".join(f"{r.way.value}: {r.reason}" for r in refusals)
    codes = {r.errno for r in refusals}
    for code in (errno.EPERM, errno.EACCES):
        if code in codes:
            return NotPermitted(code, "open userfaultfd", note=note)
    last = refusals[-1].errno if refusals else errno.EINVAL
    return UffdError(last, "open userfaultfd", note=note or "no way to open was given")


def handshake(fd: int, features: Feature) -> KernelSupport:
    """UFFDIO_API. Can succeed once per fd; after a refusal the same fd may be tried again.

    :returns: what the kernel supports, which is not what was enabled.
    :raises InvalidRequest: a feature the kernel does not know, or a second handshake.
    :raises NotPermitted: EVENT_FORK without CAP_SYS_PTRACE.
    """
    reported, ioctls = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.uffd_api(fd, int(features), reported, ioctls), "UFFDIO_API")
    return KernelSupport(Feature(reported[0]), Ioctls(ioctls[0]))


def kernel_support(*, ways: tuple[Way, ...] = (Way.DEVICE, Way.SYSCALL)) -> KernelSupport:
    """Ask the kernel, on a throw-away context, what it supports. Works unprivileged
    (user-mode-only).
    """
    fd, _ = open_fd(user_mode_only=None, nonblocking=True, ways=ways)
    try:
        return handshake(fd, Feature.NONE)
    finally:
        os.close(fd)


def select_features(reported: Feature, required: Feature, optional: Feature) -> Feature:
    """The set to ask for: everything required, and the optional ones the kernel reports.

    ``WP_ASYNC`` switches ``WP_UNPOPULATED`` on by itself; that is the kernel's doing and shows in
    fdinfo.

    :raises FeatureUnsupported: a required feature is not reported.
    """
    missing = Feature(
        int(required) & ~int(reported)
    )  # plain ints: IntFlag's ~ forgets unknown bits
    if missing:
        raise FeatureUnsupported(
            int(missing), f"the kernel does not report {missing!r}; it reports {int(reported):#x}"
        )
    return required | (optional & reported)


def read_fdinfo(fd: int, pid: int | None = None) -> dict[str, str]:
    """The fields of ``/proc/PID/fdinfo/FD``; of ours unless told.

    :raises UffdError: EBADF, also where the process is gone. :raises NotPermitted: somebody else's.
    """
    process = "self" if pid is None else pid
    try:
        with open(f"/proc/{process}/fdinfo/{fd}", encoding="ascii") as lines:
            pairs = (line.partition(":") for line in lines)
            return {name: value.strip() for name, _, value in pairs}
    except (FileNotFoundError, ProcessLookupError):
        raise error_for(errno.EBADF, "fdinfo") from None
    except PermissionError as error:
        raise error_for(error.errno or errno.EACCES, "fdinfo") from None


def features_in(fdinfo: dict[str, str]) -> Feature | None:
    """What a userfaultfd has enabled, by its fdinfo (``API: aa:FEATURES:IOCTLS``); ``None``: its
    handshake has not been done.
    """
    _, features, _ = fdinfo["API"].split(":")
    bits = int(features, 16)
    return Feature(bits & ~API_INITIALISED) if bits & API_INITIALISED else None
