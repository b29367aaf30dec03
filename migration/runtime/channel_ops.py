"""What a channel is made of: three functions. Anything Python can read or write can be one.

    put_buffer(data, position)    take these bytes; they belong at that offset of the stream
    get_buffer(position, length)  give up to that many bytes from that offset on; none at the end
    close()                       no more

:func:`channel_ops` finds them in what it is given: an object with these methods, a file, a socket,
bytes. Source of the idea: QEMU's ``QEMUFileOps`` (``docs/migration.txt`` up to 2.x).
"""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PutBuffer = Callable[[memoryview, int], int | None]
GetBuffer = Callable[[int, int], bytes | bytearray | memoryview]


@dataclass(frozen=True, slots=True)
class ChannelOps:
    """The functions of one channel. A side that is missing cannot be used.

    Each is called by one thread at a time (``put_buffer`` and ``get_buffer`` by two different ones
    when a migration runs over both), in order of position unless the user seeks. They fail by
    raising; whatever they raise ends the channel.

    :ivar put_buffer: returns how many of the bytes it took (at least one), ``None`` for all. The
        memoryview is only valid during the call.
    :ivar get_buffer: may return fewer bytes than asked for; none means the end of the stream.
    :ivar close: called once, after the last of the others.
    :ivar return_path: from a forward channel, the functions of the way back; ``None``: none.
    :ivar shut_down: any thread: who sleeps in ``put_buffer`` or ``get_buffer`` returns or raises.
    :ivar name: what it is, for people.
    """

    put_buffer: PutBuffer | None = None
    get_buffer: GetBuffer | None = None
    close: Callable[[], object] | None = None
    return_path: Callable[[], ChannelOps | None] | None = None
    shut_down: Callable[[], object] | None = None
    name: str = "channel"


def channel_ops(source: object) -> ChannelOps:
    """The functions of ``source``:

    * a :class:`ChannelOps` is itself;
    * an object with ``put_buffer`` or ``get_buffer`` (and, if it likes, ``close``, ``return_path``,
      ``shut_down`` and ``name``);
    * a connected stream socket, which has a return path;
    * a file object with ``write`` or ``read``, buffered or not; seeked when its position is not the
      one asked for;
    * bytes, which can only be read.

    :raises TypeError: none of these.
    """
    if isinstance(source, ChannelOps):
        return source
    if callable(getattr(source, "put_buffer", None)) or callable(
        getattr(source, "get_buffer", None)
    ):
        return _of_methods(source)
    if isinstance(source, socket.socket):
        return _of_socket(source)
    if isinstance(source, bytes | bytearray | memoryview):
        data = memoryview(source).toreadonly()
        return ChannelOps(
            get_buffer=lambda position, length: data[position : position + length],
            name=f"{len(data)} bytes in memory",
        )
    if callable(getattr(source, "write", None)) or callable(getattr(source, "read", None)):
        return _of_file(source)
    raise TypeError(
        f"{type(source).__name__} can be no channel: it has neither put_buffer nor get_buffer, "
        "neither write nor read"
    )


def _of_methods(source: Any) -> ChannelOps:
    def back() -> ChannelOps | None:
        other = source.return_path()
        return None if other is None else channel_ops(other)

    return ChannelOps(
        put_buffer=getattr(source, "put_buffer", None),
        get_buffer=getattr(source, "get_buffer", None),
        close=getattr(source, "close", None),
        return_path=back if hasattr(source, "return_path") else None,
        shut_down=getattr(source, "shut_down", None),
        name=str(getattr(source, "name", type(source).__name__)),
    )


def _of_socket(connection: socket.socket) -> ChannelOps:
    def put(data: memoryview, position: int) -> int:
        return connection.send(data)

    def get(position: int, length: int) -> bytes:
        return connection.recv(length)

    def shut_down() -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    both = ChannelOps(put, get, shut_down=shut_down, name="socket")
    return ChannelOps(put, get, connection.close, lambda: both, shut_down, "socket")


class _File:
    """A file object, told where to read and write only when it stands elsewhere."""

    def __init__(self, file: Any) -> None:
        self._file = file
        # Where the file stands when it is handed over is where its stream begins.
        self._base = file.tell() if self._can_seek() else 0
        self._at = 0

    def _can_seek(self) -> bool:
        seekable = getattr(self._file, "seekable", None)
        return bool(seekable is not None and seekable())

    def _go(self, position: int) -> None:
        if position == self._at:
            return
        if not self._can_seek():
            raise OSError(f"the file stands at {self._at:#x} and cannot be set to {position:#x}")
        self._file.seek(self._base + position)
        self._at = position

    def put_buffer(self, data: memoryview, position: int) -> int:
        self._go(position)
        taken = self._file.write(data)
        if taken is None and isinstance(self._file, io.RawIOBase):
            raise BlockingIOError("the file does not wait: make it blocking")
        count = len(data) if taken is None else int(taken)
        self._at += count
        return count

    def get_buffer(self, position: int, length: int) -> bytes:
        self._go(position)
        # One system call's worth where the file offers that: a pipe must not be waited full.
        read = getattr(self._file, "read1", None) or self._file.read
        data = read(length)
        if data is None:
            raise BlockingIOError("the file does not wait: make it blocking")
        self._at += len(data)
        return bytes(data)

    def close(self) -> None:
        self._file.close()


def _of_file(file: Any) -> ChannelOps:
    ends = _File(file)
    can_write = _can(file, "writable", "write")
    can_read = _can(file, "readable", "read")
    return ChannelOps(
        put_buffer=ends.put_buffer if can_write else None,
        get_buffer=ends.get_buffer if can_read else None,
        close=ends.close if callable(getattr(file, "close", None)) else None,
        name=str(getattr(file, "name", type(file).__name__)),
    )


def _can(file: Any, question: str, method: str) -> bool:
    ask = getattr(file, question, None)
    return callable(getattr(file, method, None)) and (ask is None or bool(ask()))
