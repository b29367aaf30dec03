"""The far end of a remote fault as a process of its own: ``python -m migration.bench.peer``.

Two processes cost a change of address space at every switch, as a real source and destination on
one machine do. The process does nothing but answer requests (in C) and ends with the socket.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .native import UNPINNED, Transport, remote_serve


def connected_pair(transport: Transport) -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets; tcp ones on loopback with TCP_NODELAY."""
    if transport is Transport.UNIX:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@contextmanager
def page_server(
    transport: Transport, *, page_bytes: int, pages: int, cpu: int = UNPINNED
) -> Iterator[socket.socket]:
    """A serving process behind a connected socket; both are gone after the block.

    :raises RuntimeError: at the end, if the peer ended with an error.
    """
    near, far = connected_pair(transport)
    with near:
        with far:
            number = far.fileno()
            argv = [sys.executable, "-m", __name__]
            argv += [str(value) for value in (number, page_bytes, pages, cpu)]
            process = subprocess.Popen(argv, pass_fds=[number], stderr=subprocess.PIPE)
        try:
            yield near
        finally:
            with suppress(OSError):  # the peer is gone already; its exit code says why
                near.shutdown(socket.SHUT_RDWR)
            _, error = process.communicate(timeout=30)
    if process.returncode:
        raise RuntimeError(f"page server ended with {process.returncode}: {error.decode()}")


def main(argv: list[str]) -> int:
    """Serve on an inherited socket: FD PAGE-BYTES PAGES CPU."""
    fd, page_bytes, pages, cpu = (int(value) for value in argv)
    remote_serve(fd, page_bytes=page_bytes, pages=pages, cpu=cpu)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
