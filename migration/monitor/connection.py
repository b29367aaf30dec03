"""One client's socket on the monitor's event loop: bounded in both directions.

A client that does not read stops being read from: its replies wait in a bounded buffer, its further
requests in its own socket. Nobody else notices.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

OUTGOING_BYTES_HIGH = 64 * 1024
"""With this much unsent, a client's next command is not begun and its events wait in the queue."""
_RECEIVE_BYTES = 16 * 1024
_FD = struct.Struct("i")
_FDS_WAITING_MAX = 4
_FDS_SPACE_BYTES = socket.CMSG_SPACE(_FDS_WAITING_MAX * _FD.size)  # the kernel closes what is over


class Receiver(Protocol):
    """What a connection talks to; all of it is called on the loop's thread."""

    def received(self, data: bytes) -> None:
        """Bytes came in."""

    def ended(self) -> None:
        """The client will send no more; it may still read (a half-closed connection)."""

    def drained(self) -> None:
        """The client keeps up again."""

    def closed(self) -> None:
        """The connection is gone; called once."""


class Connection:
    """A nonblocking stream socket. Threads: the loop's only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        receiver: Receiver,
        *,
        on_closed: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._receiver = receiver
        self._on_closed = on_closed
        self._outgoing = bytearray()
        self._fds: deque[int] = deque()
        self._is_reading = False
        self._is_closed = False
        self._close_when_sent = False

    @property
    def is_congested(self) -> bool:
        """Too much is unsent: the client does not keep up."""
        return len(self._outgoing) >= OUTGOING_BYTES_HIGH

    @property
    def is_closed(self) -> bool:
        """The socket is gone."""
        return self._is_closed

    def set_reading(self, wanted: bool) -> None:
        """Switch receiving on or off."""
        if self._is_closed or wanted == self._is_reading:
            return
        self._is_reading = wanted
        if wanted:
            self._loop.add_reader(self._socket, self._readable)
        else:
            self._loop.remove_reader(self._socket)

    def take_fd(self) -> int | None:
        """The oldest descriptor the client has sent and nobody took; the caller's from now on."""
        return self._fds.popleft() if self._fds else None

    def write(self, data: bytes) -> None:
        """Queue ``data`` and send what the kernel takes at once."""
        if self._is_closed:
            return
        had_backlog = bool(self._outgoing)
        self._outgoing += data
        if not had_backlog:
            self._writable()
            if self._outgoing and not self._is_closed:
                self._loop.add_writer(self._socket, self._writable)

    def close_when_sent(self) -> None:
        """Close as soon as everything queued has been sent."""
        self._close_when_sent = True
        self.set_reading(False)
        if not self._outgoing:
            self.close()

    def close(self) -> None:
        """Drop the connection and what was not sent. Harmless when closed already."""
        if self._is_closed:
            return
        self.set_reading(False)
        self._is_closed = True
        self._loop.remove_writer(self._socket)
        self._socket.close()
        while self._fds:
            os.close(self._fds.popleft())
        self._receiver.closed()
        self._on_closed(self)

    def _readable(self) -> None:
        try:
            data = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if data:
            self._receiver.received(data)
        else:
            self.set_reading(False)
            self._receiver.ended()

    def _receive(self) -> bytes:
        if self._socket.family != socket.AF_UNIX:
            return self._socket.recv(_RECEIVE_BYTES)
        # socket.recv_fds drops its flags argument in Python 3.11, and close-on-exec with it
        data, ancillary, _, _ = self._socket.recvmsg(
            _RECEIVE_BYTES, _FDS_SPACE_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = len(payload) - len(payload) % _FD.size
                self._keep_fds([fd for (fd,) in _FD.iter_unpack(payload[:whole])])
        return data

    def _keep_fds(self, fds: list[int]) -> None:
        for fd in fds:
            if len(self._fds) < _FDS_WAITING_MAX:
                self._fds.append(fd)
            else:
                os.close(fd)

    def _writable(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        was_congested = self.is_congested
        del self._outgoing[:sent]
        if not self._outgoing:
            self._loop.remove_writer(self._socket)
            if self._close_when_sent:
                self.close()
                return
        if was_congested and not self.is_congested:
            self._receiver.drained()
