"""Answer the faults of a context from a thread of C code.

The loop reads messages, places pages and wakes sleepers without the interpreter lock; the rules it
follows (duplicates, EEXIST, EAGAIN, REMOVE, mremap) are in ``csrc/handler.h``. With native
sources only it keeps serving even a thread that touches the range through a plain ``memoryview``
while holding the lock. With a :class:`uffd.sources.CallableSource` it cannot: see the rule there,
and
:mod:`uffd.watchdog`, which finds the misuse.
"""

import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from uffd._native import ffi, lib
from uffd.errors import HugepagePoolEmpty, UffdError, error_for
from uffd.events import MESSAGE_BYTES, Event
from uffd.fd import Userfaultfd
from uffd.pending import PendingFaults
from uffd.sources import BoundSource, Served
from uffd.threads import NamedThread

_FOREIGN = 1
_EVENTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class FaultStatistics:
    """Counters of one handler since it was made.

    ``latency_ns`` is a histogram: entry i counts faults served in [2**i, 2**(i+1)) ns, from the
    reading of the message to the page in place.
    """

    missing: int
    minor: int
    duplicates: int
    placed_bytes: int
    zero_bytes: int
    already_present: int
    retries: int
    vanished: int
    removes: int
    remaps: int
    unmaps: int
    forks: int
    passed_on: int
    events_dropped: int
    serve_ns_total: int
    serve_ns_max: int
    latency_ns: tuple[int, ...]


