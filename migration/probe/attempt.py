"""How checks try things: contexts, sleepers, fault messages, and errors turned into answers.

A check runs in a process of its own that ends right after the answer, so nothing here is ever
closed or joined: the kernel does that. It also means that a check which fails half-way may leave a
thread asleep on a missing page.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from uffd import (
    Event,
    Feature,
    FeatureUnsupported,
    HugepagePoolEmpty,
    NotPermitted,
    OutOfMemory,
    PageFault,
    UffdError,
    Userfaultfd,
    kernel_support,
    touch,
)

from . import reasons
from .row import Cause, Outcome, no, untested

#: Of the time a check has: a check that waits in vain should still be able to say for what.
_SHARE = 0.6
MARK = 0x5A

T = TypeVar("T")


class _Effort:
    """How long things that should happen at once may take in this process; how far to go."""

    patience_s = 1.2
    is_thorough = False


def set_effort(timeout_s: float, *, is_thorough: bool) -> None:
    """Tell how long a check may take, and whether to try what takes seconds; before the first."""
    _Effort.patience_s = _SHARE * timeout_s
    _Effort.is_thorough = is_thorough


def patience_s() -> float:
    """How long to wait for what should happen at once."""
    return _Effort.patience_s


def is_thorough() -> bool:
    """Also what takes seconds: to fill a page of 1 GiB."""
    return _Effort.is_thorough


class Answer(Exception):
    """Ends a check with this outcome, from any depth."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class Unexpected(Exception):
    """The kernel accepted it, and then did something else; the text says what."""


def answer_for(error: Exception, since: str | None) -> Outcome:
    """What an error that ended a check says about its row.

    :param since: the release that brings what was tried, if it is known.
    """
    remedy = f"Linux {since} or newer" if since else None
    if isinstance(error, Answer):
        return error.outcome
    if isinstance(error, Unexpected):
        return no(Cause.UNEXPECTED, str(error), "report it: this kernel does not do as it says")
    if isinstance(error, FeatureUnsupported):
        name = names_of(Feature(error.missing))
        return no(Cause.KERNEL, f"this kernel does not report {name}", remedy)
    if isinstance(error, HugepagePoolEmpty | OutOfMemory):
        return untested(Cause.RESOURCE, str(error), "free some memory")
    if isinstance(error, NotPermitted):
        return no(Cause.PERMISSION, str(error), "run it as root")
    if isinstance(error, UffdError):
        # Not where: an address says nothing about the host.
        return no(Cause.KERNEL, f"{error.operation}: {error.strerror}", remedy)
    if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
        return no(Cause.PERMISSION, str(error), "run it as root")
    if isinstance(error, OSError):
        return no(Cause.KERNEL, str(error), remedy)
    return untested(Cause.LOST, f"the check failed: {type(error).__name__}: {error}")


def names_of(features: Feature) -> str:
    """``WP_ASYNC``, ``RWP and RWP_ASYNC``, ``bit 21``."""
    names = []
    for bit in range(64):
        flag = Feature(1 << bit)
        if int(features) & int(flag):
            names.append(flag.name or f"bit {bit}")
    return " and ".join(names) or "nothing"


def open_context(
    features: Feature = Feature.NONE,
    *,
    optional: Feature = Feature.NONE,
    kernel_faults: bool = False,
) -> Userfaultfd:
    """A context, user-mode-only if nothing better is to be had and ``kernel_faults`` is false.

    :raises Answer: it cannot be had; the row then says why.
    :raises FeatureUnsupported: the kernel does not report a feature.
    """
    try:
        kernel_support()
    except UffdError:
        raise Answer(
            untested(
                Cause.PREREQUISITE, "no userfaultfd to be had", "postcopy probe --feature open"
            )
        ) from None
    mode = False if kernel_faults else None
    try:
        return Userfaultfd.open(features, optional=optional, user_mode_only=mode)
    except NotPermitted as error:
        if error.operation == "UFFDIO_API":
            raise Answer(reasons.why_no_fork_event()) from None
        remedy = "postcopy probe --feature kernel-faults"
        raise Answer(
            untested(Cause.PREREQUISITE, "only faults of user mode can be had", remedy)
        ) from None


class Sleeper(Generic[T]):
    """A thread that does one thing, without the interpreter lock wherever it may sleep."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._action())
        except BaseException as error:
            self._error = error
        self._done.set()

    def result(self) -> T:
        """What the action returned. :raises Unexpected: it sleeps on. Or what the action raised."""
        if not self._done.wait(patience_s()):
            raise Unexpected("the thread was not woken")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def ends_within(self, seconds: float) -> bool:
        """Whether the action ends, well or badly, within that time."""
        return self._done.wait(seconds)


def loading(address: int) -> Sleeper[int]:
    """A thread that reads one byte."""
    return Sleeper(lambda: touch.load(address))


def storing(address: int, value: int) -> Sleeper[None]:
    """A thread that writes one byte."""
    return Sleeper(lambda: touch.store(address, value))


def next_event(uffd: Userfaultfd) -> Event:
    """The next message. :raises Unexpected: none came."""
    for event in uffd.events(timeout_s=patience_s()):
        return event
    raise Unexpected("no message came")


def next_fault(uffd: Userfaultfd, address: int) -> PageFault:
    """The next message, which must be a fault at ``address``.

    :raises Unexpected: another message, or none.
    """
    event = next_event(uffd)
    if not isinstance(event, PageFault):
        raise Unexpected(f"{type(event).__name__} came instead of a fault")
    if event.address != address:
        raise Unexpected(f"the fault was reported {event.address - address:+#x} bytes off")
    return event


def expect(ok: object, otherwise: str) -> None:
    """:raises Unexpected: ``ok`` is false."""
    if not ok:
        raise Unexpected(otherwise)


def page_bytes(length: int) -> bytes:
    """Content for a page: every byte :data:`MARK`."""
    return bytes([MARK]) * length


def base_page() -> int:
    """Bytes of a base page of this host."""
    return os.sysconf("SC_PAGESIZE")
