"""A small honest service and guest in memory: what the monitor steers when no memory has to move.

It keeps settings, follows the statuses a source goes through and tells its listeners, as the real
service does; it moves nothing. Commands can be held up on purpose (``gate``), as a page that does
not come holds up a real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from migration.monitor.address import UnixAddress
from migration.monitor.context import Monitor
from migration.monitor.errors import QMPError
from migration.monitor.server import MonitorServer

EventListener = Callable[[str, dict[str, object]], None]


class FakeVerdict:
    """Four pages, all good."""

    def as_json(self) -> dict[str, object]:
        return {"pages_checked": 4, "errors": 0}


class FakeGuest:
    """A guest that only has a run state. ``gate`` cleared makes the oracle's sweep wait for it."""

    def __init__(self) -> None:
        self.run_state = "running"
        self.gate = threading.Event()
        self.gate.set()
        self.is_sweeping = threading.Event()

    def statistics(self) -> dict[str, object]:
        return {"vcpus": 1}

    def sweep(self) -> FakeVerdict:
        self.is_sweeping.set()
        self.gate.wait()
        return FakeVerdict()


class FakeService:
    """Settings, statuses and events of a source that migrates nothing."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._capabilities = {"events": True, "postcopy-ram": False}
        self._parameters: dict[str, object] = {
            "max-bandwidth": 128 << 20,
            "downtime-limit": 300,
            "max-postcopy-bandwidth": 0,
            "multifd-compression": "none",
            "cpu-throttle-tailslow": False,
        }
        self._status = "none"
        self._ended = threading.Event()
        self._listeners: list[EventListener] = []
        self.uris: list[str] = []
        self.fds: Callable[[str], int] | None = None
        self.received_fds: list[int] = []

    def add_listener(self, callback: EventListener) -> None:
        self._listeners.append(callback)

    def _emit(self, name: str, data: dict[str, object]) -> None:
        for callback in self._listeners:
            callback(name, data)

    def _move(self, status: str) -> None:
        self._status = status
        self._emit("MIGRATION", {"status": status})

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        for name in changes:
            if name not in self._capabilities:
                raise QMPError(f"no capability {name!r}")
        self._capabilities |= changes

    def capabilities(self) -> dict[str, bool]:
        return dict(self._capabilities)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        for name in changes:
            if name not in self._parameters:
                raise QMPError(f"no parameter {name!r}")
        self._parameters |= changes

    def parameters(self) -> dict[str, object]:
        return dict(self._parameters)

    def migrate(self, uri: str, *, resume: bool = False) -> None:
        if uri.startswith("fd:") and self.fds is not None:
            self.received_fds.append(self.fds(uri.removeprefix("fd:")))
        self.uris.append(uri)
        self._ended.clear()
        self._move("setup")
        self._move("active")

    def migrate_incoming(self, uri: str) -> None:
        self.uris.append(uri)
        self._move("setup")

    def start_postcopy(self) -> None:
        if not self._capabilities["postcopy-ram"]:
            raise QMPError("postcopy-ram is off")
        self._move("postcopy-active")

    def cancel(self) -> None:
        if self._status in ("setup", "active"):
            self._move("cancelled")
            self._ended.set()

    def pause(self) -> None:
        if self._status != "postcopy-active":
            raise QMPError("no postcopy is running")
        self._move("postcopy-paused")

    def yank(self) -> None:
        self._move("failed")

    def take_back(self, *, not_running_elsewhere: bool) -> None:
        if not not_running_elsewhere or self._status != "failed":
            raise QMPError("there is no guest to take back")
        self._guest.run_state = "running"

    @property
    def is_busy(self) -> bool:
        return self._status not in ("none", "completed", "failed", "cancelled")

    def calc_dirty_rate(self, calc_time_ms: int, sample_pages: int | None = None) -> None:
        raise QMPError(f"no guest runs: {calc_time_ms} ms, {sample_pages} pages")

    def query_dirty_rate(self, unit: str = "second") -> dict[str, object]:
        return {"status": "unstarted", "calc-time-unit": unit}

    def recover(self, uri: str) -> None:
        self.uris.append(uri)
        self._move("postcopy-recover")

    def continue_(self, state: str) -> None:
        if state != self._status:
            raise QMPError(f"the status is {self._status!r}, not {state!r}")

    def query(self) -> dict[str, object]:
        return {} if self._status == "none" else {"status": self._status}

    def cont(self) -> None:
        self._guest.run_state = "running"
        self._emit("RESUME", {})

    def stop_guest(self) -> None:
        self._guest.run_state = "paused"
        self._emit("STOP", {})

    def wait(self, timeout_s: float | None) -> str:
        self._ended.wait(timeout_s)
        return self._status


class MonitorUnderTest:
    """A monitor server on a unix socket in ``folder``, with the fakes behind it."""

    def __init__(self, folder: Path) -> None:
        self.guest = FakeGuest()
        self.service = FakeService(self.guest)
        self.quit_reasons: list[str] = []
        self.has_quit = threading.Event()
        self.monitor = Monitor(self.service, self.guest, on_quit=self._quit, name="vm")
        self.server = MonitorServer(self.monitor)
        self.service.add_listener(self.server.forward)
        self.path = str(folder / "qmp")
        self.server.listen_qmp(UnixAddress(self.path))

    def _quit(self, reason: str) -> None:
        self.quit_reasons.append(reason)
        self.has_quit.set()
