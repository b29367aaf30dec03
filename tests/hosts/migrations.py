"""A migration of the toy VM from one host to the other, by the project's own command or by QMP."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hosts.machines import PATIENCE_S, Host
from tests.hosts.units import Machine, toy

PORT = 4444
RAM = "32M"
#: Emulated processors: slow enough that a precopy converges and a postcopy has much to ask for.
WORKLOAD = ("--rate", "20000")


@dataclass(frozen=True)
class Ends:
    source: Machine
    destination: Machine

    @property
    def uri(self) -> str:
        """What the source connects to."""
        return f"tcp:{self.destination.host.address}:{PORT}"

    def listen(self, command: str = "migrate-incoming", **arguments: Any) -> None:
        """The destination waits, for whoever reaches it on the migration network."""
        uri = f"{self.uri},allow-remote=on"
        self.destination.execute(command, uri=uri, **arguments)

    def into_postcopy(self, **parameters: Any) -> None:
        """From two idle VMs to a guest that runs at the destination, most of its pages here."""
        for end in (self.source, self.destination):
            end.switch_on("postcopy-ram")
        self.listen(exit_on_error=False)
        if parameters:
            self.source.execute("migrate-set-parameters", **parameters)
        self.source.execute("migrate", uri=self.uri)
        self.source.execute("migrate-start-postcopy")
        self.source.wait_status("postcopy-active")

    def assert_moved(self) -> None:
        """One guest, over there, its memory whole."""
        assert self.source.run_state == "postmigrate"
        self.destination.assert_intact()


@contextmanager
def ends(
    source: Host, destination: Host, folder: Path, *shape: str, ram: str = RAM
) -> Iterator[Ends]:
    """A running toy VM on one host, one of its shape that waits on the other."""
    line = ("-m", ram, *WORKLOAD, *shape)
    with (
        toy(destination, folder, *line, "--incoming", "defer") as there,
        toy(source, folder, *line) as here,
    ):
        yield Ends(here.connect(), there.connect())


def move_slowly(pair: Ends) -> None:
    """A postcopy by ``postcopy migrate`` that leaves pages to ask for; all of the guest moves."""
    pair.destination.switch_on("postcopy-ram")
    pair.listen()
    status, last, text = command(pair, "--set", "max-bandwidth=2M", "--postcopy-after", "1")
    assert status == 0, text
    assert last["migration"]["ram"]["postcopy-requests"] > 0
    pair.assert_moved()


def command(pair: Ends, *options: str) -> tuple[int, dict[str, Any], str]:
    """``postcopy migrate`` on the source's host: status, its last object, its text.

    The destination's monitor stays on its own host, so the other side is set up by QMP from here.
    """
    line = ["postcopy", "migrate", pair.source.monitor, pair.uri, "--json", *options]
    done = pair.source.host.try_run(shlex.join(line), timeout_s=2 * PATIENCE_S)
    objects = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    return done.returncode, objects[-1] if objects else {}, done.stderr
