"""QMP on one connection: greeting, requests in order, out-of-band requests beside them, events."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping

from .connection import Connection
from .dispatch import Answer, Client, Dispatcher, Request, read_request
from .errors import QMPError
from .json_stream import JSONSplitter
from .version import version
from .worker import SerialWorker

REQUESTS_WAITING_MAX = 8
"""With this many requests waiting, no more are read: QEMU's limit, which clients know."""
EVENTS_WAITING_MAX = 256
"""Events kept for a client that does not read; older ones are dropped and their count reported."""
DROPPED_EVENT = "X_EVENTS_DROPPED"


class QMPSession:
    """One QMP client. Threads: the loop's; commands run on ``in_band`` and ``out_of_band``."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        *,
        in_band: SerialWorker,
        out_of_band: SerialWorker,
    ) -> None:
        self._dispatcher = dispatcher
        self._loop = loop
        self._in_band = in_band
        self._out_of_band = out_of_band
        self._splitter = JSONSplitter()
        self._client = Client()
        self._waiting: deque[Request] = deque()
        self._events: deque[Mapping[str, object]] = deque()
        self._events_dropped = 0
        self._has_events = False
        self._is_busy = False
        self._is_ending = False
        self._connection: Connection | None = None

    def start(self, connection: Connection) -> None:
        """Greet and begin to read."""
        self._connection = connection
        self._send({"QMP": {"version": version(), "capabilities": ["oob"]}})
        connection.set_reading(True)

    # -- what the connection calls
    # ------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        for message in self._splitter.feed(data):
            request = read_request(message, self._client)
            if request.name == "getfd" and request.error is None and self._connection:
                request.received_fd = self._connection.take_fd()
            if self._dispatcher.runs_out_of_band(request):
                self._submit(self._out_of_band, request, self._answer)
            else:
                self._waiting.append(request)
        self._advance()

    def ended(self) -> None:
        self.finish()

    def drained(self) -> None:
        self._flush_events()
        self._advance()

    def closed(self) -> None:
        for request in self._waiting:
            self._dispatcher.discard(request)
        self._waiting.clear()
        self._events.clear()
        self._has_events = False
        self._in_band.stop()

    # -- what the server calls
    # ----------------------------------------------------------------------

    def event(self, event: Mapping[str, object]) -> None:
        """Pass an event on, once the client has negotiated; bounded when it does not read."""
        if not self._has_events or self._connection is None:
            return
        self._events.append(event)
        if len(self._events) > EVENTS_WAITING_MAX:
            self._events.popleft()
            self._events_dropped += 1
        self._flush_events()

    def finish(self) -> None:
        """Read no more; answer what was asked, then close."""
        self._is_ending = True
        self._advance()

    # -- inside
    # -------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Begin the next request when the last one is answered and the client reads its answers."""
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        if self._waiting and not self._is_busy and not connection.is_congested:
            self._is_busy = True
            self._submit(self._in_band, self._waiting.popleft(), self._answer_in_band)
        if self._is_ending:
            connection.set_reading(False)
            if not self._is_busy and not self._waiting:
                connection.close_when_sent()
            return
        connection.set_reading(
            len(self._waiting) < REQUESTS_WAITING_MAX and not connection.is_congested
        )

    def _submit(
        self, worker: SerialWorker, request: Request, answer: Callable[[Request, Answer], None]
    ) -> None:
        def work() -> None:
            result = self._dispatcher.execute(request, self._client)
            try:
                self._loop.call_soon_threadsafe(answer, request, result)
            except RuntimeError:  # the loop was closed while the command ran
                return

        worker.submit(work)

    def _answer_in_band(self, request: Request, answer: Answer) -> None:
        self._is_busy = False
        self._answer(request, answer)

    def _answer(self, request: Request, answer: Answer) -> None:
        self._send(answer.reply, fallback_id=request.reply_id)
        # events follow the reply to qmp_capabilities, never precede it: clients read it as the next
        # line
        self._has_events = self._client.is_negotiated
        if answer.after_reply is not None:
            answer.after_reply()
        self._advance()

    def _send(self, message: Mapping[str, object], *, fallback_id: object = None) -> None:
        try:
            text = json.dumps(message, allow_nan=False)
        except (TypeError, ValueError) as error:  # a command returned what JSON cannot carry
            problem = QMPError(f"the answer cannot be expressed in JSON: {error}").reply()
            if isinstance(fallback_id, dict):
                problem |= fallback_id
            text = json.dumps(problem)
        if self._connection is not None:
            self._connection.write(text.encode("ascii") + b"\r\n")

    def _flush_events(self) -> None:
        connection = self._connection
        while self._events and connection is not None and not connection.is_congested:
            if self._events_dropped:
                oldest = self._events[0]
                count, self._events_dropped = self._events_dropped, 0
                self._send(
                    {
                        "event": DROPPED_EVENT,
                        "data": {"count": count},
                        "timestamp": oldest["timestamp"],
                    }
                )
            self._send(self._events.popleft())
