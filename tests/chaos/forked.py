"""Agent processes in a network namespace, forked from one that has imported everything.

A thousand runs need some thousand processes, and most of the work of a short one is imports. The
fork server has no guest RAM and no threads, and ends with us; its children end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
from multiprocessing.process import BaseProcess
from typing import IO

from pyroute2 import netns  # type: ignore[import-untyped]

from tests.support import e2e_agent

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
DISK = "/mnt"


class Forked:
    """One child of the fork server, with the face of a :class:`subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """:raises subprocess.TimeoutExpired: it still runs."""
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired("agent", timeout or 0)
        return status

    def send_signal(self, number: int, /) -> None:
        """Harmless once it ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_server() -> None:
    """Start what children are forked from, once; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    first = context.Process(target=os.getpid, daemon=True)
    first.start()
    first.join()
    first.close()


def fork_agent(
    link: socket.socket, output: IO[bytes], *, namespace: str, folder: str, disk_bytes: int
) -> Forked:
    """An agent inside. :func:`start_server` comes first.

    :param namespace: path of its network namespace.
    :param folder: where its temporary files go.
    :param disk_bytes: size of a file system at :data:`DISK` that only this process has; 0: none.
    """
    context = multiprocessing.get_context("forkserver")
    shared = _Handles(link.fileno(), output.fileno())
    process = context.Process(
        target=_enter, args=(shared, namespace, folder, disk_bytes), daemon=True
    )
    process.start()
    return Forked(process)


class _Handles:
    """Two descriptors, handed to the child with its arguments."""

    def __init__(self, link: int, output: int) -> None:
        self.link, self.output = link, output

    def __getstate__(self) -> tuple[object, object]:
        from multiprocessing.reduction import DupFd

        return DupFd(self.link), DupFd(self.output)

    def __setstate__(self, state: tuple[object, object]) -> None:
        self.link, self.output = (handle.detach() for handle in state)  # type: ignore[attr-defined]


def _enter(handles: _Handles, namespace: str, folder: str, disk_bytes: int) -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's, which ends us
    for standard in (1, 2):
        os.dup2(handles.output, standard)
    os.close(handles.output)
    _join(namespace)
    if disk_bytes:
        _mount_disk(disk_bytes)
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    e2e_agent.serve(socket.socket(fileno=handles.link))


def _join(namespace: str) -> None:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.setns(fd)
    finally:
        os.close(fd)


def _mount_disk(length: int) -> None:
    """In a mount namespace of our own, so that it goes with us."""
    options = f"size={length}".encode()
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare")
    _check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "making mounts private")
    _check(_LIBC.mount(b"none", DISK.encode(), b"tmpfs", 0, options), "mounting a tmpfs")


def _check(result: int, doing: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), doing)
