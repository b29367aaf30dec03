"""The monitor's I/O thread: listeners, clients, events.

One asyncio loop in one thread does all socket work and executes no command, so it never waits for
the guest, for a lock of the runtime, or for a page.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .address import Address, Listener
from .commands_migration import MIGRATION_COMMANDS
from .commands_snapshot import SNAPSHOT_COMMANDS
from .commands_vm import VM_COMMANDS
from .connection import Connection
from .context import Monitor
from .dispatch import Dispatcher
from .hmp_session import HMPSession
from .qmp_session import QMPSession
from .worker import SerialWorker

CLIENTS_MAX = 16
"""Further clients are closed at once, so that whoever leaks connections is noticed."""
_FLUSH_S = 2.0
_RETRY_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorStatistics:
    """Counters of a :class:`MonitorServer`, since its start."""

    clients: int
    clients_accepted: int
    clients_refused: int
    events: int


def timestamp() -> dict[str, int]:
    """Now, as events carry it: seconds and microseconds since the epoch."""
    microseconds = time.time_ns() // 1000
    return {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000}


class MonitorServer:
    """QMP and HMP sockets of one VM.

    Threads: every public method may be called from any thread but the monitor's own.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        commands = (*VM_COMMANDS, *MIGRATION_COMMANDS, *SNAPSHOT_COMMANDS)
        self._dispatcher = Dispatcher(monitor, commands)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._out_of_band = SerialWorker("qmp-oob")
        self._listeners: list[Listener] = []
        self._sessions: dict[Connection, QMPSession | HMPSession] = {}
        self._workers: list[SerialWorker] = [self._out_of_band]
        self._accepted = self._refused = self._events = 0
        self._is_closed = False
        self._finished = threading.Event()  # all clients are closed
        self._thread.start()
        monitor.jobs.on_change = lambda data: self.emit("JOB_STATUS_CHANGE", data)

    def listen_qmp(self, address: Address) -> Address:
        """Open a QMP socket; returns its address as bound, QMPError when it cannot be bound."""
        return self._listen(address, self._start_qmp)

    def listen_hmp(self, address: Address) -> Address:
        """Open an HMP console's socket. As :meth:`listen_qmp`."""
        return self._listen(address, self._start_hmp)

    def emit(self, name: str, data: Mapping[str, object] | None = None) -> None:
        """Send an event to all QMP clients. Returns at once; never waits for a client."""
        event: dict[str, object] = {"event": name, "timestamp": timestamp()}
        if data:
            event["data"] = dict(data)
        self._call(lambda: self._broadcast(event))

    def forward(self, name: str, data: Mapping[str, object]) -> None:
        """A listener for the migration service: passes on what clients asked for."""
        if self._monitor.forwards(name):
            self.emit(name, data)

    def statistics(self) -> MonitorStatistics:
        """What happened so far."""
        return MonitorStatistics(len(self._sessions), self._accepted, self._refused, self._events)

    def close(self) -> bool:
        """Stop listening, answer what was asked, close all clients, end the thread, unlink files.

        Waits at most a few seconds for clients that do not read and for commands still running.
        :returns: False when a command is still inside the machine; its thread is left behind.
        """
        if self._is_closed:
            return True
        self._is_closed = True
        self._call(self._finish_sessions)
        self._finished.wait(_FLUSH_S)
        self._call(self._loop.stop)
        self._thread.join()
        for listener in self._listeners:
            listener.close()
        self._loop.close()
        self._monitor.fds.close_all()
        self._out_of_band.stop()
        deadline = time.monotonic() + _FLUSH_S
        ended = [w.join(max(0.0, deadline - time.monotonic())) for w in self._workers]
        return all(ended)

    # -- the loop's thread from here on
    # ---------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for connection in list(self._sessions):
            connection.close()
        for listener in self._listeners:
            self._loop.remove_reader(listener.socket)

    def _call(self, action: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(action)
        except RuntimeError:  # closed: nobody is left to be told
            return

    def _listen(self, address: Address, start: Callable[[socket.socket], None]) -> Address:
        listener = Listener(address)
        self._listeners.append(listener)
        self._call(lambda: self._watch(listener, start))
        return listener.address

    def _watch(self, listener: Listener, start: Callable[[socket.socket], None]) -> None:
        if not self._is_closed:
            self._loop.add_reader(listener.socket, self._accept, listener, start)

    def _accept(self, listener: Listener, start: Callable[[socket.socket], None]) -> None:
        try:
            client = listener.accept()
        except OSError as error:  # out of descriptors or memory: try again when some may be back
            log.warning("cannot accept a client on %s: %s", listener.address, error)
            self._loop.remove_reader(listener.socket)
            self._loop.call_later(_RETRY_S, self._watch, listener, start)
            return
        if client is None:
            self._refused += 1
        elif len(self._sessions) >= CLIENTS_MAX:
            self._refused += 1
            client.close()
        else:
            self._accepted += 1
            start(client)

    def _start_qmp(self, client: socket.socket) -> None:
        session = QMPSession(
            self._dispatcher,
            self._loop,
            in_band=self._worker("qmp"),
            out_of_band=self._out_of_band,
        )
        session.start(self._connect(client, session))

    def _start_hmp(self, client: socket.socket) -> None:
        session = HMPSession(self._monitor, self._loop, worker=self._worker("hmp"))
        session.start(self._connect(client, session))

    def _connect(self, client: socket.socket, session: QMPSession | HMPSession) -> Connection:
        connection = Connection(self._loop, client, session, on_closed=self._forget)
        self._sessions[connection] = session
        return connection

    def _worker(self, kind: str) -> SerialWorker:
        worker = SerialWorker(f"{kind}-{self._accepted}")
        self._workers = [old for old in self._workers if not old.has_ended]
        self._workers.append(worker)
        return worker

    def _forget(self, connection: Connection) -> None:
        self._sessions.pop(connection, None)
        if self._is_closed and not self._sessions:
            self._finished.set()

    def _broadcast(self, event: Mapping[str, object]) -> None:
        self._events += 1
        for session in list(self._sessions.values()):
            if isinstance(session, QMPSession):
                session.event(event)

    def _finish_sessions(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener.socket)
        for session in list(self._sessions.values()):
            session.finish()
        if not self._sessions:
            self._finished.set()
