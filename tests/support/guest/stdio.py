"""Connects its standard input and output with a unix socket, both ways: the command of an ``exec:``
migration that can answer. (What socat does; not every host has one.)"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading


def _pass(read_fd: int, write_fd: int) -> None:
    while data := os.read(read_fd, 1 << 18):
        view = memoryview(data)
        while view:
            view = view[os.write(write_fd, view) :]


def main() -> int:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[1])
    number = connection.fileno()

    def back() -> None:
        with contextlib.suppress(OSError):
            _pass(number, 1)
        os.close(1)

    answers = threading.Thread(target=back)
    answers.start()
    try:
        _pass(0, number)
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    answers.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
