"""A connection to a VM's monitor, ours or a stock QEMU's, by the qemu.qmp library."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from .output import UserError

CONNECT_TIMEOUT_S = 10.0


class CommandFailed(UserError):
    """The VM answered with an error.

    :ivar command: what it was asked. :ivar reason: its words.
    """

    def __init__(self, vm: str, command: str, reason: str) -> None:
        super().__init__(f"{vm}: {command}: {reason}")
        self.command = command
        self.reason = reason


class VMGone(UserError):
    """The VM ended, or closed its monitor, while it was needed."""


def qmp_address(text: str) -> str | tuple[str, int]:
    """``PATH``, ``unix:PATH``, ``HOST:PORT`` or ``tcp:HOST:PORT``, as the library takes it."""
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    host, colon, port = text.removeprefix("tcp:").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        return host.strip("[]") or "127.0.0.1", int(port)
    return text


class VMLink:
    """One VM's monitor. For one asyncio loop.

    :ivar name: how messages call it, e.g. ``source``.
    :ivar migration_events: its MIGRATION events, as they come.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self._address = address
        self._client = QMPClient(name)
        self.migration_events = EventListener(names=("MIGRATION",))
        self._client.register_listener(self.migration_events)

    async def connect(self) -> None:
        """Connect and negotiate. :raises UserError: nobody answers there."""
        hint = "is the VM running, with --qmp on that address?"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._client.connect(qmp_address(self._address))
        except TimeoutError:
            raise UserError(
                f"{self._address}: no QMP greeting within {CONNECT_TIMEOUT_S:.0f} s",
                hint="another client may hold it: a QEMU serves one at a time",
            ) from None
        except ConnectError as error:
            number = error.exc.errno if isinstance(error.exc, OSError) else None
            cause = os.strerror(number) if number else str(error.exc)  # asyncio's own text is vague
            raise UserError(
                f"cannot connect to the {self.name}'s monitor {self._address}: {cause}", hint=hint
            ) from None

    @property
    def has_oob(self) -> bool:
        """Whether it executes commands out of band."""
        greeting = self._client.greeting
        return greeting is not None and "oob" in greeting.QMP.capabilities

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> Any:
        """One command; what it returns.

        :raises CommandFailed: the VM refused. :raises VMGone: there is no VM any more.
        """
        try:
            return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            raise CommandFailed(self.name, command, error.error.error.desc) from None
        except (QMPError, OSError) as error:
            raise VMGone(f"the {self.name} went away during {command} ({error})") from None

    async def wait_change(self, timeout_s: float) -> str | None:
        """The next status from a MIGRATION event, or None after ``timeout_s``.

        :raises VMGone: the monitor was closed.
        """
        if self._client.runstate != Runstate.RUNNING:
            raise VMGone(f"the {self.name} went away")
        event = asyncio.ensure_future(self.migration_events.get())
        closed = asyncio.ensure_future(self._client.runstate_changed())
        try:
            await asyncio.wait(
                {event, closed}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if event.done():
                data = event.result()["data"]
                return str(data.get("status")) if isinstance(data, Mapping) else None
            return None
        finally:
            for task in (event, closed):
                task.cancel()

    async def close(self) -> None:
        """Disconnect; the VM goes on."""
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError):
            return
