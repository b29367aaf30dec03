"""``postcopy park --serve``: the RAM of a guest still on its way, for other tools to map and read.

Each block is a memfd that fills as pages come. A reader maps it privately and read-only, registers
the mapping with a userfaultfd of its own and hands us that: a touch of a page that has not come
sleeps in the kernel, we hear of it, ask the source for the page (in postcopy), and wake the reader
when it is there. The page is then in the memfd's page cache: nothing is copied. Readers cannot
write: the descriptor they get is read-only.

The protocol, over a unix stream socket, one JSON object a line:

    us      {"kind": "postcopy view", "format": 1, "machine": NAME,
             "blocks": [[IDSTR, LENGTH]...]} with a descriptor per block, in order (SCM_RIGHTS)
    reader  {"mappings": [[BLOCK INDEX, ADDRESS, LENGTH]...]}, each from its block's start; with its
            userfaultfd (SCM_RIGHTS): handshake done, these ranges registered MISSING
    us      {"event": "ready"}; then, when all has come, {"event": "complete"}: no touch sleeps any
            more; or {"event": "lost"}: what is missing never comes, and is poisoned (SIGBUS)

A reader that sees the socket close without either must take what is missing for lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from uffd import PageFault, UffdError, Userfaultfd
from uffd.files import allocate, memfd_create

from .manifest import ParkError

KIND = "postcopy view"
FORMAT = 1
_LINE_MAX = 1 << 16
_BLOCKS_MAX = 250  # descriptors in one message, SCM_MAX_FD

Ask = Callable[[int, int, int], None]
"""``(block index, offset, length)``: ask the source for a page. Harmless at any time."""


@dataclass(frozen=True, slots=True)
class ViewBlock:
    """A block being shown. :ivar fd: its memfd; ours. :ivar received: a bit per target page."""

    idstr: str
    used_length: int
    fd: int
    received: Bitmap

    @property
    def length(self) -> int:
        """Bytes to map: whole target pages."""
        return align_up(self.used_length, TARGET_PAGE_BYTES)


@dataclass(slots=True)
class _Reader:
    """One connection. :ivar waiting: faults on pages that have not come, (block, page) each."""

    connection: socket.socket
    uffd: Userfaultfd | None = None
    mappings: list[tuple[int, int, int]] = field(default_factory=list)
    waiting: dict[tuple[int, int], int] = field(default_factory=dict)
    received: bytes = b""


def view_memfd(idstr: str, used_length: int) -> int:
    """A memfd for one block."""
    return memfd_create(f"postcopy-view-{idstr}"[:200], align_up(used_length, TARGET_PAGE_BYTES))


class ViewServer:
    """Shows the blocks of one incoming guest. Its thread runs from :meth:`show` to :meth:`finish`.

    :ivar arrival_fd: an eventfd to be written whenever pages have come.
    """

    def __init__(self, path: Path) -> None:
        """Listen on this socket; mode 0600. Readers may connect, and wait for :meth:`show`.

        :raises OSError: it is in use, or cannot be made.
        """
        self._path = path
        self._listening = socket.socket(socket.AF_UNIX)
        old = os.umask(0o177)
        try:
            self._listening.bind(str(path))
            self._listening.listen(8)
        except OSError as error:
            self._listening.close()
            raise OSError(error.errno, error.strerror, str(path)) from None
        finally:
            os.umask(old)
        self.arrival_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._readers: dict[int, _Reader] = {}
        self._blocks: Sequence[ViewBlock] = ()
        self._machine = ""
        self._ask: Ask = lambda index, offset, length: None
        self._is_over = False
        self._asks_again = False
        self._thread: threading.Thread | None = None
        self.faults = 0

    def show(self, machine: str, blocks: Sequence[ViewBlock], ask: Ask) -> None:
        """Serve readers from now on. :raises ParkError: more blocks than one message carries."""
        if len(blocks) > _BLOCKS_MAX:
            raise ParkError(f"{len(blocks)} RAM blocks are too many to show")
        self._machine, self._blocks, self._ask = machine, blocks, ask
        for fd in (self._listening.fileno(), self.arrival_fd, self._wake_fd):
            self._poll.register(fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="park-view", daemon=True)
        self._thread.start()

    def ask_again(self) -> None:
        """Any thread: the source can be asked now: ask for what readers wait for."""
        self._asks_again = True
        os.eventfd_write(self._wake_fd, 1)

    # -- the thread ---------------------------------------------------------------

    def _serve(self) -> None:
        while not self._is_over:
            for fd, _ in self._poll.poll():
                if fd == self._listening.fileno():
                    self._welcome()
                elif fd == self.arrival_fd:
                    os.eventfd_read(fd)
                    self._pages_came()
                elif fd == self._wake_fd:
                    os.eventfd_read(fd)
                    self._ask_for_all()
                elif (reader := self._readers.get(fd)) is not None:
                    self._hear(fd, reader)

    def _welcome(self) -> None:
        connection, _ = self._listening.accept()
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", peer)[1] not in (0, os.geteuid()):
            connection.close()
            return
        hello = {
            "kind": KIND,
            "format": FORMAT,
            "machine": self._machine,
            "blocks": [[block.idstr, block.length] for block in self._blocks],
        }
        with contextlib.ExitStack() as stack:
            fds = []
            for block in self._blocks:
                # Opened anew: the memfd itself may be written, this must not.
                fd = os.open(f"/proc/self/fd/{block.fd}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                fds.append(fd)
            try:
                socket.send_fds(connection, [json.dumps(hello).encode() + b"\n"], fds)
            except OSError:
                connection.close()
                return
        self._readers[connection.fileno()] = _Reader(connection)
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _hear(self, fd: int, reader: _Reader) -> None:
        try:
            if fd == reader.connection.fileno():
                self._mappings(reader)
            else:
                self._faults(reader)
        except (OSError, ValueError, KeyError, TypeError):
            self._dismiss(reader)

    def _mappings(self, reader: _Reader) -> None:
        data, fds, _, _ = socket.recv_fds(reader.connection, _LINE_MAX, 1)
        uffd = Userfaultfd.from_fd(fds[0]) if fds else None
        if not data or len(reader.received) > _LINE_MAX or (uffd and reader.uffd):
            if uffd is not None:
                uffd.close()
            raise ValueError("the reader left, or says too much")
        reader.received += data
        if uffd is not None:
            reader.uffd = uffd
            os.set_blocking(uffd.fileno(), False)
        if not reader.received.endswith(b"\n"):
            return
        mappings = json.loads(reader.received)["mappings"]
        for index, address, length in mappings:
            if not (0 <= index < len(self._blocks) and length <= self._blocks[index].length):
                raise ValueError("no such block")
            reader.mappings.append((int(index), int(address), int(length)))
        if reader.uffd is None:
            raise ValueError("no userfaultfd came with the mappings")
        self._readers[reader.uffd.fileno()] = reader
        self._poll.register(reader.uffd.fileno(), select.EPOLLIN)
        _say(reader, "ready")

    def _faults(self, reader: _Reader) -> None:
        assert reader.uffd is not None
        for event in reader.uffd.read_events():
            if isinstance(event, PageFault):
                self.faults += 1
                self._fault(reader, event.address)

    def _fault(self, reader: _Reader, address: int) -> None:
        for index, start, length in reader.mappings:
            if start <= address < start + length:
                page = (address - start) >> TARGET_PAGE_BITS
                reader.waiting[index, page] = start + (page << TARGET_PAGE_BITS)
                if self._blocks[index].received.test(page):
                    self._resolve(reader, index, page)
                else:
                    self._ask(index, page << TARGET_PAGE_BITS, TARGET_PAGE_BYTES)
                    # It may have come between the look and now, without anybody waiting for it.
                    if self._blocks[index].received.test(page):
                        self._resolve(reader, index, page)
                return
        raise ValueError(f"a fault at {address:#x}, outside the mappings")

    def _resolve(self, reader: _Reader, index: int, page: int) -> None:
        """A page that came as zero is a hole: it is made a page, which changes nothing else."""
        assert reader.uffd is not None
        address = reader.waiting.pop((index, page))
        allocate(self._blocks[index].fd, page << TARGET_PAGE_BITS, TARGET_PAGE_BYTES)
        with contextlib.suppress(UffdError):  # the reader may have unmapped it, or died
            reader.uffd.wake(address, TARGET_PAGE_BYTES)

    def _all(self) -> list[_Reader]:
        return list({id(reader): reader for reader in self._readers.values()}.values())

    def _pages_came(self) -> None:
        for reader in self._all():
            for index, page in list(reader.waiting):
                if self._blocks[index].received.test(page):
                    self._resolve(reader, index, page)

    def _ask_for_all(self) -> None:
        if not self._asks_again:
            return
        self._asks_again = False
        for reader in self._all():
            for index, page in reader.waiting:
                self._ask(index, page << TARGET_PAGE_BITS, TARGET_PAGE_BYTES)

    def _dismiss(self, reader: _Reader) -> None:
        """Its mappings die with it, or stay as they are: it broke the rules or left."""
        fds = [reader.connection.fileno()]
        if reader.uffd is not None:
            fds.append(reader.uffd.fileno())
        for fd in fds:
            if self._readers.pop(fd, None) is not None:
                self._poll.unregister(fd)
        reader.connection.close()
        if reader.uffd is not None:
            reader.uffd.close()

    # -- the end --------------------------------------------------------------------

    def finish(self, *, complete: bool) -> None:
        """Let the readers go: everything has come (holes are zero), or what is missing never will.
        Twice is fine."""
        if self._listening.fileno() < 0:
            return
        self._is_over = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None:
            self._thread.join()
        for reader in self._all():
            with contextlib.suppress(OSError):
                self._release(reader, complete=complete)
            self._dismiss(reader)
        self._poll.close()
        self._listening.close()
        for fd in (self.arrival_fd, self._wake_fd):
            os.close(fd)
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _release(self, reader: _Reader, *, complete: bool) -> None:
        if reader.uffd is not None:
            for index, start, length in reader.mappings:
                if complete:
                    reader.uffd.unregister(start, length)
                else:
                    self._poison(reader.uffd, self._blocks[index].received, start, length)
        _say(reader, "complete" if complete else "lost")

    def _poison(self, uffd: Userfaultfd, received: Bitmap, start: int, length: int) -> None:
        missing = received.copy()
        missing.complement_of(received)
        for first, count in missing.runs():
            at, size = first << TARGET_PAGE_BITS, count << TARGET_PAGE_BITS
            if at < length:
                with contextlib.suppress(UffdError):  # kernels before 6.6 have no POISON
                    uffd.poison(start + at, min(size, length - at))


def _say(reader: _Reader, event: str) -> None:
    with contextlib.suppress(OSError):
        reader.connection.sendall(json.dumps({"event": event}).encode() + b"\n")
