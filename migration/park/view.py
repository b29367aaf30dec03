"""Reading a guest that ``postcopy park --serve`` takes in, while it is still arriving.

    with View("/tmp/vm1.view") as view:
        block = view["pc.ram"]
        header = block.read(0x100000, 4096)       # sleeps until that page has come

A small client of the protocol in :mod:`.serve`; any language with mmap(2) and userfaultfd(2) can
do the same. The process needs the right to open a userfaultfd for user-mode faults.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from uffd import Mapping, Mode, UffdError, Userfaultfd

from .serve import FORMAT, KIND

_LINE_MAX = 1 << 20
_FDS_MAX = 250


class ViewError(Exception):
    """Nobody shows a guest there, or what is missing of it never comes."""


class ViewBlock:
    """One RAM block of the guest. Reading sleeps on pages that have not come, without the GIL."""

    def __init__(self, idstr: str, mapping: Mapping) -> None:
        self.idstr = idstr
        self._mapping = mapping

    @property
    def length(self) -> int:
        """Bytes."""
        return self._mapping.length

    def read(self, offset: int, length: int) -> bytes:
        """What the guest has there. Torn and out of date while the guest still runs (precopy).

        :raises ValueError: outside the block.
        """
        return self._mapping.read(offset, length)

    def unsafe_view(self) -> memoryview:
        """The mapping itself. A touch of a missing page then sleeps with the GIL in hand: no other
        thread of this process runs meanwhile, and if the server dies, none ever."""
        return self._mapping.unsafe_view()


class View:
    """A guest on its way in. A context manager; for one thread at a time, but its blocks for any.

    :ivar machine: its machine type.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float | None = 30.0) -> None:
        """:param timeout_s: how long to wait for a guest to be shown, as its source may not have
            come yet; None: for ever.
        :raises ViewError: nobody is there, or no guest in time, or it is another kind of server.
        :raises UffdError: no userfaultfd can be had.
        """
        self._blocks: dict[str, ViewBlock] = {}
        self._ended = threading.Event()
        self._is_complete = self._is_closing = False
        with ExitStack() as stack:
            self._socket = stack.enter_context(_connect(Path(path), timeout_s))
            self.machine = self._open(stack)
            self._thread = threading.Thread(target=self._watch, name="view-watch", daemon=True)
            self._thread.start()
            self._stack = stack.pop_all()

    def _open(self, stack: ExitStack) -> str:
        hello, fds = _read_hello(self._socket)
        uffd = stack.enter_context(Userfaultfd.open())
        self._uffd = uffd
        mappings = []
        for index, ((idstr, length), fd) in enumerate(zip(hello["blocks"], fds, strict=True)):
            mapping = stack.enter_context(
                Mapping.of_file(fd, length, shared=False, protection=mmap.PROT_READ)
            )
            uffd.register(mapping, Mode.MISSING)
            mappings.append([index, mapping.address, length])
            self._blocks[idstr] = ViewBlock(idstr, mapping)
        line = json.dumps({"mappings": mappings}).encode() + b"\n"
        socket.send_fds(self._socket, [line], [uffd.fileno()])
        self._lines = self._socket.makefile("r", encoding="utf-8")
        stack.callback(self._lines.close)
        if self._next_event() != "ready":
            raise ViewError("the server does not want us")
        self._socket.settimeout(None)
        return str(hello["machine"])

    def _next_event(self) -> str:
        line = self._lines.readline(_LINE_MAX)
        return str(json.loads(line)["event"]) if line else ""

    def _watch(self) -> None:
        """Until the server says how it ended. When it just goes away nobody brings a page any more,
        and nobody but us can tell those who wait."""
        try:
            event = self._next_event()
        except (OSError, ValueError):
            event = ""
        self._is_complete = event == "complete"
        if not event and not self._is_closing:
            for block in self._blocks.values():
                self._poison(block)
        self._ended.set()

    def _poison(self, block: ViewBlock) -> None:
        mapping = block._mapping
        for start in range(mapping.address, mapping.address + mapping.length, mapping.page_size):
            try:
                self._uffd.poison(start, mapping.page_size)
            except UffdError:
                continue  # it is there

    def wait(self, timeout_s: float | None = None) -> bool:
        """Sleep until the whole guest is here.

        :returns: False when the time was over first.
        :raises ViewError: it never will be: reading what is missing ends in SIGBUS.
        """
        if not self._ended.wait(timeout_s):
            return False
        if not self._is_complete:
            raise ViewError("the rest of this guest never comes")
        return True

    def __getitem__(self, idstr: str) -> ViewBlock:
        return self._blocks[idstr]

    def __iter__(self) -> Iterator[ViewBlock]:
        return iter(self._blocks.values())

    def __len__(self) -> int:
        return len(self._blocks)

    def close(self) -> None:
        """Unmap everything. Nobody may be reading."""
        self._is_closing = True
        with contextlib.suppress(OSError):  # the server may have left before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _connect(path: Path, timeout_s: float | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise ViewError(f"{path}: {error.strerror or error}") from error
    return connection


def _read_hello(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The first line and its descriptors. :raises ViewError: another kind of server."""
    fds: list[int] = []
    try:
        data, fds, _, _ = socket.recv_fds(connection, _LINE_MAX, _FDS_MAX)
        while not data.endswith(b"\n"):
            more = connection.recv(_LINE_MAX)
            if not more or len(data) > _LINE_MAX:
                raise ValueError("no greeting")
            data += more
        hello = json.loads(data)
        if hello["kind"] != KIND or hello["format"] != FORMAT or len(fds) != len(hello["blocks"]):
            raise ValueError("another kind of server")
    except (OSError, ValueError, KeyError, TypeError) as error:
        for fd in fds:
            os.close(fd)
        raise ViewError(f"this shows no guest: {error}") from error
    return hello, fds
