"""Multifd channels at run time: a thread for each, which runs a native loop and holds no GIL.

The source's half hands pages to them (``csrc/src_multifd.c``), the destination's stores what comes
(``csrc/dst_multifd.c``). They are for the time before postcopy: :meth:`stop` ends them, and the
main channel carries all that follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from migration.native import lib
from migration.wire.multifd import Greeting, encode_greeting
from uffd.threads import NamedThread

from .channel import Channel
from .errors import MigrationError, native_error


class MultifdChannels:
    """What both halves have in common.

    :param channels: in the order of their numbers; closed by :meth:`close`.
    :param failed: called from a channel's thread when it broke or brought bad bytes.
    """

    _name = ""

    def __init__(
        self,
        native: Any,
        channels: Sequence[Channel],
        failed: Callable[[Exception], None],
    ) -> None:
        self._native = native
        self._channels = tuple(channels)
        self._failed = failed
        self._threads: list[threading.Thread] = []
        self._is_stopped = False

    def _loop(self, index: int) -> int:
        raise NotImplementedError

    def _error(self, index: int) -> Any:
        raise NotImplementedError

    def _stop_loops(self) -> None:
        raise NotImplementedError

    def _start_threads(self) -> None:
        for index in range(len(self._channels)):
            thread = NamedThread(
                target=self._run, args=(index,), name=f"{self._name}-{index}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _run(self, index: int) -> None:
        if self._loop(index) < 0 and not self._is_stopped:
            self._failed(native_error(self._error(index), fallback=f"multifd channel {index}"))

    def abort(self) -> None:
        """Any thread: whoever waits for a channel, or in one, returns with an error."""
        self._is_stopped = True
        if self._native is not None:
            self._stop_loops()
        for channel in self._channels:
            channel.abort()

    def stop(self) -> None:
        """End the loops and join their threads; not from one of them."""
        self._is_stopped = True
        if self._native is not None:
            self._stop_loops()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """:meth:`stop`, and close the connections. Before the native object is freed."""
        self.stop()
        self._native = None
        for channel in self._channels:
            channel.close()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._channels)


class MultifdSenders(MultifdChannels):
    """The source's channels, behind their greetings; see :func:`connect_senders`.

    :param native: ``struct src *``.
    :param each_section: all channels meet at each EOS, as up to QEMU 8.0, not only at a flush.
    """

    _name = "outgoing-multifd"

    def __init__(
        self,
        native: Any,
        channels: Sequence[Channel],
        failed: Callable[[Exception], None],
        *,
        each_section: bool,
    ) -> None:
        super().__init__(native, channels, failed)
        self._last_bytes = [0] * len(channels)
        if lib.src_multifd_init(native, len(channels), each_section) < 0:
            raise MemoryError(f"{len(channels)} multifd channels")
        for index, channel in enumerate(channels):
            lib.src_multifd_set_channel(native, index, channel.native)

    def start(self, *, is_framed: bool) -> None:
        """From here on they send what they are given.

        :param is_framed: what follows the greeting goes in checksummed frames.
        """
        if is_framed:
            for channel in self._channels:
                channel.set_write_framed()
        self._start_threads()

    @property
    def bytes_sent(self) -> list[int]:
        """Per channel, greeting and frames included; of closed ones the last figures."""
        now = [channel.bytes_sent for channel in self._channels]
        self._last_bytes = [max(pair) for pair in zip(now, self._last_bytes, strict=True)]
        return self._last_bytes

    def _loop(self, index: int) -> int:
        return lib.src_multifd_loop(self._native, index)

    def _error(self, index: int) -> Any:
        return lib.src_multifd_error(self._native, index)

    def _stop_loops(self) -> None:
        lib.src_multifd_stop(self._native)


def connect_senders(
    native: Any,
    connect: Callable[[], Channel],
    count: int,
    *,
    vm: UUID | None,
    each_section: bool,
    check_alive: Callable[[], None],
    failed: Callable[[Exception], None],
) -> MultifdSenders:
    """Open ``count`` channels and greet on each; none stays open if one cannot be had.

    :param vm: UUID of this VM; the destination's must be the same.
    :param check_alive: asked before each; raises when nobody wants them any more.
    :raises MigrationError: one cannot be had. :raises MemoryError: no room for them.
    """
    channels: list[Channel] = []
    try:
        for index in range(count):
            check_alive()
            channels.append(_connect(connect, index, count))
            channels[-1].write(encode_greeting(Greeting(index, vm)))
            channels[-1].flush()
        return MultifdSenders(native, channels, failed, each_section=each_section)
    except BaseException:
        for channel in channels:
            channel.close()
        raise


def _connect(connect: Callable[[], Channel], index: int, count: int) -> Channel:
    try:
        return connect()
    except MigrationError as error:
        raise MigrationError(
            f"multifd channel {index} of {count}: {error}; capability multifd and multifd-channels "
            "must be the same at both ends"
        ) from None


class MultifdReceivers(MultifdChannels):
    """The destination's channels, behind their greetings; there may be none.

    :param native: ``struct dst *``.
    """

    _name = "incoming-multifd"

    def start(self, *, is_framed: bool, each_section: bool) -> None:
        """From here on their pages are stored.

        :param is_framed: what follows the greeting comes in checksummed frames.
        :param each_section: see :class:`MultifdSenders`.
        :raises MemoryError: no room for them.
        """
        if lib.dst_multifd_init(self._native, self.count, each_section) < 0:
            raise MemoryError(f"{self.count} multifd channels")
        for index, channel in enumerate(self._channels):
            if is_framed:
                channel.set_read_framed()
            lib.dst_multifd_set_channel(self._native, index, channel.native)
        self._start_threads()

    def meet(self) -> None:
        """Until all channels stand at a SYNC, which lets them go on; without the GIL.

        :raises Exception: one of them broke, or brought bad bytes.
        """
        if lib.dst_multifd_sync(self._native) < 0:
            raise native_error(self._native.main.error, fallback="multifd channels")

    @property
    def bytes_received(self) -> list[int]:
        """Per channel, greeting and frames included; 0: closed."""
        return [channel.bytes_received for channel in self._channels]

    def _loop(self, index: int) -> int:
        return lib.dst_multifd_loop(self._native, index)

    def _error(self, index: int) -> Any:
        return lib.dst_multifd_error(self._native, index)

    def _stop_loops(self) -> None:
        lib.dst_multifd_stop(self._native)
