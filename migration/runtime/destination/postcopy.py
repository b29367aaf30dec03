"""The postcopy of a destination: RAM is sensitive, one thread asks for pages, one places them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from migration.engine.states import Incoming, IncomingInput, StatusInput
from migration.native import lib
from migration.wire.errors import RemoteStreamError
from migration.wire.extension import Feature
from uffd.threads import NamedThread

from ..affinity import move_here
from ..errors import MigrationError, native_error
from .end import DestinationEnd
from .parts import DestinationParts
from .resume import DestinationResumption

LOOPS_BEGIN_TIMEOUT_S = 10


class DestinationPostcopy:
    """From LISTEN to END. What is done there is native, from fault to placed page."""

    def __init__(
        self, parts: DestinationParts, resumption: DestinationResumption, end: DestinationEnd
    ) -> None:
        self._parts = parts
        self._resumption = resumption
        self._end = end
        self._threads: list[threading.Thread] = []
        self._stop_fault_fd = os.eventfd(0, os.EFD_CLOEXEC)

    def listen(self, at: int) -> None:
        """Main thread: RAM becomes sensitive. From here on a touch of a missing page asks the
        source for it.

        :raises MigrationError: the threads do not come up, or RAM cannot be registered.
        """
        parts = self._parts
        was_discarded = parts.phase.state is Incoming.DISCARD
        parts.phase.advance(IncomingInput.LISTEN, at)
        if not was_discarded:
            parts.channels.end_multifd()
            parts.ram.forbid_thp()
        self._sensitise()
        if parts.options.blocktime:
            parts.ram.watch_vcpus(parts.machine.vcpu_thread_ids())
        parts.machine.attach_received(parts.ram.received)
        parts.channels.start_urgent()
        self._start_thread("fault", self._fault_thread)
        self._start_thread("listen", self._listen_thread)
        self._await_loops()
        parts.report.advance(StatusInput.PACKAGE_SENT)
        parts.report.advance(StatusInput.POSTCOPY)

    def _sensitise(self) -> None:
        parts = self._parts
        sensitised = parts.memory.arm()
        run_alone = Feature.SPLIT_RUN in parts.channels.features
        parts.channels.bound_in_flight()
        lib.dst_start_postcopy(
            parts.ram.native,
            sensitised.fd,
            self._stop_fault_fd,
            parts.phase.run_fd if run_alone else -1,
            threading.get_native_id(),
            sensitised.pending.address,
            sensitised.watchdog.address,
        )

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = NamedThread(target=target, name=f"incoming-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _await_loops(self) -> None:
        """A device's load may touch a missing page with the GIL held: nobody may still need it
        then."""
        loops = 3 if self._parts.channels.has_urgent else 2
        if lib.dst_await_loops(self._parts.ram.native, loops, LOOPS_BEGIN_TIMEOUT_S) < 0:
            what = "the fault and listen threads" if loops == 2 else "the preempt channel"
            raise MigrationError(f"{what} did not come up within {LOOPS_BEGIN_TIMEOUT_S} s")

    # -- the threads ----------------------------------------------------------

    def _fault_thread(self) -> None:
        move_here(self._parts.options.fault_cpus)
        native = self._parts.ram.native
        if lib.dst_fault_loop(native) < 0:
            error = native_error(native.fault_error, fallback="fault thread")  # type: ignore[attr-defined]
            self._parts.failure.stream_failed(error)

    def _listen_thread(self) -> None:
        move_here(self._parts.options.fault_cpus)
        while True:
            try:
                self._read_to_end()
                return
            except Exception as error:
                self._parts.failure.stream_failed(error)
            if not self._resumption.wait():
                return

    def _read_to_end(self) -> None:
        native = self._parts.ram.native
        event = lib.dst_listen_loop(native)
        if event < 0:
            raise native_error(native.main.error, fallback="listen thread")  # type: ignore[attr-defined]
        if event != 0:
            raise RemoteStreamError(
                "what comes here is not for a RAM-only postcopy",
                offset=self._parts.channels.main.position,
            )
        self._end.of_stream()
        self._parts.channels.stop_urgent()
        self.stop()
        self._end.of_postcopy()

    def stop(self) -> None:
        """End the fault thread, and wait for the others: they must have a reason to end."""
        os.eventfd_write(self._stop_fault_fd, 1)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def close(self) -> None:
        """After :meth:`stop`."""
        os.close(self._stop_fault_fd)
