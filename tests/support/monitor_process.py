"""``postcopy run`` as a child of a test: started, waited for, talked to, ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.process import end, tied_to_us
from tests.support.qmp import QmpClient

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0


def postcopy_argv(*arguments: str) -> list[str]:
    """The command as a child, from the source tree under test."""
    return [sys.executable, "-m", "migration", *arguments]


def run_postcopy(*arguments: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end and capture what it says."""
    return subprocess.run(
        postcopy_argv(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class RunningVM:
    """A toy VM in a process of its own, ready when constructed.

    :ivar ready: the data of its X_READY event.
    :ivar path: its QMP socket.
    """

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.path = str(folder / f"{name}.qmp")
        self._stderr = folder / f"{name}.stderr"
        argv = postcopy_argv(
            *("run", "--json", "--name", name, "--qmp", f"unix:{self.path}", *arguments)
        )
        with open(self._stderr, "wb") as stderr:
            self.process = subprocess.Popen(
                tied_to_us(argv),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self.ready: dict[str, Any] = self.wait_event("X_READY")["data"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name on its stdout."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"ended before {name}: {self.stderr()}")

    def stderr(self) -> str:
        """What it wrote there so far."""
        return self._stderr.read_text(errors="replace")

    def client(self) -> QmpClient:
        """A new connection to its monitor."""
        return QmpClient(self.path, alive=lambda: self.process.poll() is None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to exactly this process."""
        os.kill(self.process.pid, number)

    def wait_exit(self) -> int:
        """Its exit status; the rest of its output is read so that it can write it."""
        assert self.process.stdout is not None
        self.process.stdout.read()
        return self.process.wait(TIMEOUT_S)

    def __enter__(self) -> RunningVM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self.process)


def switch_on(client: QmpClient, *names: str) -> None:
    """Switch capabilities on."""
    states = [{"capability": name, "state": True} for name in names]
    client.execute("migrate-set-capabilities", {"capabilities": states})


def start_postcopy_pair(
    folder: Path, source: QmpClient, destination: QmpClient, **parameters: object
) -> None:
    """From two idle VMs to status postcopy-active on the source."""
    for client in (source, destination):
        switch_on(client, "events", "postcopy-ram")
    uri = f"unix:{folder}/migration"
    destination.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
    if parameters:
        named = {name.replace("_", "-"): value for name, value in parameters.items()}
        source.execute("migrate-set-parameters", named)
    source.execute("migrate", {"uri": uri})
    source.execute("migrate-start-postcopy")
    source.wait_event("MIGRATION", lambda data: data["status"] == "postcopy-active")
