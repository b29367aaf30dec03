"""The return-path thread of the source, for one channel: requests natively, the rest noted here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from migration.native import lib
from migration.wire.errors import RemoteStreamError
from migration.wire.return_path import SwitchoverAck, read_rp
from uffd.threads import NamedThread

from ..affinity import move_here
from ..channel import Channel
from ..errors import native_error
from ..recovery import SourceRecovery


class ReturnPath:
    """Reads until SHUT or until the channel breaks.

    :param native: ``struct src *``; ``channel`` is its channel, and the one that is read.
    :param cpus: processors for the thread; none: any.
    :param recovery: takes the messages that the native loop does not know.
    :param on_allowed: called from the thread when the destination allowed the switchover.
    :param on_end: called from it when nothing more will come.
    :ivar may_switch_over: SWITCHOVER_ACK came.
    :ivar shut: the value of SHUT, None before it came. :ivar error: why it ended without.
    """

    def __init__(
        self,
        native: Any,
        channel: Channel,
        *,
        cpus: Iterable[int],
        recovery: SourceRecovery | None,
        on_allowed: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.may_switch_over = False
        self.shut: int | None = None
        self.error: Exception | None = None
        self._native = native
        self._channel = channel
        self._cpus = tuple(cpus)
        self._recovery = recovery
        self._on_allowed = on_allowed
        self._on_end = on_end
        self._done = threading.Event()
        self._thread = NamedThread(target=self._run, name="outgoing-return-path", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        move_here(self._cpus)
        try:
            self.shut = self._read()
        except Exception as error:
            self.error = error
            if self._recovery is not None:
                self._recovery.fail(error)
        self._done.set()
        self._on_end()
        if self.error is not None or self.shut:
            # Whoever sends must learn of it, also while the socket is full.
            lib.src_stop(self._native)

    def _read(self) -> int:
        """Until SHUT; its value."""
        while True:
            result = lib.src_rp_loop(self._native)
            if result == 0:
                return int(lib.src_shut_value(self._native))
            if result < 0:
                raise native_error(self._native.rp_error, fallback="return path")
            self._take_message()

    def _take_message(self) -> None:
        """One that the native loop does not know is next."""
        at = self._channel.position
        message = read_rp(self._channel)
        if isinstance(message, SwitchoverAck):
            self.may_switch_over = True
            self._on_allowed()
        elif self._recovery is not None:
            self._recovery.take_message(message, at)
        else:
            raise RemoteStreamError(
                f"{message} outside a recovery", offset=at, section="return path"
            )

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until :attr:`shut` or :attr:`error` is there; False when the time is over."""
        return self._done.wait(timeout_s)

    def join(self) -> None:
        """Until the thread is gone. The channel must have been aborted, or SHUT have come."""
        self._thread.join()
