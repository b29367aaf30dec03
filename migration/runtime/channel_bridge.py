"""A channel over three functions as one over a descriptor, which is what the native loops need.

    native loops  <->  socket pair  <->  pump threads  <->  put_buffer / get_buffer

The pumps are Python: a page that comes through one needs the GIL on its way. So a bridge carries
precopy and snapshots; in postcopy a thread that sleeps on a missing page with the GIL in hand would
wait for a page that needs the GIL, and the service refuses that on the destination.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from .channel import Channel
from .channel_ops import ChannelOps, channel_ops
from .file_channel import FileReader, FileWriter

PUMP_BYTES = 256 << 10
JOIN_TIMEOUT_S = 5.0


def bridge(source: object, *, writes: bool, peer: str | None = None) -> BridgedChannel:
    """A :class:`Channel` whose bytes go through ``put_buffer`` or come from ``get_buffer``.

    With a return path it is two-way. :meth:`Channel.finish` waits until everything written was
    taken, closes ``source`` and raises what it failed with; :meth:`Channel.close` closes it in any
    case. A function that sleeps for ever and has no ``shut_down`` keeps its thread (a daemon) for
    ever; close gives up on it after 5 s.

    :param source: whatever :func:`~migration.runtime.channel_ops.channel_ops` takes.
    :param writes: which way is forward: ``source`` is written (outgoing) or read (incoming).
    :param peer: what to call it in errors; its own name unless told.
    :raises TypeError, ValueError: not a channel, or not one of that direction.
    """
    pumps = _Bridge(channel_ops(source), writes=writes)
    try:
        return BridgedChannel(pumps, pumps.ours.fileno(), peer or pumps.name)
    except BaseException:
        pumps.close()
        raise


class BridgedChannel(Channel):
    """See :func:`bridge`."""

    def __init__(self, pumps: _Bridge, fd: int, peer: str) -> None:
        super().__init__(
            fd,
            fd,
            peer=peer,
            close=pumps.close,
            finish=pumps.finish,
            is_two_way=pumps.writes and pumps.reads,
        )
        self._pumps = pumps

    @property
    def cause(self) -> Exception | None:
        """What ``put_buffer`` or ``get_buffer`` raised; here it shows as a broken connection."""
        return self._pumps.error

    def explain(self, text: str) -> str:
        """See :meth:`Channel.explain`."""
        return text if self.cause is None else f"{text} ({self.cause})"


class _Bridge:
    """The socket pair and the threads between it and the functions."""

    def __init__(self, ops: ChannelOps, *, writes: bool) -> None:
        self.error: Exception | None = None
        self.name = ops.name
        self._ops = ops
        self._lock = threading.Lock()
        self._is_closed = False
        self._writer: FileWriter | None = None
        self._reader: FileReader | None = None
        if writes:
            self._writer = FileWriter(ops)
            self._reader = self._writer.return_path()
        else:
            self._reader = FileReader(ops)
            self._writer = self._reader.return_path()
        self.writes, self.reads = self._writer is not None, self._reader is not None
        self.ours, self._theirs = socket.socketpair()
        self._out = self._start(self._pump_out, "bridge-out") if self.writes else None
        self._in = self._start(self._pump_in, "bridge-in") if self.reads else None

    def _start(self, target: object, name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _pump_out(self) -> None:
        assert self._writer is not None
        try:
            while data := self._theirs.recv(PUMP_BYTES):
                self._writer.write(data)
                # The pump has nothing to collect for: whoever writes has buffered already.
                self._writer.flush()
        except Exception as error:
            self._failed(error)

    def _pump_in(self) -> None:
        assert self._reader is not None
        try:
            while data := self._reader.read_some(PUMP_BYTES):
                self._theirs.sendall(data)
            self._theirs.shutdown(socket.SHUT_WR)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """The first cause stays; both sides learn of it as of a connection that broke."""
        with self._lock:
            if self.error is None and not self._is_closed:
                self.error = error
        for end in (self._theirs, self.ours):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Everything was written: wait until it was taken, and close the functions.

        :raises MigrationError, OSError: it was not, or closing failed.
        """
        with contextlib.suppress(OSError):
            self.ours.shutdown(socket.SHUT_WR)
        if self._out is not None:
            self._out.join()
        if self.error is None and self._writer is not None:
            self._writer.close()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the threads and close everything."""
        with self._lock:
            self._is_closed = True
        for end in (self.ours, self._theirs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self._ops.shut_down is not None:
            with contextlib.suppress(Exception):
                self._ops.shut_down()
        is_stuck = False
        for thread in (self._out, self._in):
            if thread is not None:
                thread.join(JOIN_TIMEOUT_S)
                is_stuck |= thread.is_alive()
        for file in (self._writer, self._reader):
            if file is not None and not is_stuck:
                with contextlib.suppress(Exception):  # finish() is where a failure is told
                    file.close()
        self.ours.close()
        self._theirs.close()
