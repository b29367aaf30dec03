"""Typed errors: what failed, where, and which failures a caller treats differently.

Each carries the operation, the address and the length it was asked for, and is an ``OSError``
with the kernel's ``errno``. :func:`check` is the one place where a negative result of the C core
becomes one.
"""

import errno as e
import os
from collections.abc import Mapping


class UffdError(OSError):
    """An operation of this room failed. ``address`` and ``length`` are ``None`` where there is no
    range.
    """

    operation: str
    address: int | None
    length: int | None

    def __init__(
        self,
        errno: int,
        operation: str,
        *,
        address: int | None = None,
        length: int | None = None,
        note: str | None = None,
    ) -> None:
        super().__init__(errno, note or os.strerror(errno))
        self.operation = operation
        self.address = address
        self.length = length

    def __str__(self) -> str:
        where = "" if self.address is None else f" at {self.address:#x}"
        if self.address is not None and self.length is not None:
            where += f"+{self.length:#x}"
        return f"{self.operation}{where}: {self.strerror}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.errno, self.strerror, dict(self.__dict__))


def _rebuild(
    cls: type[UffdError], errno: int, strerror: str, attributes: dict[str, object]
) -> UffdError:
    error = cls.__new__(cls)
    OSError.__init__(error, errno, strerror)
    error.__dict__.update(attributes)
    return error


class PageAlreadyPresent(UffdError):
    """EEXIST: somebody placed the page first. The range was woken, unless ``wake=False`` was
    asked for.
    """


class HugepagePoolEmpty(UffdError):
    """The pool ran dry: EEXIST on hugetlb although the page is not there, or ENOMEM."""


class LayoutChanging(UffdError):
    """EAGAIN: an event of this context waits to be read. Read events, then try the same again."""


class RangeNotRegistered(UffdError):
    """ENOENT: not registered (any more), or the range crosses the end of its mapping."""


class RangeOwnedElsewhere(UffdError):
    """EBUSY on REGISTER: another userfaultfd has a page of the range. (7.3: or a WP/RWP mode was
    dropped.)
    """


class PageShared(UffdError):
    """EBUSY on MOVE: a source page is not exclusively ours (fork, pin, KSM). Stays until it is
    written.
    """


class NotPermitted(UffdError):
    """EPERM or EACCES: a capability, a file mode, a seal or a sysctl is in the way."""


class ProcessGone(UffdError):
    """ESRCH: the process whose memory this context serves has exited."""


class InvalidRequest(UffdError):
    """EINVAL: alignment, mode, memory type, or a call before the handshake."""


class BadAddress(UffdError):
    """EFAULT: the source is unreadable, the page lies beyond the end of its file, or CONTINUE
    found none.
    """


class OutOfMemory(UffdError):
    """ENOMEM: no page, or a memory-cgroup limit."""


class FeatureUnsupported(UffdError):
    """The kernel does not report features that were required; ``missing`` says which."""

    def __init__(self, missing: int, note: str) -> None:
        super().__init__(e.EINVAL, "UFFDIO_API", note=note)
        self.missing = missing


_BY_ERRNO: Mapping[int, type[UffdError]] = {
    e.EEXIST: PageAlreadyPresent,
    e.EAGAIN: LayoutChanging,
    e.ENOENT: RangeNotRegistered,
    e.EPERM: NotPermitted,
    e.EACCES: NotPermitted,
    e.ESRCH: ProcessGone,
    e.EINVAL: InvalidRequest,
    e.EFAULT: BadAddress,
    e.ENOMEM: OutOfMemory,
}
# The same code means different things to different operations.
_BY_OPERATION: Mapping[tuple[str, int], type[UffdError]] = {
    ("UFFDIO_REGISTER", e.EBUSY): RangeOwnedElsewhere,
    ("UFFDIO_MOVE", e.EBUSY): PageShared,
}


def error_for(
    errno: int, operation: str, *, address: int | None = None, length: int | None = None
) -> UffdError:
    """The typed error for ``errno`` (positive) of ``operation``."""
    cls = _BY_OPERATION.get((operation, errno)) or _BY_ERRNO.get(errno, UffdError)
    return cls(errno, operation, address=address, length=length)


def check(
    result: int, operation: str, *, address: int | None = None, length: int | None = None
) -> int:
    """Return ``result`` when it is a count; raise the typed error a negative errno stands for."""
    if result >= 0:
        return result
    raise error_for(-result, operation, address=address, length=length)
