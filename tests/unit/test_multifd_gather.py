"""The connections of a multifd migration, told apart by their first bytes, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.runtime.channel import Channel
from migration.runtime.destination.gather import ChannelsError, gather
from migration.runtime.errors import MigrationError
from migration.runtime.transport import Listener
from migration.wire.multifd import Greeting, decode_greeting, encode_greeting
from tests.support.e2e_leaks import nothing_left

VM = uuid.UUID(int=7)
MAIN = b"QEVM\0\0\0\3"


class Source:
    """Connects and says things."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: list[socket.socket] = []

    def say(self, data: bytes, *, close: bool = False) -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.connect(str(self.path))
        end.sendall(data)
        if close:
            end.close()
        else:
            self.ends.append(end)
        return end


class Gathered:
    """``gather`` on a thread of its own."""

    def __init__(
        self, path: Path, count: int, timeout_s: float = 60.0, vm: uuid.UUID | None = None
    ) -> None:
        self.listener = Listener(f"unix:{path}")
        self.result: tuple[Channel, tuple[Channel, ...]] | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(count, timeout_s, vm))
        self._thread.start()

    def _run(self, count: int, timeout_s: float, vm: uuid.UUID | None) -> None:
        try:
            first = self.listener.accept()
            self.result = gather(self.listener, first, count, vm=vm, timeout_s=timeout_s)
        except MigrationError as error:
            self.error = error

    def outcome(self) -> Exception | tuple[Channel, tuple[Channel, ...]]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        found = self.error or self.result
        assert found is not None
        return found

    def close(self) -> None:
        self.listener.wake()
        self._thread.join()
        self.listener.close()
        if self.result is not None:
            for channel in (self.result[0], *self.result[1]):
                channel.close()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    with nothing_left():
        one = Source(tmp_path / "s")
        yield one
        for end in one.ends:
            end.close()


def start(
    request: pytest.FixtureRequest,
    source: Source,
    count: int,
    timeout_s: float = 60.0,
    vm: uuid.UUID | None = None,
) -> Gathered:
    gathered = Gathered(source.path, count, timeout_s, vm)
    request.addfinalizer(gathered.close)
    return gathered


def channel(index: int) -> bytes:
    return encode_greeting(Greeting(index))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_any_order(request: pytest.FixtureRequest, source: Source, order: tuple[int, ...]) -> None:
    """Sorted by number; nothing of the main channel is used up, and of the others the greeting."""
    said = [MAIN, *(channel(index) + bytes([index]) for index in range(3))]
    gathered = start(request, source, 3)
    for each in order:
        source.say(said[each])
    outcome = gathered.outcome()
    assert isinstance(outcome, tuple)
    main, channels = outcome
    assert main.read(len(MAIN)) == MAIN
    assert [each.read(1) for each in channels] == [b"\0", b"\1", b"\2"]


def test_a_greeting_may_trickle(request: pytest.FixtureRequest, source: Source) -> None:
    """Byte for byte, while others come."""
    gathered = start(request, source, 2)
    slow = source.say(b"")
    for byte in channel(0):
        slow.sendall(bytes([byte]))
    half = source.say(channel(1)[:3])
    source.say(MAIN[:5])
    half.sendall(channel(1)[3:])
    assert isinstance(gathered.outcome(), tuple)


def raw(magic: int = 0x11223344, version: int = 1, vm: bytes = bytes(16), index: int = 0) -> bytes:
    return struct.pack(">II16sB39x", magic, version, vm, index)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([channel(0), channel(0)], "multifd channel 0 came twice"),
        ([channel(2)], "multifd channel 2 came, and there are 2 here"),
        ([channel(255)], "multifd channel 255 came, and there are 2 here"),
        ([MAIN, MAIN], "begins with 0x5145564d is neither"),
        ([b"GET / HTTP"], "begins with 0x47455420 is neither the main channel nor a multifd"),
        ([raw(version=2)], "multifd version 2, not 1"),
        (
            [raw(vm=uuid.UUID(int=7).bytes)],
            "UUID 00000000-0000-0000-0000-000000000007, this machine's is none",
        ),
    ],
)
def test_what_does_not_belong(
    request: pytest.FixtureRequest, source: Source, said: list[bytes], words: str
) -> None:
    """All that had come is closed."""
    gathered = start(request, source, 2)
    for each in said:
        source.say(each)
    error = gathered.outcome()
    assert isinstance(error, ChannelsError)
    assert words in str(error)
    for end in source.ends:
        with contextlib.suppress(ConnectionResetError):  # closed with something unread
            assert end.recv(1) == b""


@pytest.mark.parametrize("said", [b"", b"\x11", MAIN[:3], channel(0)[:63]])
def test_closed_before_it_said_what_it_is(
    request: pytest.FixtureRequest, source: Source, said: bytes
) -> None:
    gathered = start(request, source, 1)
    source.say(said, close=True)
    error = gathered.outcome()
    assert f"closed before it said what it is ({len(said)} bytes)" in str(error)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([MAIN, channel(1)], "the main channel and 1 of 3 multifd channels came within 0.2 s"),
        ([channel(0), channel(1), channel(2)], "no main channel and 3 of 3 multifd channels came"),
        ([b""], "no main channel and 0 of 3"),
    ],
)
def test_one_that_never_comes(
    request: pytest.FixtureRequest, source: Source, said: list[bytes], words: str
) -> None:
    gathered = start(request, source, 3, timeout_s=0.2)
    for each in said:
        source.say(each)
    assert words in str(gathered.outcome())


def test_a_vm_with_a_uuid(request: pytest.FixtureRequest, source: Source) -> None:
    """Its own channels are taken."""
    gathered = start(request, source, 1, vm=VM)
    source.say(raw(vm=VM.bytes))
    source.say(MAIN)
    assert isinstance(gathered.outcome(), tuple)


def test_told_to_give_up(request: pytest.FixtureRequest, source: Source) -> None:
    """However far it is; no error of the channels."""
    gathered = start(request, source, 3)
    source.say(MAIN)
    gathered.listener.wake()
    error = gathered.outcome()
    assert "no longer listening" in str(error)
    assert not isinstance(error, ChannelsError)


@pytest.mark.parametrize("index", [0, 1, 254])
@pytest.mark.parametrize("vm", [None, uuid.uuid4()])
def test_the_greeting_there_and_back(index: int, vm: uuid.UUID | None) -> None:
    greeting = Greeting(index, vm)
    assert decode_greeting(encode_greeting(greeting)) == greeting
    assert len(encode_greeting(greeting)) == 64
