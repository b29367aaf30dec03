"""The leak check finds each kind of leak, and does not cry wolf."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator

import pytest

from tests.support.leaks import leaked, no_leaks, no_process_left, snapshot

PREFIX = ("leak-test-",)
LENGTH = 1 << 20


def test_nothing_left_is_nothing_reported() -> None:
    """Threads, sockets, memory and files that were given back do not count."""
    with no_leaks(prefixes=PREFIX):
        thread = threading.Thread(target=lambda: bytearray(LENGTH))
        thread.start()
        thread.join()
        left, right = socket.socketpair()
        left.close()
        right.close()
        with tempfile.NamedTemporaryFile(prefix=PREFIX[0]):
            pass


@contextlib.contextmanager
def running_child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, killed at the end whatever happens."""
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            yield child
        finally:
            child.kill()


@contextlib.contextmanager
def leaking_descriptor() -> Iterator[None]:
    """An open memfd."""
    number = os.memfd_create("leak-test")
    yield
    os.close(number)


@contextlib.contextmanager
def leaking_thread() -> Iterator[None]:
    """A thread that does not end."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    yield
    stop.set()
    thread.join()


@contextlib.contextmanager
def leaking_guest_mapping() -> Iterator[None]:
    """Anonymous memory marked like guest RAM."""
    memory = mmap.mmap(-1, LENGTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTDUMP)
    memory.madvise(mmap.MADV_DONTFORK)
    yield
    memory.close()


@contextlib.contextmanager
def leaking_file() -> Iterator[None]:
    """A temporary file."""
    with tempfile.NamedTemporaryFile(prefix=PREFIX[0]):
        yield


@contextlib.contextmanager
def leaking_child() -> Iterator[None]:
    """A process of ours."""
    with running_child():
        yield


@pytest.mark.parametrize(
    ("leak", "line"),
    [
        (leaking_descriptor, "descriptor: 1 x /memfd:leak-test"),
        (leaking_thread, "thread:"),
        (leaking_guest_mapping, "mapping: 1 x anonymous 0x100000"),
        (leaking_file, "file:"),
        (leaking_child, "child:"),
    ],
)
def test_each_kind_of_leak_is_found(
    leak: type[contextlib.AbstractContextManager[None]], line: str
) -> None:
    """One line, naming what was left."""
    before = snapshot(prefixes=PREFIX)
    with leak():
        found = leaked(before, prefixes=PREFIX, settle_s=0)
        assert [entry for entry in found if entry.startswith(line)], found
    assert leaked(before, prefixes=PREFIX) == []


def test_heap_and_stacks_are_no_leak() -> None:
    """What malloc and thread stacks keep for reuse is not guest memory."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    before = snapshot(prefixes=PREFIX)
    pointer = libc.malloc(64 << 20)
    assert leaked(before, prefixes=PREFIX, settle_s=0) == []
    libc.free(pointer)


def test_a_process_that_still_runs_is_named() -> None:
    """Also a dead one that nobody waited for."""
    with running_child() as child, pytest.raises(AssertionError, match=str(child.pid)):
        no_process_left(child.pid)
    no_process_left(child.pid)
