"""What the destination answers on the return path, and the waits for it."""

from __future__ import annotations

from collections.abc import Iterable

from migration.native import ffi, lib
from migration.wire.extension import PING_SET_UP

from ..channel import Channel
from ..errors import MigrationError
from ..recovery import SourceRecovery
from .control import SourceControl
from .ram import SourceRam
from .return_path import ReturnPath

PING_SWITCHOVER, PING_DISCARDED, PING_HANDED = 2, 6, 7
ANSWER_TIMEOUT_S = 30.0
_ASKED_TO = {
    PING_SET_UP: "take the set-up",
    PING_DISCARDED: "drop stale pages",
    PING_HANDED: "take the memory over",
}


class SourceAnswers:
    """The return path of the channel in use; there may be none. The waits are the migration
    thread's, but for :meth:`wait`.

    :param cpus: processors for the thread that reads; none: any.
    """

    def __init__(self, ram: SourceRam, control: SourceControl, cpus: Iterable[int]) -> None:
        self._ram = ram
        self._control = control
        self._cpus = tuple(cpus)
        self._rp: ReturnPath | None = None

    def listen(self, channel: Channel, recovery: SourceRecovery | None = None) -> None:
        """Read this channel in a thread, from now on; that of an earlier one has ended.

        :param recovery: takes the messages that the native loop does not know.
        """
        self._rp = ReturnPath(
            self._ram.native,
            channel,
            cpus=self._cpus,
            recovery=recovery,
            on_allowed=self._control.wake.set,
            on_end=self._control.wait_no_longer,
        )

    @property
    def are_heard(self) -> bool:
        """There is a return path."""
        return self._rp is not None

    @property
    def shut(self) -> int | None:
        """The destination's last word, None before it came."""
        return self._rp.shut if self._rp is not None else None

    @property
    def error(self) -> Exception | None:
        """Why nothing more will come, if it was not the last word."""
        return self._rp.error if self._rp is not None else None

    @property
    def may_switch_over(self) -> bool:
        """SWITCHOVER_ACK came."""
        return self._rp is not None and self._rp.may_switch_over

    @property
    def refusal(self) -> str:
        """A last word that is not 0, for the user."""
        return (
            f"the destination refused the migration (SHUT {self.shut}); the cause is in its own "
            "error, see its console or query-migrate there"
        )

    def check_alive(self) -> None:
        """:raises Exception: the migration was cancelled, or its destination said no or is gone."""
        if self._control.is_cancelled:
            raise MigrationError("the migration was cancelled")
        if self.error is not None:
            raise self.error
        if self.shut is not None:
            raise MigrationError(self.refusal)

    def await_pong(self, value: int) -> None:
        """:raises MigrationError: the destination refused, is gone, or does not answer."""
        timeout_ms = int(ANSWER_TIMEOUT_S * 1000)
        result = lib.src_wait_pong(self._ram.native, value, 0xFFFFFFFF, timeout_ms, ffi.NULL)
        self.check_alive()
        if result < 0:
            what = _ASKED_TO.get(value, "load the devices")
            raise MigrationError(f"the destination did not {what} within {ANSWER_TIMEOUT_S:g} s")

    def await_shut(self) -> None:
        """The destination says how it ended. :raises Exception: it failed, or is gone."""
        self.wait()
        if self.error is not None:
            raise self.error
        if self.shut:
            raise MigrationError(self.refusal)

    def wait(self, timeout_s: float | None = None) -> None:
        """Any thread: until :attr:`shut` or :attr:`error` is there, or the time is over."""
        if self._rp is not None:
            self._rp.wait(timeout_s)

    def join(self) -> None:
        """Until the thread is gone. The channel must have been aborted, or SHUT have come."""
        if self._rp is not None:
            self._rp.join()
