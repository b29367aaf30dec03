"""A relay between two unix sockets that flips one bit on its way to the destination."""

from __future__ import annotations

import contextlib
import socket
import threading


class FlippingRelay:
    """Passes every connection made to ``listen`` on to ``target``, both ways.

    :param nth: of which connection, from 0, a byte is changed. :param at: which one.
    """

    def __init__(self, listen: str, target: str, *, nth: int, at: int) -> None:
        self.uri = f"unix:{listen}"
        self.has_struck = False
        self._target, self._nth, self._at = target, nth, at
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(listen)
        self._listening.listen(64)
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        for number in range(1 << 30):
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            self._ends += [near, far]
            flip_at = self._at if number == self._nth else None
            for source, sink, at in ((near, far, flip_at), (far, near, None)):
                thread = threading.Thread(target=self._pump, args=(source, sink, at), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, at: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if at is not None and passed <= at < passed + len(data):
                    data[at - passed] ^= 0x10
                    self.has_struck = True
                passed += len(data)
                sink.sendall(data)
        for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                end.shutdown(how)

    def __enter__(self) -> FlippingRelay:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listening, *self._ends):
            end.close()
