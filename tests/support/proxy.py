"""A man in the middle between the two real processes of a migration.

The source migrates to :attr:`Proxy.uri`, the proxy connects to the destination and forwards both
directions, element by element (:mod:`tests.support.stream_scanner`), through the tampers it was
given (:mod:`tests.support.tamper`). Without tampers it is a wire::

    flip = FlipPageByte(nth=3)
    with Proxy(destination_uri, flip) as proxy:
        source.migrate(proxy.uri)
        ...
    assert flip.hits == 1

It runs in threads of the test process, which holds no guest RAM, so it cannot hang on a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import socket
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.support.stream_elements import Element, Kind, Phase
from tests.support.stream_scanner import StreamScanner
from tests.support.tamper import Cut, Hold, StallAt, Tamper

_READ_BYTES = 1 << 18
_JOIN_TIMEOUT_S = 10.0
_LAST_WORDS_S = 2.0
_TAIL_BYTES = 8
# The first byte of a channel that carries sections: the magic's Q, or a command after a recovery.
# Other channels (postcopy-preempt) carry bare records and are forwarded as they are.
_MAIN_CHANNEL = (ord("Q"), 0x08)
_LIBC = ctypes.CDLL(None)  # the socket module offers no address of no family


class Proxy:
    """Listens at once, forwards any number of connections, ends with its ``with`` block.

    :param connect: where the destination listens, ``unix:PATH`` or ``tcp:HOST:PORT``.
    :param tampers: applied in this order to every element of both directions.
    :param listen: ``"unix"`` or ``"tcp"``: what the source gets to see.
    :param framed: the first connection carries frames from its first byte on, as the one of a
        recovery does between ends that agreed on checksums before.
    :param host: the address listened on with tcp.
    :param new_socket: makes every socket, of a family: in another network namespace, say.
    """

    def __init__(
        self,
        connect: str,
        *tampers: Tamper,
        listen: str = "unix",
        framed: bool = False,
        host: str = "127.0.0.1",
        new_socket: Callable[[int], socket.socket] = socket.socket,
    ) -> None:
        self.tampers = tampers
        self.seen: Counter[tuple[Phase, Kind]] = Counter()
        self.names: list[str] = []  # commands and return-path messages in the order they passed
        self.at_accept: list[list[str]] = []  # of these, what had passed before each connection
        self.tails: list[bytes] = []  # the last bytes of each channel of bare records
        self.lost: list[str] = []  # why a scanner gave up; a good test has none
        self._connect_to = connect
        self._new_socket = new_socket
        self._framed = framed
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()  # tampers, the records above, and the lists below
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._folder = Path(tempfile.mkdtemp(prefix="proxy-"))
        self._listener = _listen(listen, self._folder, host, new_socket)
        name = self._listener.getsockname()
        self.uri = f"unix:{name}" if listen == "unix" else f"tcp:{name[0]}:{name[1]}"
        self._start(self._accept)

    def cut(self) -> None:
        """End every connection now, as a broken network does. New ones are still accepted."""
        with self._lock:
            for end in self._sockets:
                _break(end)

    def reset(self) -> None:
        """Like :meth:`cut`, but as a host does that knows nothing of the connections (tcp)."""
        with self._lock:
            for end in self._sockets:
                _reset(end)

    def close(self) -> None:
        """End everything, join the threads, remove the socket. Twice is fine."""
        _break(self._listener)
        for tamper in self.tampers:
            if isinstance(tamper, StallAt):
                tamper.go_on()
        self.cut()
        for thread in list(self._threads):
            thread.join(_JOIN_TIMEOUT_S)
            assert not thread.is_alive(), f"proxy thread {thread.name} does not end"
        for end in (self._listener, *self._sockets):
            end.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if error is not None:
            error.add_note(f"proxy: {self.names}, lost: {self.lost}, errors: {self._errors}")
            return
        if self._errors:
            raise self._errors[0]
        assert not self.lost, f"the proxy could not read the stream: {self.lost}"

    def _start(self, target: object, *args: object) -> None:
        def run() -> None:
            try:
                target(*args)  # type: ignore[operator]
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=run, name=f"proxy-{len(self._threads)}", daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                source, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                self.at_accept.append(list(self.names))
            try:
                destination = _connect(self._connect_to, self._new_socket)
            except OSError:
                source.close()  # nobody there: the source sees what it would see without us
                continue
            with self._lock:
                self._sockets += [source, destination]
            framed, self._framed = self._framed, False
            answered = threading.Event()
            self._start(self._forward, source, destination, False, framed, answered)
            self._start(self._forward, destination, source, True, framed, answered)

    def _forward(
        self,
        from_: socket.socket,
        to: socket.socket,
        returns: bool,
        framed: bool,
        answered: threading.Event,
    ) -> None:
        """:param answered: set when the destination's own direction is over."""
        scanner: StreamScanner | None = None
        is_first = True
        tail = b""
        try:
            while data := _receive(from_):
                if is_first:
                    if returns or framed or data[0] in _MAIN_CHANNEL:
                        scanner = StreamScanner(returns, framed)
                    is_first = False
                if scanner is None:
                    tail = (tail + data)[-_TAIL_BYTES:]
                    to.sendall(data)
                else:
                    self._pass_on(scanner.feed(data), to)
            if scanner is not None:
                self._pass_on([*scanner.close(), *self._leftovers(returns)], to)
            with contextlib.suppress(OSError):
                to.shutdown(socket.SHUT_WR)  # the other direction may have more to say
        except (Cut, OSError) as error:
            # OSError: the receiver is gone, and the sender has to learn it, but not before what the
            # receiver said last: without us that would still lie in the sender's socket.
            if isinstance(error, OSError) and not returns:
                answered.wait(_LAST_WORDS_S)
            _break(from_)
            _break(to)
        finally:
            if returns:
                answered.set()
            if scanner is None and tail:
                self.tails.append(tail)
            if scanner is not None and scanner.lost:
                self.lost.append(scanner.lost)

    def _pass_on(self, elements: list[Element], to: socket.socket) -> None:
        """Forward as few writes as possible; an interruption first sends what was before it."""
        ready = bytearray()
        for element in elements:
            try:
                ready += self._tampered(element)
            except Cut as cut:
                to.sendall(ready + cut.first)
                cut.tamper.strike(cut.element)
                raise
            except Hold as hold:
                to.sendall(ready + hold.first)
                ready = bytearray(hold.rest)
                hold.tamper.strike(hold.element)
                hold.until.wait()
        to.sendall(ready)

    def _tampered(self, element: Element) -> bytes:
        with self._lock:
            self.seen[element.phase, element.kind] += 1
            if element.kind in (Kind.COMMAND, Kind.RETURN):
                self.names.append(element.name)
            elements = [element]
            for tamper in self.tampers:
                elements = [new for old in elements for new in tamper.see(old)]
        return b"".join(e.wire() for e in elements)

    def _leftovers(self, returns: bool) -> list[Element]:
        """What tampers still hold back when the main direction ends."""
        if returns:
            return []
        with self._lock:
            return [element for tamper in self.tampers for element in tamper.finish()]