class FaultHandler:
    """Serves ranges of one context; a context manager that starts and stops.

    :param uffd: a non-blocking context whose ranges are registered already (or will be); stays
        the caller's. The handler holds a duplicate, so the context lives as long as either.
    :param served: the ranges with their page sources. Faults elsewhere go to ``on_event``.
    :param on_event: called on a thread of its own with everything the loop does not settle:
        events of the context, faults outside every range, write-protect faults. It may use
        ``uffd`` to resolve them. A
        :class:`uffd.events.Fork` carries the child's context: serve it or keep it open, because
        closing it gives the child zeros. Without ``on_event`` such faults stay asleep and
        children unserved.

    No other thread may read ``uffd`` meanwhile. Other threads may place pages (prefetch).
    """

    def __init__(
        self,
        uffd: Userfaultfd,
        served: Sequence[Served],
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.uffd = uffd
        self.pending = PendingFaults()
        self._on_event = on_event
        # Our own duplicate: a number closed under the loop could be somebody else's file a moment
        # later.
        self._fd = os.dup(uffd.fileno())
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._bound: list[BoundSource] = []
        self._core: Any = ffi.new("struct fault_handler *")
        self._handle = ffi.new_handle(self)
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._is_open = True
        try:
            self._bound = [BoundSource(s) for s in served]
            self._initialise()
        except BaseException:
            self._release()
            raise

    @property
    def needs_python(self) -> bool:
        """Whether a missing page may need the interpreter lock to come."""
        return any(bound.fetch is not None for bound in self._bound)

    def _initialise(self) -> None:
        ranges = ffi.new("struct fault_range[]", max(len(self._bound), 1))
        for i, bound in enumerate(self._bound):
            ranges[i].start, ranges[i].len = bound.start, bound.extent
            ranges[i].page_size, ranges[i].unit = bound.page_size, bound.unit
            ranges[i].source, ranges[i].source_len = bound.address, bound.length
            ranges[i].kind = bound.kind
        flags = 0 if self.uffd.is_own_memory else _FOREIGN
        result = lib.fault_handler_init(
            self._core,
            self._fd,
            self._stop_fd,
            self._notify_fd,
            ranges,
            len(self._bound),
            flags,
        )
        if result < 0:
            raise error_for(-result, "fault handler")
        self._core.pending = self.pending.pointer
        self._core.fetch = lib.uffd_fetch_from_python
        self._core.context = self._handle

    # -- running --------------------------------------------------------------------------------

    def start(self) -> None:
        """Start (again): the sleepers of every range are woken first, so none is forgotten.

        When it returns the loop runs and needs the GIL no more, so that even a thread that holds it
        may touch a missing page (of a source that is not Python).

        :raises ValueError: closed or running.
        """
        if not self._is_open or self._threads:
            raise ValueError("the handler is closed or running")
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stop_fd)
        self._failure = None
        self._threads = [NamedThread(target=self._run, name="uffd-faults", daemon=True)]
        if self._on_event is not None:
            events = NamedThread(target=self._pump_events, name="uffd-events", daemon=True)
            self._threads.append(events)
        for thread in self._threads:
            thread.start()
        lib.fault_handler_await_run(self._core)

    def _run(self) -> None:
        result = lib.fault_handler_run(self._core)
        if result < 0 and self._failure is None:
            self._failure = self._error(-result)
        os.eventfd_write(self._stop_fd, 1)

    def _error(self, code: int) -> UffdError:
        address = int(self._core.failed_address) or None
        if code == errno.ENOMEM and address is not None and self._is_huge(address):
            return HugepagePoolEmpty(code, "UFFDIO_COPY", address=address)
        return error_for(code, "fault handler", address=address)

    def _is_huge(self, address: int) -> bool:
        base = os.sysconf("SC_PAGESIZE")
        return any(bound.page_size > base and address in bound for bound in self._bound)

    @property
    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Stop and wait for the threads. Sleepers keep sleeping. :raises: what :meth:`join`
        raises.
        """
        os.eventfd_write(self._stop_fd, 1)
        self.join()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the loop ended; False when the time ran out.

        :raises UffdError: a page could not be had; the address is its fault's.
        :raises Exception: what a callable source or ``on_event`` raised.
        """
        for thread in self._threads:
            thread.join(timeout_s)
        if self.is_running:
            return False
        self._threads = []
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return True

    def close(self) -> None:
        """Stop and free everything; the context stays open. :raises: what :meth:`join` raises."""
        if not self._is_open:
            return
        try:
            self.stop()
        finally:
            self._release()

    def _release(self) -> None:
        self._is_open = False
        if self._core is not None:
            lib.fault_handler_deinit(self._core)
            self._core = None
        for bound in self._bound:
            bound.release()
        for fd in (self._fd, self._stop_fd, self._notify_fd):
            os.close(fd)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- the Python ends ------------------------------------------------------------------------

    def fetch(self, key: int, length: int) -> bytes:
        """The bytes of a callable source for original address ``key``. Called by the loop."""
        for bound in self._bound:
            if bound.fetch is not None and key in bound:
                data = bytes(bound.fetch(key - bound.start, length))
                if len(data) != length:
                    raise ValueError(f"page source gave {len(data)} bytes, not {length}")
                return data
        raise LookupError(f"no page source for {key:#x}")

    def fail(self, error: BaseException) -> None:
        """Remember why the loop has to end. Called by the loop."""
        self._failure = error

    def _pump_events(self) -> None:
        poller = select.poll()
        poller.register(self._stop_fd, select.POLLIN)
        poller.register(self._notify_fd, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poller.poll()]
                if self._notify_fd in ready:
                    os.eventfd_read(self._notify_fd)
                    self._hand_out_events()
                elif self._stop_fd in ready:
                    return
        except BaseException as error:
            self._failure = self._failure or error
            os.eventfd_write(self._stop_fd, 1)

    def _hand_out_events(self) -> None:
        assert self._on_event is not None
        messages = ffi.new("struct uffd_msg[]", _EVENTS_AT_ONCE)
        while count := lib.fault_handler_take_events(self._core, messages, _EVENTS_AT_ONCE):
            raw = bytes(ffi.buffer(messages, count * MESSAGE_BYTES))
            for at in range(0, len(raw), MESSAGE_BYTES):
                self._on_event(self.uffd.decode(raw[at : at + MESSAGE_BYTES]))

    def statistics(self) -> FaultStatistics:
        """A copy of the counters, safe while the loop runs. :raises ValueError: closed.

        A page wakes its sleeper before it is counted, so a running loop may be one round ahead.
        """
        if self._core is None:
            raise ValueError("the handler is closed")
        raw = ffi.new("struct fault_stats *")
        lib.fault_handler_stats(self._core, raw)
        names = FaultStatistics.__slots__[:-1]
        counters = {name: int(getattr(raw, name)) for name in names}
        return FaultStatistics(**counters, latency_ns=tuple(raw.latency))


@ffi.def_extern(error=-errno.EIO)
def uffd_fetch_from_python(context: Any, offset: int, into: Any, length: int) -> int:
    """Called by the C loop, which has no interpreter lock; cffi takes it."""
    handler: FaultHandler = ffi.from_handle(context)
    try:
        ffi.buffer(into, length)[:] = handler.fetch(offset, length)
    except BaseException as error:
        handler.fail(error)
        return -errno.ECANCELED
    return 0
