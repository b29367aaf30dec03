"""One side of a chaos run: its process, what it says of itself, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from migration.engine.states import Status
from tests.chaos.forked import fork_agent
from tests.chaos.network import Namespace
from tests.support.e2e_child import Child, Refused
from tests.support.leaks import Snapshot, leaked, snapshot

#: What a migration comes to rest in.
SETTLED = frozenset(
    status.value
    for status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED)
)
BEFORE_COMMIT = frozenset(
    status.value
    for status in (
        Status.SETUP,
        Status.ACTIVE,
        Status.PRE_SWITCHOVER,
        Status.DEVICE,
        Status.POSTCOPY_DEVICE,
    )
)
#: Far more than anything takes on a busy machine: only what hangs gets there.
BOUND_S = 45.0
_POLL_S = 0.01


class Violation(Exception):
    """An invariant does not hold."""


class HostLacks(Exception):
    """The run cannot be made here and now: the host has not enough of something."""


class Side:
    """A process with a guest's machine in it.

    :ivar gone: it was killed, or it ended.
    :ivar quit: it was told to end while it migrated.
    """

    def __init__(
        self, name: str, namespace: Namespace, folder: Path, *, disk_bytes: int = 0
    ) -> None:
        self.name = name
        self.address = namespace.address
        self.gone = False
        self.quit = False
        self.folder = folder / name
        self.folder.mkdir()
        start = partial(
            fork_agent,
            namespace=namespace.path,
            folder=str(self.folder),
            disk_bytes=disk_bytes,
        )
        self.child = Child(name, start=start)
        self._before: Snapshot | None = None

    def make(self, **options: Any) -> None:
        """Its machine. What it has more than now will be missed at its end."""
        self.child.call("ready")
        # The pool of huge pages is everybody's; who holds some does so by a mapping or descriptor.
        self._before = replace(snapshot(self.child.pid, prefixes=()), hugepages={})
        self.child.call("make", **options)

    @property
    def status(self) -> str:
        """The migration's last one that was told."""
        statuses = self.child.statuses
        return statuses[-1] if statuses else Status.NONE.value

    @property
    def is_alive(self) -> bool:
        """Its process is there."""
        if self.child.process.poll() is not None:
            self.gone = True
        return not self.gone

    @property
    def is_settled(self) -> bool:
        """Nothing more will happen by itself."""
        return not self.is_alive or self.quit or self.status in SETTLED

    def service(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the migration service."""
        return self.child.call("service", method, *args, **kwargs)

    def try_service(self, method: str, *args: Any, **kwargs: Any) -> str | None:
        """The same; None if it went through, else what it said."""
        try:
            self.service(method, *args, **kwargs)
        except Refused as error:
            return str(error)
        return None

    def take_back(self, *, not_running_elsewhere: bool) -> str | None:
        """``x-take-back``; None if it went through, else what it said."""
        return self.try_service("take_back", not_running_elsewhere=not_running_elsewhere)

    @property
    def run_state(self) -> str:
        """What it says itself of its guest."""
        return str(self.child.call("run_state"))

    @property
    def error(self) -> str:
        """``error-desc`` of query-migrate."""
        return str(self.service("query").get("error-desc", ""))

    def listen(self, *, recovers: bool = False) -> str:
        """Wait for a source, the first time or after a pause; where."""
        method = "recover" if recovers else "migrate_incoming"
        uri = str(self.service(method, f"tcp:{self.address}:0,allow-remote=on"))
        return uri.partition(",")[0]

    # -- what is done to it ---------------------------------------------------------------------

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()
        self.gone = True

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP, and SIGCONT at the end."""
        os.kill(self.child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.child.pid, signal.SIGCONT)

    # -- the end --------------------------------------------------------------------------------

    def finish(self) -> None:
        """An orderly end that leaves nothing behind, in the process and outside.

        :raises Violation: it left something, or does not end.
        """
        if not self.is_alive:
            return
        self.child.call("close")
        assert self._before is not None
        found = leaked(self._before, prefixes=())
        if found:
            raise Violation(f"{self.name} left behind: {'; '.join(found)}")
        self.child.send("exit")
        status = self.child.wait_exit()
        if status != 0:
            raise Violation(f"{self.name} ended with status {status}\n{self.child.stderr}")
        files = list(self.folder.iterdir())
        if files:
            raise Violation(f"{self.name} left files behind: {files}")


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it held within the time; looked at again and again, since several processes are."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