def _listen(
    transport: str, folder: Path, host: str, new_socket: Callable[[int], socket.socket]
) -> socket.socket:
    if transport == "unix":
        listener = new_socket(socket.AF_UNIX)
        listener.bind(str(folder / "in"))
    else:
        listener = new_socket(socket.AF_INET)
        listener.bind((host, 0))
    listener.listen(8)
    return listener


def _connect(uri: str, new_socket: Callable[[int], socket.socket]) -> socket.socket:
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        end = new_socket(socket.AF_UNIX)
        address: str | tuple[str, int] = rest
    else:
        host, _, port = rest.rpartition(":")
        end = new_socket(socket.AF_INET)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = (host, int(port))
    try:
        end.connect(address)
    except OSError:
        end.close()
        raise
    return end


def _receive(end: socket.socket) -> bytes:
    try:
        return end.recv(_READ_BYTES)
    except ConnectionResetError:
        return b""


def _break(end: socket.socket) -> None:
    """Both directions end, and threads asleep in it wake up: close(2) alone would not do that."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _reset(end: socket.socket) -> None:
    """RST to the peer, and threads asleep in it wake up: connect(2) to AF_UNSPEC does that."""
    no_address = struct.pack("=H14x", socket.AF_UNSPEC)
    _LIBC.connect(end.fileno(), no_address, len(no_address))
