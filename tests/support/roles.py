"""One test body for every pair of ends: ours and ours, ours and a stock QEMU, in both directions.

An :class:`End` says and asks by QMP's names what a test needs, whoever it is. RAM is compared byte
for byte: both ends are QEMU's ``-M none`` or our like of it, whose RAM only the test writes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.need import need
from tests.support.pair import Side, side
from tests.support.qemu import (
    INSTALL,
    MIB,
    PAGE_BYTES,
    Qemu,
    QemuBinary,
    installed_qemu,
    newer_qemu,
    pattern,
)

RAM_BYTES = 8 * MIB
LOAD_AT = 0x40000
PAGES = 700
CONTENTS = pattern(PAGES, seed="roles", zero_every=5)
EXPECTED = bytes(LOAD_AT) + CONTENTS + bytes(RAM_BYTES - LOAD_AT - len(CONTENTS))
_OPTIONS = {"machine_type": "none", "ram_bytes": RAM_BYTES, "smp": 0, "fill_share": 0.0}


def page_at(index: int) -> tuple[int, bytes]:
    """Where the ``index``-th page of the contents lies, and what is in it."""
    return LOAD_AT + index * PAGE_BYTES, CONTENTS[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]


class End(ABC):
    """One end of a migration."""

    version: tuple[int, int] | None = None  # None: ours

    @abstractmethod
    def execute(self, command: str, **arguments: Any) -> Any: ...

    @abstractmethod
    def wait(self, status: str, count: int = 1) -> None:
        """Until the status was entered so many times."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Guest memory; a missing page is waited for."""

    @abstractmethod
    def pass_socket(self, name: str, end: socket.socket) -> None:
        """Hand over a descriptor for ``fd:NAME``."""

    def switch_on(self, *names: str) -> None:
        states = [{"capability": name, "state": True} for name in ("events", *names)]
        self.execute("migrate-set-capabilities", capabilities=states)

    def set(self, **parameters: Any) -> None:
        self.execute("migrate-set-parameters", **parameters)

    @property
    def status(self) -> str:
        return str(self.execute("query-migrate").get("status", "none"))

    @property
    def run_state(self) -> str:
        return str(self.execute("query-status")["status"])

    @property
    def preempts_early(self) -> bool:
        """A QEMU of 7.2: the preempt channel comes first."""
        return self.version is not None and self.version < (8, 0)


class OurEnd(End):
    """A machine of ours in this process, asked through its own QMP dispatcher."""

    def __init__(self, stack: ExitStack, *, incoming: bool) -> None:
        from migration.monitor.commands_migration import MIGRATION_COMMANDS
        from migration.monitor.commands_vm import VM_COMMANDS
        from migration.monitor.context import Monitor
        from migration.monitor.dispatch import Client, Dispatcher

        self.side: Side = stack.enter_context(side(**_OPTIONS, incoming=incoming))
        self.monitor = Monitor(self.side.service, self.side.machine, on_quit=lambda reason: None)
        stack.callback(self.monitor.fds.close_all)
        self._dispatcher = Dispatcher(self.monitor, (*VM_COMMANDS, *MIGRATION_COMMANDS))
        self._client = Client(is_negotiated=True)
        if not incoming:
            self.side.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
            self.side.machine.start()

    def execute(self, command: str, **arguments: Any) -> Any:
        from migration.monitor.dispatch import read_request

        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = read_request({"execute": command, "arguments": named}, self._client)
        reply = self._dispatcher.execute(request, self._client).reply
        assert "return" in reply, (command, reply)
        return reply["return"]

    def wait(self, status: str, count: int = 1) -> None:
        self.side.wait_count("MIGRATION", count, status=status)

    def read(self, offset: int, length: int) -> bytes:
        return self.side.machine.ram.by_idstr("ram").read(offset, length)

    def pass_socket(self, name: str, end: socket.socket) -> None:
        self.monitor.fds.put(name, os.dup(end.fileno()))


class QemuEnd(End):
    """A stock QEMU in a process of its own."""

    def __init__(self, stack: ExitStack, binary: QemuBinary, *, incoming: bool) -> None:
        self.version = binary.version
        self.qemu = stack.enter_context(
            Qemu(
                binary,
                ram_bytes=RAM_BYTES,
                incoming="defer" if incoming else None,
                load={} if incoming else {LOAD_AT: CONTENTS},
            )
        )
        self.qemu.set_capabilities()

    def execute(self, command: str, **arguments: Any) -> Any:
        return self.qemu.execute(command, **arguments)

    def wait(self, status: str, count: int = 1) -> None:
        wanted = f"MIGRATION:{status}"
        while self.qemu.qmp.event_names().count(wanted) < count:
            self.qemu.qmp.wait_event("MIGRATION", timeout_s=60)

    def read(self, offset: int, length: int) -> bytes:
        return self.qemu.read_ram(offset, length)

    def pass_socket(self, name: str, end: socket.socket) -> None:
        self.qemu.qmp.execute("getfd", {"fdname": name}, descriptor=end.fileno())


@dataclass
class Ends:
    """A source with contents in its RAM, and who waits for it."""

    source: End
    target: End

    def listen(self, uri: str, *, recovery: bool = False) -> str:
        """The target listens; the URI for the source."""
        self.target.execute("migrate-recover" if recovery else "migrate-incoming", uri=uri)
        return uri

    def begin(self, uri: str, *capabilities: str, connect: str | None = None) -> None:
        """Switch capabilities on at both ends and start."""
        for end in (self.source, self.target):
            end.switch_on("return-path", *capabilities)
        self.listen(uri)
        self.source.execute("migrate", uri=connect or uri)

    def assert_completed(self) -> None:
        """Both say so, the guest runs over there only, and RAM is what it was."""
        self.source.wait("completed")
        self.target.wait("completed")
        while self.source.run_state == "finish-migrate":
            pass  # a QEMU says completed a moment before
        assert self.source.run_state == "postmigrate"
        assert self.target.run_state == "running"
        assert self.target.read(0, RAM_BYTES) == EXPECTED


@dataclass(frozen=True)
class Role:
    """Who is the source and who the destination: None is ours, else which QEMU."""

    source: str | None
    target: str | None

    def __str__(self) -> str:
        return f"{self.source or 'ours'}-to-{self.target or 'ours'}"


ROLES = [
    Role(None, None),
    Role(None, "installed"),
    Role(None, "newer"),
    Role("installed", None),
    Role("newer", None),
]


def binary_of(which: str) -> QemuBinary:
    """The QEMU of that kind, or a skip with the reason."""
    if which == "installed":
        binary = installed_qemu()
        need(binary, "no qemu-system-x86_64 on this host", remedy=INSTALL)
    else:
        binary = newer_qemu()
        need(binary, "no second QEMU (10.0) unpacked: `make qemu-10` does it where it can")
    assert binary is not None
    return binary


@contextlib.contextmanager
def ends_of(role: Role) -> Iterator[Ends]:
    """Both ends, closed again."""
    with ExitStack() as stack:

        def make(which: str | None, *, incoming: bool) -> End:
            if which is None:
                return OurEnd(stack, incoming=incoming)
            return QemuEnd(stack, binary_of(which), incoming=incoming)

        target = make(role.target, incoming=True)
        yield Ends(make(role.source, incoming=False), target)


@pytest.fixture(params=ROLES, ids=str)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Every role in turn. Import it into a test module to use it there."""
    with ends_of(request.param) as both:
        yield both
