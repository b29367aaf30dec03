"""One VM process under the bench's hand: started on chosen processors, driven through QMP, ended.

It serves ``postcopy run`` and a stock QEMU alike, so that both are measured by the same steps.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp import QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

Message = dict[str, Any]
FINAL_STATUSES = frozenset({"completed", "failed", "cancelled", "postcopy-paused"})
START_TIMEOUT_S = 20.0
_CONNECT_RETRY_S = 0.005


class BenchError(Exception):
    """A VM did not do what was asked of it; the message holds its own words."""


@contextmanager
def on_processors(cpus: Sequence[int] | None) -> Iterator[None]:
    """Children started inside run on these processors: affinity is inherited across exec."""
    before = os.sched_getaffinity(0)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class VM:
    """A VM that starts (its monitor is waited for at the first use). Leaving the block ends it.

    For one thread (its monitor lives on that thread's event loop).

    :param ram_bytes: its guest RAM.
    :param argv: called with the path its QMP socket has to get; returns the command line.
    :param cpus: processors for the whole process; ``None`` leaves the inherited ones.
    :raises BenchError: at the first use: it ended, or opened no monitor in ``START_TIMEOUT_S``.
    """

    def __init__(
        self,
        name: str,
        ram_bytes: int,
        argv: Callable[[Path], Sequence[str]],
        cpus: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.ram_bytes = ram_bytes
        # Short: the path of a unix socket holds 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="postcopy-bench-"))
        self._monitor: QEMUMonitorProtocol | None = None
        self._log_path = self._folder / "log"
        self.status_times_s: dict[str, float] = {}  # first time of each status, by the VM's clock
        try:
            with open(self._log_path, "wb") as log, on_processors(cpus):
                self._process = subprocess.Popen(
                    list(argv(self._folder / "qmp")),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def _qmp(self) -> QEMUMonitorProtocol:
        """The monitor, connected at the first use: a pair of VMs starts side by side."""
        if self._monitor is None:
            self._monitor = self._connect()
        return self._monitor

    def _connect(self) -> QEMUMonitorProtocol:
        path = self._folder / "qmp"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                stream = socket.socket(socket.AF_UNIX)
                stream.connect(str(path))
                break
            except OSError:
                stream.close()
                if self._process.poll() is not None:
                    raise BenchError(f"{self.name} did not start: {self.log()}") from None
                if time.monotonic() > deadline:
                    raise BenchError(f"{self.name} opened no monitor: {self.log()}") from None
                time.sleep(_CONNECT_RETRY_S)  # a socket that does not exist yet sends no event
        monitor = QEMUMonitorProtocol(stream, nickname=self.name)
        monitor.connect()
        monitor.settimeout(30.0)
        return monitor

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def folder(self) -> Path:
        """A folder of its own, gone with it; short enough for a socket's path."""
        return self._folder

    def log(self) -> str:
        """What it wrote so far."""
        return self._log_path.read_text(errors="replace").strip()

    def account(self) -> str:
        """Its own words about what went wrong, for a person."""
        try:
            reason = self.execute("query-migrate").get("error-desc", "")
        except BenchError:
            reason = f"ended with {self._process.poll()}"
        return f"{reason}; {self.log()}"

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """One QMP command and its answer.

        :raises BenchError: the VM answered with an error, or is gone.
        """
        try:
            return self._qmp.cmd(command, **dict(arguments or {}))
        except (TimeoutError, QMPError, EOFError, OSError) as error:
            raise BenchError(f"{self.name}: {command}: {error}") from error

    def set_capabilities(self, *names: str) -> None:
        """Switch migration capabilities on, ``events`` too."""
        wanted = [{"capability": name, "state": True} for name in ("events", *names)]
        self.execute("migrate-set-capabilities", {"capabilities": wanted})

    def wait_event(
        self, name: str, accept: Callable[[Message], bool], *, timeout_s: float = 60.0
    ) -> Message:
        """Wait for an event whose data ``accept`` likes; its data. Others are dropped.

        Migration statuses passed on the way are noted in :attr:`status_times_s`.

        :raises BenchError: the migration came to an end it was not to come to, the VM is gone, or
            the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                event: Any = self._qmp.pull_event(wait=max(deadline - time.monotonic(), 0.001))
            except (TimeoutError, QMPError, EOFError) as error:
                raise BenchError(f"{self.name}: no {name} came") from error
            data: Message = event.get("data", {})
            if event["event"] == "MIGRATION":
                stamp = event["timestamp"]
                seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
                self.status_times_s.setdefault(str(data["status"]), seconds)
            if event["event"] == name and accept(data):
                return data
            if event["event"] == "MIGRATION" and data["status"] in FINAL_STATUSES:
                raise BenchError(f"{self.name}: ended {data['status']} instead of {name}")

    def wait_status(self, status: str, *, timeout_s: float = 60.0) -> None:
        """Wait for a migration status by its event; at once if it was seen before.

        :raises BenchError: it came to rest in another status, or the time is over.
        """
        if status not in self.status_times_s:
            self.wait_event("MIGRATION", lambda data: data["status"] == status, timeout_s=timeout_s)

    def memory_bytes(self, *, peak: bool = False) -> int:
        """What the process holds now, or held at most: anonymous, file and shared pages.

        Hugetlb pages are not among them (the kernel counts them nowhere but in their pool).
        """
        fields = _status_kib(self.pid)
        return fields["VmHWM" if peak else "VmRSS"] * 1024

    def close(self) -> None:
        """End the process, remove its folder. Twice is fine."""
        if self._monitor is not None:
            with suppress(QMPError, EOFError, OSError):  # the peer may have gone first
                self._monitor.close()
            self._monitor = None
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _status_kib(pid: int) -> dict[str, int]:
    """The memory fields of ``/proc/PID/status``; source: proc_pid_status(5)."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value.split()[0])
    return fields
