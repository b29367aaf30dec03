"""A small synchronous QMP client for tests: one socket, answers in order, events kept.

It is written apart from the runtime's own QMP code on purpose: it drives a stock QEMU and our
server alike, so a mistake in one of them shows.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

Message = dict[str, Any]  # JSON from another process: whoever reads a field checks it by using it

_READ_BYTES = 1 << 16


class QmpError(Exception):
    """The peer answered ``error``: its class, its description and the command that caused it."""

    def __init__(self, command: str, error: Mapping[str, Any]) -> None:
        self.command = command
        self.error_class = str(error.get("class", ""))
        self.description = str(error.get("desc", ""))
        super().__init__(f"{command}: {self.error_class}: {self.description}")


class QmpClosed(ConnectionError):
    """The peer closed the monitor (it quit, or died)."""


class QmpClient:
    """Connected and past ``qmp_capabilities`` once constructed. For one thread.

    :param path: the monitor's unix socket; connecting is tried until it listens.
    :param alive: asked between tries; ``False`` ends the waiting (the process is gone).
    :raises TimeoutError: nobody listened within ``timeout_s``.
    """

    def __init__(
        self, path: str, *, timeout_s: float = 10.0, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self.events: list[Message] = []
        self._seen = 0
        self._buffer = b""
        self._socket = _connect(path, timeout_s, alive)
        try:
            self.greeting: Message = self._next(time.monotonic() + timeout_s)
            self.execute("qmp_capabilities", timeout_s=timeout_s)
        except BaseException:
            self._socket.close()
            raise

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 30.0,
        descriptor: int | None = None,
    ) -> Any:
        """Run one command and return its ``return`` value; events on the way are kept.

        :param descriptor: sent along with it (SCM_RIGHTS), for ``getfd``.
        """
        request: Message = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        text = json.dumps(request).encode() + b"\r\n"
        if descriptor is None:
            self._socket.sendall(text)
        else:
            assert socket.send_fds(self._socket, [text], [descriptor]) == len(text)
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._next(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(command, message["error"])
            elif "return" in message:
                return message["return"]

    def wait_event(
        self,
        name: str,
        accept: Callable[[Message], bool] = lambda data: True,
        *,
        timeout_s: float = 30.0,
    ) -> Message:
        """The ``data`` of the next event ``name`` that ``accept`` likes and no earlier call took.

        Events before it count as looked at: two calls in a row wait for two events in order.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            while self._seen < len(self.events):
                event = self.events[self._seen]
                self._seen += 1
                data: Message = event.get("data", {})
                if event["event"] == name and accept(data):
                    return data
            message = self._next(deadline)
            if "event" in message:
                self.events.append(message)

    def event_names(self) -> list[str]:
        """Names of all events so far, a MIGRATION event with its status: ``MIGRATION:active``."""
        return [
            f"{e['event']}:{e['data']['status']}" if e["event"] == "MIGRATION" else e["event"]
            for e in self.events
        ]

    def close(self) -> None:
        """Close the connection; the peer goes on."""
        self._socket.close()

    def __enter__(self) -> QmpClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self, deadline: float) -> Message:
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no QMP message; events so far: {self.event_names()}")
            self._socket.settimeout(left_s)
            try:
                data = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                raise QmpClosed(f"monitor closed; events so far: {self.event_names()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise TypeError(f"not a QMP message: {line!r}")
        return message


def _connect(path: str, timeout_s: float, alive: Callable[[], bool]) -> socket.socket:
    """Connect as soon as the socket listens. Nothing reports a listen(2): hence the tries."""
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        except BaseException:
            connection.close()
            raise
        if not alive():
            raise QmpClosed(f"the process ended before it listened on {os.path.basename(path)}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens on {path}")
        time.sleep(0.005)
