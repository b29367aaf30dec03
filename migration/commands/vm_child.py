"""A ``postcopy run`` in a process of its own, started, watched and ended by another verb."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path

import migration

from .output import UserError
from .qmp_link import VMLink

_END_S = 5.0
# Once it was asked to quit. On an emulated host that shares its processor, ending took seconds.
_QUIT_S = 30.0
_STDERR_LINES = 5


class VMChild:
    """One child. Ends with its parent whatever happens (``--run-with exit-with-parent=on``).

    :ivar link: its monitor, connected by :meth:`start`.
    :ivar exit_status: once it has ended; negative: the signal that killed it.
    """

    def __init__(self, name: str, folder: Path, arguments: Sequence[str]) -> None:
        self.name = name
        self._arguments = arguments
        self._socket = folder / f"{name}.qmp"
        self._stderr = folder / f"{name}.stderr"
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.exit_status: int | None = None
        self.link = VMLink(name, str(self._socket))

    async def start(self, *, timeout_s: float) -> None:
        """Start it and wait until it says that it is ready.

        :raises UserError: it ended instead; with its own last words.
        """
        root = str(Path(migration.__file__).resolve().parent.parent)
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            with open(self._stderr, "wb") as stderr:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "migration", "run", "--json", "--name", self.name),
                    *("--qmp", f"unix:{self._socket}", "--run-with", "exit-with-parent=on"),
                    *self._arguments,
                    stdin=DEVNULL,
                    stdout=PIPE,
                    stderr=stderr,
                    env=os.environ | {"PYTHONPATH": search},
                    start_new_session=True,  # a Ctrl-C on the terminal is the parent's to act on
                )
        except OSError as error:
            raise UserError(f"the {self.name} VM cannot be started: {error}") from None
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_ready()
        except TimeoutError:
            raise UserError(f"the {self.name} VM was not ready within {timeout_s:.0f} s") from None
        self._reader = asyncio.create_task(self._drain())
        await self.link.connect()

    async def _wait_ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if json.loads(line).get("event") == "X_READY":
                return
        status = await self._process.wait()
        raise UserError(f"the {self.name} VM ended with status {status}: {self.last_words()}")

    async def _drain(self) -> None:
        """Its events come by QMP as well; nobody must make it wait for a full pipe."""
        assert self._process is not None
        assert self._process.stdout is not None
        while await self._process.stdout.read(1 << 16):
            pass

    def last_words(self) -> str:
        """The end of what it wrote to stderr, without its progress lines."""
        try:
            lines = self._stderr.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        own = [text for text in lines if not text.startswith(f"{self.name} ")]
        return " / ".join(own[-_STDERR_LINES:])

    async def end(self) -> None:
        """Ask it to quit, then tell it, then make it. Harmless if it never ran."""
        process = self._process
        if process is None:
            return
        wait_s = 0.0
        with contextlib.suppress(UserError, TimeoutError):
            async with asyncio.timeout(_END_S):
                await self.link.execute("quit")
                wait_s = _QUIT_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                await self.link.close()
        # 0: only wait, if it heard that it is to quit.
        for number, timeout_s in ((0, wait_s), (signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await process.wait()
                    break
        if self._reader is not None:
            self._reader.cancel()
        self.exit_status = process.returncode
