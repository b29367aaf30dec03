"""A program that runs on a host as a systemd unit: it is ended whatever becomes of the test."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.hosts.machines import PATIENCE_S, Host
from tests.support.qmp import QmpClient

_numbers = itertools.count(1)


class Unit:
    """One unit, ended with the ``with`` block."""

    def __init__(self, host: Host, what: str, argv: Sequence[str]) -> None:
        self.host = host
        self.name = f"test-{what}-{os.getpid()}-{next(_numbers)}"
        line = shlex.join(["systemd-run", "--quiet", "--unit", self.name, *argv])
        host.run(f"{line} && echo started")

    def log(self) -> str:
        """All it wrote."""
        done = self.host.try_run(f"journalctl --unit {self.name} --output cat --no-pager")
        return done.stdout + done.stderr

    def is_active(self) -> bool:
        return self.host.try_run(f"systemctl is-active --quiet {self.name}").returncode == 0

    def wait_path(self, path: str) -> None:
        """Until it has made this file or socket there."""
        loop = (
            f"until [ -e {path} ]; do systemctl is-active -q {self.name} || exit 9; sleep 0.2; done"
        )
        done = self.host.try_run(loop)
        assert done.returncode == 0, f"no {path}: {self.log()}"

    def wait_log(self, words: str, *, timeout_s: float = PATIENCE_S) -> str:
        """Until a line with these words was written; that line."""
        read = f"journalctl --unit {self.name} --output cat --no-pager"
        loop = f"until {read} | grep -m1 -F {shlex.quote(words)}; do sleep 0.3; done"
        return self.host.run(f"timeout {timeout_s:g} sh -c {shlex.quote(loop)}")

    def wait_end(self) -> None:
        """Until it has ended by itself."""
        loop = f"while systemctl is-active -q {self.name}; do sleep 0.2; done"
        self.host.run(loop)

    def close(self) -> None:
        stop = f"systemctl stop {self.name}; systemctl reset-failed {self.name}"
        self.host.try_run(stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"{self.host.name}, {self.name}:\n{self.log()}")
        self.close()


class Machine(Unit):
    """A VM with a QMP monitor: a toy VM, or a stock QEMU.

    :ivar qmp: connected, through ssh.
    :ivar monitor: the socket on its host, for the project's own commands there.
    """

    def __init__(self, host: Host, what: str, argv: Sequence[str], folder: Path) -> None:
        """Starts it; :meth:`connect` waits for it, so that two can start at the same time."""
        self.monitor = f"/run/{what}-{next(_numbers)}.qmp"
        self._folder = folder
        super().__init__(host, what, [*argv, "-qmp", self._address(argv)])

    def connect(self) -> Self:
        """Until its monitor answers."""
        self.wait_path(self.monitor)
        self.qmp = QmpClient(self.host.forward(self.monitor, self._folder), timeout_s=60)
        return self

    def _address(self, argv: Sequence[str]) -> str:
        is_qemu = "qemu" in argv[0]
        return f"unix:{self.monitor}{',server=on,wait=off' if is_qemu else ''}"

    def execute(self, command: str, **arguments: Any) -> Any:
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.qmp.execute(command, named, timeout_s=PATIENCE_S)

    def switch_on(self, *names: str) -> None:
        states = [{"capability": name, "state": True} for name in ("events", *names)]
        self.execute("migrate-set-capabilities", capabilities=states)

    def wait_status(self, status: str) -> None:
        """Until this status was entered, since the last such call."""
        self.qmp.wait_event(
            "MIGRATION", lambda data: data["status"] == status, timeout_s=PATIENCE_S
        )

    @property
    def status(self) -> str:
        return str(self.execute("query-migrate").get("status", "none"))

    @property
    def run_state(self) -> str:
        return str(self.execute("query-status")["status"])

    def assert_intact(self) -> None:
        """Every page of a toy VM is what its guest wrote. It is stopped for that."""
        assert self.run_state == "running"
        self.execute("stop")
        swept = self.execute("x-oracle-sweep")
        assert swept["errors"] == 0, swept
        assert swept["pages_checked"] > 0

    def close(self) -> None:
        if hasattr(self, "qmp"):
            self.qmp.close()
        super().close()
        self.host.try_run(f"rm -f {self.monitor}")


def toy(host: Host, folder: Path, *arguments: str) -> Machine:
    """A toy VM that starts on a host."""
    return Machine(host, "toy", ["/usr/local/bin/postcopy", "run", *arguments], folder)
