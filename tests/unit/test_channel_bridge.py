"""A native channel over three functions: bytes, ends and errors get through."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from migration.runtime.channel import Channel
from migration.runtime.channel_bridge import bridge
from migration.runtime.channel_ops import ChannelOps
from migration.runtime.errors import ChannelError
from migration.wire.errors import TruncatedStreamError
from tests.unit.test_channel_file import Store

_BYTES = bytes(range(256)) * 1000


def test_what_is_written_arrives_before_finish_returns() -> None:
    """And the functions are closed by then."""
    store = Store(step=1 << 20)
    channel = bridge(store, writes=True)
    assert not channel.is_two_way
    channel.write(_BYTES)
    channel.flush()
    channel.finish()
    assert bytes(store.data) == _BYTES
    assert store.closed == 1
    channel.close()
    assert store.closed == 1


def test_what_is_given_is_read_to_its_end() -> None:
    """Then it is cut short, as a stream is that ends."""
    store = Store(_BYTES, step=1000)
    channel = bridge(store, writes=False)
    assert channel.read(len(_BYTES)) == _BYTES
    with pytest.raises(TruncatedStreamError):
        channel.read(1)
    channel.close()
    assert store.closed == 1


def test_the_cause_of_a_failure_is_kept() -> None:
    """The native side only sees a connection that broke."""
    store = Store(step=1 << 20)
    store.fail_at = 1
    channel = bridge(store, writes=True)
    with pytest.raises(ChannelError):
        _write_until_it_fails(channel)
    assert "No space left" in str(channel.cause)
    with pytest.raises(ChannelError, match="No space left"):
        channel.finish()
    channel.close()


def test_a_refusal_at_the_end_is_told_by_finish() -> None:
    """Some stores only know when they are closed."""

    class Picky(Store):
        def close(self) -> None:
            raise OSError("checksum mismatch")

    channel = bridge(Picky(), writes=True)
    channel.write(b"x")
    channel.flush()
    with pytest.raises(ChannelError, match="checksum mismatch"):
        channel.finish()
    channel.close()


def _write_until_it_fails(channel: Channel) -> None:
    while True:
        channel.write(_BYTES)
        channel.flush()


def _shut_down(channel: Channel) -> None:
    channel.abort()


@pytest.mark.parametrize("end", [_shut_down, lambda channel: None])
def test_closing_wakes_a_function_that_waits(end: Callable[[Channel], None]) -> None:
    """With ``shut_down``; the thread is gone afterwards."""
    asked, released = threading.Event(), threading.Event()

    def get(position: int, length: int) -> bytes:
        asked.set()
        released.wait()
        return b""

    before = threading.active_count()
    ops = ChannelOps(get_buffer=get, shut_down=released.set, name="slow")
    channel = bridge(ops, writes=False)
    assert asked.wait(10)
    end(channel)
    channel.close()
    assert threading.active_count() == before
