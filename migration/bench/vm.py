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

import psutil
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
    """A running VM with its monitor connected. Leaving the ``with`` block ends it.

    For one thread (its monitor lives on that thread's event loop).

    :param argv: called with the path its QMP socket has to get; returns the command line.
    :param cpus: processors for the whole process; ``None`` leaves the inherited ones.
    :raises BenchError: it ended, or did not answer within ``START_TIMEOUT_S``.
    """

    def __init__(
        self, name: str, argv: Callable[[Path], Sequence[str]], cpus: Sequence[int] | None = None
    ) -> None:
        self.name = name
        # Short: the path of a unix socket holds 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="pc-bench-"))
        self._monitor: QEMUMonitorProtocol | None = None
        self._log_path = self._folder / "log"
        qmp_path = self._folder / "qmp"
        try:
            with open(self._log_path, "wb") as log, on_processors(cpus):
                self._process = subprocess.Popen(
                    list(argv(qmp_path)), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        try:
            self._monitor = self._connect(qmp_path)
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> QEMUMonitorProtocol:
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

    def log(self) -> str:
        """What it wrote so far."""
        return self._log_path.read_text(errors="replace").strip()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """One QMP command and its answer.

        :raises BenchError: the VM answered with an error, or is gone.
        """
        assert self._monitor is not None
        try:
            return self._monitor.cmd(command, **dict(arguments or {}))
        except (TimeoutError, QMPError, EOFError, OSError) as error:
            raise BenchError(f"{self.name}: {command}: {error}; {self.log()}") from error

    def set_capabilities(self, *names: str) -> None:
        """Switch migration capabilities on, ``events`` too."""
        wanted = [{"capability": name, "state": True} for name in ("events", *names)]
        self.execute("migrate-set-capabilities", {"capabilities": wanted})

    def wait_status(self, *statuses: str, timeout_s: float = 60.0) -> str:
        """Wait for a migration status by its event; its name.

        :raises BenchError: it came to rest in another status, or the time is over.
        """
        assert self._monitor is not None
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                event = self._monitor.pull_event(wait=max(left, 0.001))
            except (TimeoutError, QMPError, EOFError) as error:
                state = self.execute("query-migrate")
                raise BenchError(
                    f"{self.name}: waited for {'/'.join(statuses)}, is {state}; {self.log()}"
                ) from error
            if event is None or event["event"] != "MIGRATION":
                continue
            status = str(event["data"]["status"])
            if status in statuses:
                return status
            if status in FINAL_STATUSES:
                state = self.execute("query-migrate")
                raise BenchError(f"{self.name}: ended {status}: {state}; {self.log()}")

    def private_bytes(self) -> int:
        """Memory that would be free without this process: RSS and hugepages, shared parts too."""
        full = psutil.Process(self.pid).memory_full_info()
        hugetlb = _smaps_rollup_bytes(self.pid, ("Private_Hugetlb", "Shared_Hugetlb"))
        return int(full.rss) + hugetlb

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


def _smaps_rollup_bytes(pid: int, fields: Sequence[str]) -> int:
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            total += int(value.split()[0]) * 1024
    return total
