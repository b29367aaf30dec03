"""Buffered reading and writing over the functions of :mod:`.channel_ops`; QEMU's word: QEMUFile.

A :class:`FileWriter` is a :class:`migration.wire.io.Writer`, a :class:`FileReader` a
:class:`~migration.wire.io.Reader`, so every codec works on them. The first error sticks: nothing is
read or written after it, and closing reports it, so nobody takes half a stream for a whole one.
One thread at a time uses one of them. The GIL is held except inside the functions that release it.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import NoReturn, Self

from migration.wire.errors import TruncatedStreamError

from .channel_ops import ChannelOps, channel_ops
from .errors import ChannelError

BUFFER_BYTES = 128 << 10
PEEK_BYTES_MAX = 4 << 10  # what the Reader protocol promises, in bytes of stream


class _End:
    """What both directions share: the sticky error and the close."""

    def __init__(self, source: object) -> None:
        self.ops: ChannelOps = channel_ops(source)
        self.error: Exception | None = None
        self._is_closed = False

    def set_error(self, error: Exception) -> None:
        """Break the channel from outside. The first error stays the one that is reported."""
        if self.error is None:
            self.error = error

    def _fail(self, error: Exception, doing: str) -> NoReturn:
        if not isinstance(error, ChannelError):
            cause, text = error, getattr(error, "strerror", None) or str(error) or repr(error)
            error = ChannelError(f"{doing} {self.ops.name}: {text}")
            error.__cause__ = cause
        self.set_error(error)
        self._check()
        raise AssertionError

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self._is_closed:
            raise ChannelError(f"{self.ops.name} is closed")

    def _close_ops(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self.ops.close is not None:
            try:
                self.ops.close()
            except Exception as error:
                self._fail(error, "closing")

    def close(self) -> None:
        """Close; harmless the second time. :raises Exception: the sticky error, if there is one."""
        if self._is_closed:
            return
        with contextlib.suppress(ChannelError):  # raised below, as what came first
            self._close_ops()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):
            self.close()


class FileWriter(_End):
    """The writing end of a channel.

    :param source: whatever :func:`~migration.runtime.channel_ops.channel_ops` takes.
    :param buffer_bytes: collected before ``put_buffer`` is called.
    :raises TypeError, ValueError: not a channel, or one that cannot be written.
    :ivar error: the first error; it sticks. :ivar bytes_transferred: bytes ``put_buffer`` took.
    """

    def __init__(self, source: object, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        super().__init__(source)
        if self.ops.put_buffer is None:
            raise ValueError(f"{self.ops.name} cannot be written")
        self._put = self.ops.put_buffer
        self._buffer = bytearray()
        self._buffer_bytes = max(1, buffer_bytes)
        self._flushed_to = 0
        self.bytes_transferred = 0

    @property
    def position(self) -> int:
        """Stream offset of the next byte written."""
        return self._flushed_to + len(self._buffer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. :raises ChannelError: something failed, now or earlier: nothing is taken."""
        self._check()
        if len(data) >= self._buffer_bytes:
            self.flush()
            self._send(memoryview(data))
            return
        self._buffer += data
        if len(self._buffer) >= self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Hand everything buffered to ``put_buffer``. :raises ChannelError: as :meth:`write`."""
        self._check()
        if self._buffer:
            pending, self._buffer = self._buffer, bytearray()
            self._send(memoryview(pending))

    def seek(self, position: int) -> None:
        """Go on writing at another stream offset; what is between stays what it is (a hole).

        :raises ChannelError: as :meth:`write`. A channel that cannot seek fails at the next flush.
        """
        self.flush()
        self._flushed_to = position

    def _send(self, data: memoryview) -> None:
        data = data.cast("B")
        while data:
            try:
                taken = self._put(data, self._flushed_to)
                count = len(data) if taken is None else taken
                if not 0 < count <= len(data):
                    raise OSError(f"took {count} of {len(data)} bytes")
            except Exception as error:
                self._fail(error, "writing to")
            self._flushed_to += count
            self.bytes_transferred += count
            data = data[count:]

    def return_path(self) -> FileReader | None:
        """What the other side answers, if this channel has a way back."""
        other = self.ops.return_path() if self.ops.return_path is not None else None
        return FileReader(other) if other is not None else None

    def close(self) -> None:
        """Flush and close.

        :raises Exception: anything failed, now or before: then the stream is not whole.
        """
        if not self._is_closed:
            with contextlib.suppress(Exception):  # it sticks, and is raised below
                self.flush()
        super().close()


class FileReader(_End):
    """The reading end of a channel.

    :param source: whatever :func:`~migration.runtime.channel_ops.channel_ops` takes.
    :param position: stream offset at which to begin.
    :raises TypeError, ValueError: not a channel, or one that cannot be read.
    :ivar error: the first error; it sticks. :ivar bytes_transferred: bytes ``get_buffer`` gave.
    """

    def __init__(self, source: object, *, position: int = 0) -> None:
        super().__init__(source)
        if self.ops.get_buffer is None:
            raise ValueError(f"{self.ops.name} cannot be read")
        self._get = self.ops.get_buffer
        self._data = memoryview(b"")
        self._position = position
        self.bytes_transferred = 0

    @property
    def position(self) -> int:
        """Stream offset of the next byte read."""
        return self._position

    def read(self, length: int) -> bytes:
        """Exactly ``length`` bytes; memory for them grows only as they come.

        :raises TruncatedStreamError: the stream ends before. It sticks.
        :raises ChannelError: ``get_buffer`` failed, now or earlier.
        """
        self._check()
        if length <= len(self._data):
            return self._take(length)
        parts = [self._take(len(self._data))]
        missing = length - len(parts[0])
        while missing:
            if not self._fill():
                self._truncated(length, length - missing)
            parts.append(self._take(min(missing, len(self._data))))
            missing -= len(parts[-1])
        return b"".join(parts)

    def read_some(self, length: int) -> bytes:
        """At least one byte and at most ``length``, whatever comes first; none at the end.

        :raises ChannelError: as :meth:`read`.
        """
        self._check()
        if not self._data and not self._fill():
            return b""
        return self._take(min(length, len(self._data)))

    def peek(self, length: int) -> bytes:
        """Up to ``length`` (at most 4096) of the next bytes, not consumed; fewer only at the end.

        :raises ChannelError: as :meth:`read`.
        """
        self._check()
        length = min(length, PEEK_BYTES_MAX)
        while len(self._data) < length and self._fill(keep=True):
            pass
        return bytes(self._data[:length])

    def seek(self, position: int) -> None:
        """Go on reading at another stream offset: for channels whose ``get_buffer`` can."""
        self._check()
        ahead = position - self._position
        self._data = self._data[ahead:] if 0 <= ahead <= len(self._data) else memoryview(b"")
        self._position = position

    def _take(self, length: int) -> bytes:
        data = bytes(self._data[:length])
        self._data = self._data[length:]
        self._position += length
        return data

    def _fill(self, *, keep: bool = False) -> bool:
        """More bytes behind those there are; False at the end."""
        try:
            more = self._get(self._position + len(self._data), BUFFER_BYTES)
            if len(more) > BUFFER_BYTES:
                raise OSError(f"gave {len(more)} bytes, {BUFFER_BYTES} were asked for")
        except Exception as error:
            self._fail(error, "reading from")
        self.bytes_transferred += len(more)
        self._data = memoryview(bytes(self._data) + bytes(more) if keep else bytes(more))
        return bool(more)

    def _truncated(self, wanted: int, had: int) -> NoReturn:
        error = TruncatedStreamError(
            f"wanted {wanted} bytes, {self.ops.name} ends after {had}", offset=self._position
        )
        self.set_error(error)
        raise error

    def return_path(self) -> FileWriter | None:
        """Where to answer, if this channel has a way back."""
        other = self.ops.return_path() if self.ops.return_path is not None else None
        return FileWriter(other) if other is not None else None
