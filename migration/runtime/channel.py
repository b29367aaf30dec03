"""A channel over file descriptors: buffered, both directions, shared with the native loops.

Python writes headers and loads devices through it before LISTEN; from then on the C loops own its
reading side. Reading belongs to one thread at a time, writing is locked. Every call releases the
GIL while it waits. See ``csrc/chan.h`` for the frames of the checksum extension.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import sys
import termios
import time
from collections.abc import Callable, Sequence

from migration.native import ffi, lib
from migration.wire.errors import RemoteStreamError, TruncatedStreamError

from .errors import ChannelClosedError, ChannelError

_PEEK_MAX = 4 << 10  # what the Reader protocol promises, in bytes of stream
_CHUNK = 1 << 20
_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; the socket module has no name for it
_TCP_INFO_RTT = 68  # offset of tcpi_rtt, u32, in struct tcp_info
_SHORT_ROUND_TRIP_US = 1000


class Channel:
    """Both the :class:`~migration.wire.io.Reader` and the :class:`~migration.wire.io.Writer` of one
    connection, and its close.

    :ivar peer: what the other end is, for people.
    :ivar is_two_way: the other end can answer (a socket).
    :ivar may_be_deaf: it is a command, and whether that reads and answers nobody knows before.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        peer: str,
        close: Callable[[], None],
        is_two_way: bool,
        finish: Callable[[], None] | None = None,
        may_be_deaf: bool = False,
    ) -> None:
        """Take over the descriptors; ``close`` is called once, by :meth:`close`.

        :param finish: makes sure that what was written arrived where it goes (a file, a command).

        :param read_fd, write_fd: the same socket twice, or two pipe ends; -1 for a missing side.
        """
        is_socket = _is_socket(read_fd if read_fd >= 0 else write_fd)
        for fd in {read_fd, write_fd} - {-1}:
            # Sockets are interrupted by shutdown(2), the rest must be able to wait with poll(2).
            os.set_blocking(fd, is_socket)
        err = ffi.new("int *")
        self.native = lib.chan_new(read_fd, write_fd, is_socket, err)
        if not self.native:
            raise OSError(-err[0], os.strerror(-err[0]), peer)
        self.peer = peer
        self.is_two_way = is_two_way
        self.may_be_deaf = may_be_deaf
        self._finish = finish
        self._fds = (read_fd, write_fd)
        self._is_socket = is_socket
        self._close: Callable[[], None] | None = close

    @classmethod
    def over_socket(cls, connection: socket.socket, *, peer: str) -> Channel:
        """Take over a connected stream socket."""
        connection.settimeout(None)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            # Requests and urgent pages are small and must not wait for an acknowledgement.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = connection.fileno()
        return cls(fd, fd, peer=peer, close=connection.close, is_two_way=True)

    # -- Reader ---------------------------------------------------------------

    @property
    def position(self) -> int:
        """Stream offset of the next byte to read."""
        return int(lib.chan_read_position(self.native))

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes. The memory for them grows as they come, so an announced length
        costs nothing by itself.

        :raises TruncatedStreamError: the peer closed before.
        :raises RemoteStreamError: a frame whose checksum is wrong.
        :raises ChannelError: the connection broke, or :meth:`abort` was called.
        """
        if length <= _CHUNK:
            return self._read_chunk(length)
        parts = []
        while length:
            part = self._read_chunk(min(length, _CHUNK))
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _read_chunk(self, length: int) -> bytes:
        buffer = bytearray(length)
        if length:
            result = lib.chan_read(self.native, ffi.from_buffer(buffer), length)
            if result < 0:
                raise self._read_error(-result, f"wanted {length} bytes")
        return bytes(buffer)

    def peek(self, length: int) -> bytes:
        """Up to ``length`` (at most 4096) bytes, not consumed; shorter only at the end."""
        buffer = bytearray(min(length, _PEEK_MAX))
        got = lib.chan_peek(self.native, ffi.from_buffer(buffer), len(buffer))
        if got < 0:
            raise self._read_error(-got, "looking ahead")
        return bytes(buffer[:got])

    def _read_error(self, code: int, doing: str) -> Exception:
        record = self.native.rerror
        if record.code:
            message = ffi.string(record.message).decode("utf-8", "replace")
            return RemoteStreamError(message, offset=int(record.offset), section="frame")
        if code == errno.ENODATA:
            return TruncatedStreamError(
                f"{doing}, but {self.peer} closed the connection", offset=self.position
            )
        if code == errno.ECANCELED:
            return ChannelClosedError("the channel was shut down here")
        return ChannelError(f"reading from {self.peer}: {os.strerror(code)}")

    def set_read_framed(self) -> None:
        """From the next unread byte on, checksummed frames are expected."""
        lib.chan_set_read_framed(self.native)

    # -- Writer ---------------------------------------------------------------

    @property
    def write_position(self) -> int:
        """Stream offset of the next byte to write."""
        return int(lib.chan_write_position(self.native))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data`` to the buffer, which is sent when full; see :meth:`flush`.

        :raises ChannelError: the connection broke (now or before), or :meth:`abort` was called.
        """
        self._check_write(lib.chan_write(self.native, ffi.from_buffer(data), len(data)))

    def flush(self) -> None:
        """Send what is buffered. :raises ChannelError: as :meth:`write`."""
        self._check_write(lib.chan_flush(self.native))

    def set_write_framed(self) -> None:
        """Flush; from the next byte on, everything goes out in checksummed frames."""
        self._check_write(lib.chan_set_write_framed(self.native))

    def _check_write(self, result: int) -> None:
        if result == -errno.ECANCELED:
            raise ChannelClosedError("the channel was shut down here")
        if result < 0:
            raise ChannelError(f"writing to {self.peer}: {os.strerror(-result)}")

    @property
    def write_errno(self) -> int:
        """Why nothing can be written any more (errno); 0: nothing is wrong."""
        return -int(self.native.werror)

    # -- the connection -------------------------------------------------------

    @property
    def bytes_sent(self) -> int:
        """Bytes handed to the descriptor so far, frame headers included."""
        return int(lib.chan_bytes_sent(self.native)) if self._close else 0

    @property
    def bytes_received(self) -> int:
        """Bytes taken from the descriptor so far."""
        return int(lib.chan_bytes_received(self.native)) if self._close else 0

    def bound_in_flight(self, length: int) -> None:
        """Let no more than about ``length`` bytes wait in the socket, either way.

        A requested page queues behind everything that was sent before it. On a unix socket the send
        buffer is the queue (the kernel doubles the value, socket(7)). On TCP only what is *not sent
        yet* is bounded (TCP_NOTSENT_LOWAT), so that a long link can still be filled; the receive
        buffer, in which a receiver slower than its link lets bytes pile up, only where the round
        trip is short.
        """
        if not self._is_socket:
            return
        with socket.socket(fileno=os.dup(self._fds[0])) as connection:
            if connection.family == socket.AF_UNIX:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, length)
                return
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, length)
            if _round_trip_us(connection) < _SHORT_ROUND_TRIP_US:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    connection.setsockopt(socket.SOL_SOCKET, option, 2 * length)

    # -- descriptors ----------------------------------------------------------

    @property
    def carries_descriptors(self) -> bool:
        """It is a unix socket."""
        if not self._is_socket:
            return False
        with socket.socket(fileno=os.dup(self._fds[0])) as connection:
            return connection.family == socket.AF_UNIX

    def send_descriptors(self, data: bytes, fds: Sequence[int]) -> None:
        """Send ``data`` and with it descriptors, past buffers, frames and positions: the peer must
        be about to call :meth:`receive_descriptors`, and must have been sent nothing else.

        :param fds: 1 to 253 (unix(7)); they stay ours.
        :raises ChannelError: the connection broke.
        """
        self.flush()
        with socket.socket(fileno=os.dup(self._fds[1])) as connection:
            try:
                if socket.send_fds(connection, [data], fds) != len(data):
                    raise ChannelError(f"passing descriptors to {self.peer}: cut short")
            except OSError as error:
                raise ChannelError(
                    f"passing descriptors to {self.peer}: {error.strerror}"
                ) from None

    def receive_descriptors(self, length: int, most: int) -> tuple[bytes, list[int]]:
        """What :meth:`send_descriptors` sent; blocks without the GIL.

        :param length: of its ``data``, bytes. :param most: descriptors taken at the most; the
            kernel closes what is more.
        :returns: data and descriptors, close-on-exec; the caller's.
        :raises RemoteStreamError: something else came before.
        :raises ChannelError: the connection broke, or :meth:`abort` was called.
        """
        if self.native.win_len or self.native.raw_tail != self.native.raw_head:
            raise RemoteStreamError("bytes where descriptors should be", offset=self.position)
        with socket.socket(fileno=os.dup(self._fds[0])) as connection:
            try:
                data, fds, _, _ = socket.recv_fds(
                    connection, length, most, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                text = f"taking descriptors from {self.peer}: {error.strerror}"
                raise ChannelError(text) from None
        if len(data) != length:
            _close_all(fds)
            raise ChannelError(f"taking descriptors from {self.peer}: the connection ended")
        return data, fds

    def arrived(self, length: int) -> bytes | None:
        """Of a socket from which nothing was read yet: up to ``length`` bytes that have come, which
        stay where they are; empty: it was closed; None: nothing has come. Does not wait."""
        with socket.socket(fileno=os.dup(self._fds[0])) as connection:
            try:
                return connection.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError:
                return b""

    @property
    def read_fd(self) -> int:
        """To wait with poll(2) for the first byte; -1: this side only writes."""
        return self._fds[0]

    def finish(self) -> None:
        """Everything was written and flushed: make sure of it (fsync, the command's status).

        :raises MigrationError, OSError: it did not arrive.
        """
        if self._finish is not None:
            self._finish()

    def was_heard(self, timeout_s: float) -> bool:
        """Whether the other end took the last thing that was written here: its protocol ends there,
        so it closes, and a socket closed with something unread says so.

        :param timeout_s: how long to wait for it to close; after that what matters is whether its
            kernel (tcp) or it itself (unix) has everything. A pipe tells nothing: true.
        """
        if not self._is_socket:
            return True
        fd, until = self._fds[0], time.monotonic() + timeout_s
        with socket.socket(fileno=os.dup(fd)) as connection:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            try:
                while (left := until - time.monotonic()) > 0 and poll.poll(left * 1000):
                    if not connection.recv(_CHUNK):
                        return True
            except OSError:
                return False
            queued = fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4))
        return not int.from_bytes(queued, sys.byteorder)

    def explain(self, text: str) -> str:
        """An error's text, with what is known of the cause behind the descriptor."""
        return text

    def abort(self) -> None:
        """Any thread: whoever reads or writes here returns with an error, now and later."""
        if self._close:
            lib.chan_abort(self.native)

    def close(self) -> None:
        """Close the descriptors and free the buffers. Nobody else may still be using the
        channel."""
        if self._close:
            close, self._close = self._close, None
            lib.chan_free(self.native)
            close()


class ChannelWriter:
    """The writing half as a :class:`~migration.wire.io.Writer` (``position`` counts bytes
    written)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def position(self) -> int:
        return self._channel.write_position

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._channel.write(data)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _round_trip_us(connection: socket.socket) -> int:
    """The kernel's smoothed estimate for a TCP connection (``tcpi_rtt``)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_RTT + 4)
    return int.from_bytes(info[_TCP_INFO_RTT : _TCP_INFO_RTT + 4], sys.byteorder)
