"""The demo's migration with something in between: two real VM processes, steered by QMP like the
demo's own, a proxy on their connection, and the demo's verdict on the outcome.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from migration.commands.demo_report import DemoRun
from tests.support.monitor_process import RunningVM, switch_on
from tests.support.proxy import Proxy
from tests.support.qmp import QmpClient, QmpError
from tests.support.tamper import Tamper

TIMEOUT_S = 60.0
ENDED = {"completed", "failed", "cancelled", "postcopy-paused"}
SHAPE = ("-m", "4M", "--smp", "1")


class TamperedDemo:
    """Both VMs, connected by a proxy, the migration not started yet.

    :ivar proxy: for its own records and for further steps.
    """

    def __init__(self, source: RunningVM, target: RunningVM, proxy: Proxy, folder: Path) -> None:
        self.source, self.target = source.client(), target.client()
        self.proxy = proxy
        self._uri = f"unix:{folder}/migration"

    def prepare(self, *, checksum: bool, **parameters: object) -> None:
        """Capabilities and parameters on both sides; the destination listens."""
        for client in (self.source, self.target):
            switch_on(client, "events", "postcopy-ram")
            client.execute("migrate-set-parameters", {"x-checksum": checksum})
        self.target.execute("migrate-incoming", {"uri": self._uri, "exit-on-error": False})
        # Nothing fits a pause of no length: precopy goes on until postcopy is asked for. And it is
        # slower than the guest: at any moment there is much left for postcopy.
        named = {name.replace("_", "-"): value for name, value in parameters.items()}
        slow = {"downtime-limit": 0, "max-bandwidth": 16 << 20}
        self.source.execute("migrate-set-parameters", {**slow, **named})

    def migrate(self, *, passes: int = 0) -> None:
        """Start, and switch to postcopy after so many looks at what the guest wrote."""
        self.source.execute("migrate", {"uri": self.proxy.uri})
        if passes:
            self.source.wait_event("MIGRATION_PASS", lambda data: data["pass"] >= passes)
        self.source.execute("migrate-start-postcopy")

    def verdict(self) -> dict[str, Any]:
        """What the demo would print, once both sides came to an end or a pause."""
        args = argparse.Namespace(
            backing="anon", transport="unix", smp=1, vcpu="thread", ram_bytes=4 << 20
        )
        record = DemoRun(args)
        record.source = self._end_of(self.source)
        record.destination = self._end_of(self.target)
        survivor = self._where_the_guest_runs(record)
        if survivor is not None:
            survivor.execute("stop")
            record.machine = survivor.execute("x-query-machine")
            try:
                record.oracle = survivor.execute("x-oracle-sweep")
            except QmpError as error:
                record.errors.append(error.description)
        return record.result()

    def _where_the_guest_runs(self, record: DemoRun) -> QmpClient | None:
        running = [
            (name, client)
            for name, client in (("source", self.source), ("destination", self.target))
            if client.execute("query-status")["status"] == "running"
        ]
        assert len(running) <= 1, "the guest runs on both sides"
        if not running:
            return None
        record.survivor = running[0][0]
        return running[0][1]

    @staticmethod
    def _end_of(client: QmpClient) -> dict[str, Any]:
        client.wait_event("MIGRATION", lambda data: data["status"] in ENDED, timeout_s=TIMEOUT_S)
        found: dict[str, Any] = client.execute("query-migrate")
        return found

    def close(self) -> None:
        self.source.close()
        self.target.close()


@contextmanager
def tampered_demo(
    folder: Path, *tampers: Tamper, shape: tuple[str, ...] = SHAPE
) -> Iterator[TamperedDemo]:
    """Two VMs of this shape and a proxy with these tampers between them."""
    with (
        RunningVM(folder, "source", *shape) as source,
        RunningVM(folder, "destination", *shape, "--incoming", "defer") as target,
        Proxy(f"unix:{folder}/migration", *tampers) as proxy,
    ):
        demo = TamperedDemo(source, target, proxy, folder)
        try:
            yield demo
        finally:
            demo.close()
