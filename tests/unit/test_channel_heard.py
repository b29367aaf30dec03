"""Whether the other end took the last word: known by how it closes."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from migration.runtime.channel import Channel


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    return ours, theirs


@pytest.fixture(params=[unix_pair, tcp_pair], ids=["unix", "tcp"])
def pair(request: pytest.FixtureRequest) -> tuple[Channel, socket.socket]:
    """Our channel with a word sent over it, and the other end."""
    make: Callable[[], tuple[socket.socket, socket.socket]] = request.param
    ours, theirs = make()
    channel = Channel.over_socket(ours, peer="a test")
    channel.write(b"last word")
    channel.flush()
    assert len(theirs.recv(100, socket.MSG_PEEK)) == 9
    return channel, theirs


def test_who_reads_and_closes_heard(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(b"what it says meanwhile does not matter")
    assert theirs.recv(100) == b"last word"
    theirs.close()
    assert channel.was_heard(30)
    channel.close()


def test_who_closes_without_reading_did_not(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.close()
    assert not channel.was_heard(30)
    channel.close()


def test_who_reads_and_does_not_close_heard(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    assert theirs.recv(100) == b"last word"
    assert channel.was_heard(1)  # its kernel may take a moment to acknowledge
    theirs.close()
    channel.close()


def test_who_does_not_read_did_not_yet() -> None:
    """On a unix socket; over tcp its kernel has the word, and will hand it over."""
    ours, theirs = unix_pair()
    channel = Channel.over_socket(ours, peer="a test")
    channel.write(b"last word")
    channel.flush()
    assert not channel.was_heard(0)
    theirs.close()
    channel.close()
