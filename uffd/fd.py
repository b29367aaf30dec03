"""One userfaultfd context as an object: opening, adopting, reading events, closing.

What it does to ranges is in :mod:`uffd.operations`. A context belongs to the address space that
created it, not to its holder: a received or inherited one fills its creator's memory, with COPY's
source read from the caller's.

Closing the last fd of a context unregisters everything and wakes every waiter: missing pages then
read as zeros. So an object that is merely forgotten is *not* closed by the garbage collector; it
warns.
"""

import errno
import os
import select
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from uffd import opening
from uffd._native import ffi, lib
from uffd.errors import InvalidRequest, UffdError, check
from uffd.events import MESSAGE_BYTES, Event, decode_message
from uffd.flags import Feature
from uffd.opening import KernelSupport, Opening, Way
from uffd.operations import RangeOperations

_BATCH = 64


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Waiting threads, from fdinfo: ``pending`` not yet read, ``total`` read or not."""

    pending: int
    total: int


class Userfaultfd(RangeOperations):
    """A userfaultfd after its handshake. Use :meth:`open` or :meth:`from_fd`; a context manager.

    Pollable: ``fileno()`` is readable when a message waits (only on a non-blocking fd; the kernel
    answers POLLERR on a blocking one, always). Readable does not promise a message.
    """

    def __init__(
        self,
        fd: int,
        *,
        features: Feature,
        how: Opening,
        support: KernelSupport | None = None,
        is_own_memory: bool = True,
    ) -> None:
        self._fd = fd
        self._registrations = {}
        #: What this context has enabled.
        self.features = features
        #: What the kernel reported at the handshake; ``None`` for an adopted fd.
        self.support = support
        self.opening = how
        self.is_own_memory = is_own_memory
        self.is_nonblocking = not os.get_blocking(fd)

    @classmethod
    def open(
        cls,
        features: Feature = Feature.NONE,
        *,
        optional: Feature = Feature.NONE,
        user_mode_only: bool | None = None,
        nonblocking: bool = True,
        ways: tuple[Way, ...] = (Way.DEVICE, Way.SYSCALL),
    ) -> Self:
        """Open a context on this process's memory and do the handshake.

        :param features: required; the kernel must report them all.
        :param optional: asked for if reported. Bits without a name are fine in either.
        :param user_mode_only: ``None`` falls back to user-mode-only when the rest is refused and
            records why in ``opening.refusals``; ``True`` asks for it; ``False`` never takes it.
        :param ways: tried in this order.
        :raises NotPermitted: no way is open to this user, or EVENT_FORK without CAP_SYS_PTRACE.
        :raises FeatureUnsupported: the kernel does not report a required feature.
        """
        support = opening.kernel_support(ways=ways)
        wanted = opening.select_features(support.features, features, optional)
        fd, how = opening.open_fd(user_mode_only=user_mode_only, nonblocking=nonblocking, ways=ways)
        try:
            opening.handshake(fd, wanted)
            return cls(fd, features=wanted, how=how, support=support)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int, *, is_own_memory: bool = False) -> Self:
        """Adopt a userfaultfd that came from elsewhere (SCM_RIGHTS, pidfd_getfd, inheritance).

        Takes ownership of ``fd``. The enabled features are read from the kernel's fdinfo, so
        nothing has to be known about the sender.

        :param is_own_memory: whether it was created by this very process.
        :raises InvalidRequest: not a userfaultfd, or its handshake has not been done.
        """
        features = enabled_features(fd)
        how = Opening(Way.RECEIVED, user_mode_only=False)
        return cls(fd, features=features, how=how, is_own_memory=is_own_memory)

    # -- lifetime -------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The fd. :raises ValueError: it is closed."""
        if self._fd < 0:
            raise ValueError("the userfaultfd is closed")
        return self._fd

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Close. If this was the last fd of the context, waiters go on and missing pages read as
        zeros.

        Join loops that use the fd first: a closed number may be handed out again at once.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """Give up ownership and return the fd."""
        fd, self._fd = self.fileno(), -1
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Userfaultfd fd={self._fd} {self.features!r} by {self.opening.way.value}>"

    # -- reading --------------------------------------------------------------------------------

    def read_events(self, max_count: int = _BATCH) -> list[Event]:
        """Read the messages that wait, at most ``max_count``; none is an empty list.

        On a blocking fd it sleeps (without the interpreter lock) until there is one. The thread
        that reads must never itself unmap, advise, remap or fork over a registered range: it
        would wait for itself.

        :raises UffdError: EBADF and the like.
        """
        messages = ffi.new("struct uffd_msg[]", max_count)
        while True:
            count = lib.uffd_read(self.fileno(), messages, max_count)
            if count != -errno.EINTR:
                break  # else: Python has run its signal handlers between the two calls
        check(count, "read userfaultfd")
        raw = bytes(ffi.buffer(messages, count * MESSAGE_BYTES))
        return [self.decode(raw[i : i + MESSAGE_BYTES]) for i in range(0, len(raw), MESSAGE_BYTES)]

    def decode(self, message: bytes) -> Event:
        """Decode one raw message of this context; a FORK's fd becomes an object."""
        return decode_message(
            message,
            has_thread_id=Feature.THREAD_ID in self.features,
            adopt=self._adopt_child,
        )

    def _adopt_child(self, fd: int) -> "Userfaultfd":
        """The child of a fork has its parent's features and mode, and memory of its own."""
        os.set_inheritable(fd, False)
        return Userfaultfd(
            fd, features=self.features, how=self.opening, support=self.support, is_own_memory=False
        )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until a message may be read. False when the time ran out.

        :raises InvalidRequest: the fd is blocking (the kernel cannot poll it).
        """
        return bool(self._poll(None, timeout_s))

    def _poll(self, stop: int | None, timeout_s: float | None) -> list[int]:
        if not self.is_nonblocking:
            raise InvalidRequest(errno.EINVAL, "poll userfaultfd", note="a blocking fd has no poll")
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        if stop is not None:
            poller.register(stop, select.POLLIN)
        ready = poller.poll(None if timeout_s is None else timeout_s * 1000)
        return [fd for fd, _ in ready]

    def events(self, *, timeout_s: float | None = None, stop: int | None = None) -> Iterator[Event]:
        """Yield events as they come.

        :param timeout_s: end after this long without a message; ``None`` waits for ever.
        :param stop: an fd (eventfd, pipe); the iteration ends when it is readable.
        :raises InvalidRequest: a blocking fd together with ``timeout_s`` or ``stop``.
        """
        while True:
            if self.is_nonblocking or timeout_s is not None or stop is not None:
                ready = self._poll(stop, timeout_s)
                if not ready or stop in ready:
                    return
            yield from self.read_events()

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    async def _events_async(self) -> AsyncIterator[Event]:
        import asyncio  # costs as much as the rest of the package, and few read events this way

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        fd = self.fileno()
        loop.add_reader(fd, ready.set)
        try:
            while True:
                await ready.wait()
                ready.clear()
                for event in self.read_events():
                    yield event
        finally:
            loop.remove_reader(fd)

    def __aiter__(self) -> AsyncIterator[Event]:
        """``async for event in uffd``: never ends by itself; needs a non-blocking fd."""
        if not self.is_nonblocking:
            raise InvalidRequest(errno.EINVAL, "poll userfaultfd", note="a blocking fd has no poll")
        return self._events_async()

    def queue_depth(self) -> QueueDepth:
        """How many threads wait, as the kernel counts them."""
        info = opening.read_fdinfo(self.fileno())
        return QueueDepth(int(info["pending"]), int(info["total"]))


def enabled_features(fd: int) -> Feature:
    """The features a context has enabled, read from the kernel's fdinfo (``API:
    aa:FEATURES:IOCTLS``).

    :raises InvalidRequest: not a userfaultfd, or its handshake has not been done.
    """
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:
        raise UffdError(error.errno or errno.EBADF, "adopt userfaultfd") from None
    if target != "anon_inode:[userfaultfd]":
        raise InvalidRequest(errno.EINVAL, "adopt userfaultfd", note=f"fd {fd} is {target}")
    features = opening.features_in(opening.read_fdinfo(fd))
    if features is None:
        raise InvalidRequest(
            errno.EINVAL, "adopt userfaultfd", note="its UFFDIO_API handshake has not been done"
        )
    return features
