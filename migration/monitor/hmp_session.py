"""HMP on one connection: a banner, a prompt, a line in, text out."""

from __future__ import annotations

import asyncio
from collections import deque

from .connection import Connection
from .context import Monitor
from .hmp import HMP
from .version import package
from .worker import SerialWorker

PROMPT = b"(postcopy) "
LINE_BYTES_MAX = 4 << 10
_LINES_WAITING_MAX = 8


class HMPSession:
    """One HMP client on a socket. Threads: the loop's; commands run on ``worker``.

    There is no echo and no line editing: ``socat - UNIX-CONNECT:PATH`` or ``rlwrap`` do that on
    their terminal.
    """

    def __init__(
        self, monitor: Monitor, loop: asyncio.AbstractEventLoop, *, worker: SerialWorker
    ) -> None:
        self._hmp = HMP(monitor)
        self._loop = loop
        self._worker = worker
        self._partial = bytearray()
        self._skips_line = False  # inside an overlong line, up to its end
        self._lines: deque[str | None] = deque()  # None: an overlong line was here
        self._is_busy = False
        self._is_ending = False
        self._connection: Connection | None = None

    def start(self, connection: Connection) -> None:
        """Show the banner and begin to read."""
        self._connection = connection
        banner = f"{package()} monitor - type 'help' for more information\r\n"
        connection.write(banner.encode() + PROMPT)
        connection.set_reading(True)

    def received(self, data: bytes) -> None:
        *complete, rest = (bytes(self._partial) + data).split(b"\n")
        for line in complete:
            is_overlong = self._skips_line or len(line) > LINE_BYTES_MAX
            self._skips_line = False
            self._lines.append(None if is_overlong else line.decode("utf-8", "replace").strip())
        if len(rest) > LINE_BYTES_MAX:
            rest, self._skips_line = b"", True
        self._partial = bytearray(b"" if self._skips_line else rest)
        self._advance()

    def ended(self) -> None:
        self.finish()

    def drained(self) -> None:
        self._advance()

    def closed(self) -> None:
        self._lines.clear()
        self._worker.stop()

    def finish(self) -> None:
        """Read no more; answer what was asked, then close."""
        self._is_ending = True
        self._advance()

    def _advance(self) -> None:
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        if self._lines and not self._is_busy and not connection.is_congested:
            self._is_busy = True
            self._submit(self._lines.popleft())
        if self._is_ending:
            connection.set_reading(False)
            if not self._is_busy and not self._lines:
                connection.close_when_sent()
            return
        connection.set_reading(
            len(self._lines) < _LINES_WAITING_MAX and not connection.is_congested
        )

    def _submit(self, line: str | None) -> None:
        def work() -> None:
            if line is None:
                text = f"Error: a line has at most {LINE_BYTES_MAX} bytes\r\n"
            else:
                text = self._hmp.execute(line, may_wait=True)
            try:
                self._loop.call_soon_threadsafe(self._answer, text)
            except RuntimeError:  # the loop was closed while the command ran
                return

        self._worker.submit(work)

    def _answer(self, text: str) -> None:
        if self._connection is not None:
            self._connection.write(text.encode("utf-8", "replace") + PROMPT)
        self._is_busy = False
        if self._hmp.after_reply is not None:
            self._hmp.after_reply()
        self._advance()
