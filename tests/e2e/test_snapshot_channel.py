"""A guest migrates over nothing but ``put_buffer`` and ``get_buffer``."""

from __future__ import annotations

import io
import socket
import threading
from pathlib import Path

import pytest

from migration.runtime.channel_ops import ChannelOps, channel_ops
from migration.runtime.errors import MigrationError
from tests.support.pair import MIB, pair
from tests.unit.test_channel_file import Store

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


class Hose:
    """Bytes from one thread to another, in memory: one way of a channel."""

    name = "the hose"

    def __init__(self) -> None:
        self._pieces = bytearray()
        self._changed = threading.Condition()
        self._is_closed = False
        self.positions: list[int] = []

    def put_buffer(self, data: memoryview, position: int) -> int:
        with self._changed:
            self.positions.append(position)
            self._pieces += data[:50_000]
            self._changed.notify_all()
            return min(len(data), 50_000)

    def get_buffer(self, position: int, length: int) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._is_closed)
            data = bytes(self._pieces[:length])
            del self._pieces[:length]
            return data

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def test_a_precopy_into_memory_and_out_of_it() -> None:
    """One way: written whole, then read whole."""
    store = Store(step=1 << 20)
    with pair(postcopy=False, ram_bytes=16 * MIB, disk_bytes=MIB) as (source, target):
        source.service.cont()
        source.service.migrate_over(store)
        assert source.service.wait(60) == "completed"
        assert store.closed == 1
        target.service.migrate_incoming_over(bytes(store.data))
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


@pytest.mark.parametrize("checksum", [True, False])
def test_a_precopy_with_a_return_path(checksum: bool) -> None:
    """Both ways: the source knows how it ended, and our own ends find each other out."""
    there, back = Hose(), Hose()
    forward = ChannelOps(
        there.put_buffer, close=there.close, return_path=lambda: channel_ops(back), name="there"
    )
    incoming = ChannelOps(
        get_buffer=there.get_buffer,
        close=there.close,
        return_path=lambda: channel_ops(back),
        shut_down=there.close,
        name="here",
    )
    with pair(postcopy=False, ram_bytes=16 * MIB) as (source, target):
        for side in (source, target):
            side.service.set_parameters({"x-checksum": checksum})
        source.service.cont()
        target.service.migrate_incoming_over(incoming)
        source.service.migrate_over(forward)
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        assert ("CHECKSUM" in source.figures["features"]) == checksum
        assert back.positions[0] == 0
        target.assert_sweep_clean()


def test_files_and_sockets_are_channels_as_they_are(tmp_path: Path) -> None:
    """What Python can read or write."""
    ours, theirs = socket.socketpair()
    with pair(postcopy=False, ram_bytes=8 * MIB) as (source, target):
        source.service.cont()
        target.service.migrate_incoming_over(theirs)
        source.service.migrate_over(ours)
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        target.assert_sweep_clean()
    with pair(postcopy=False, ram_bytes=8 * MIB) as (source, target):
        source.service.cont()
        source.service.migrate_over(open(tmp_path / "file", "wb"))  # noqa: SIM115 - it is closed
        assert source.service.wait(60) == "completed"
        target.service.migrate_incoming_over(open(tmp_path / "file", "rb"))  # noqa: SIM115
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


@pytest.mark.parametrize("fail_at", [0, 1 << 20])
def test_a_function_that_fails_fails_the_migration_with_its_own_words(fail_at: int) -> None:
    """And the guest stays where it is."""
    store = Store(step=1 << 16)
    store.fail_at = fail_at
    with pair(postcopy=False, ram_bytes=16 * MIB) as (source, target):
        source.service.cont()
        source.service.migrate_over(store)
        assert source.service.wait(60) == "failed"
        assert "No space left on device" in str(source.service.query()["error-desc"])
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()

        def get(position: int, length: int) -> bytes:
            raise TimeoutError("the tape is stuck")

        target.service.migrate_incoming_over(ChannelOps(get_buffer=get))
        assert target.service.wait(60) == "failed"
        assert "the tape is stuck" in str(target.service.query()["error-desc"])
        assert target.machine.run_state == "inmigrate"


def test_a_stream_that_ends_too_early_is_refused() -> None:
    """Half of one."""
    store = Store(step=1 << 20)
    with pair(postcopy=False, ram_bytes=8 * MIB) as (source, target):
        source.service.migrate_over(store)
        assert source.service.wait(60) == "completed"
        target.service.migrate_incoming_over(io.BytesIO(bytes(store.data[: 5 * MIB])))
        assert target.service.wait(60) == "failed"
        target.service.migrate_incoming_over(io.BytesIO(bytes(store.data)))
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


def test_what_cannot_work_is_refused_at_once() -> None:
    """Not a channel, the wrong direction, postcopy through Python."""
    with pair(ram_bytes=8 * MIB) as (source, target):
        with pytest.raises(TypeError):
            source.service.migrate_over(7)
        with pytest.raises(ValueError, match="cannot be written"):
            source.service.migrate_over(b"bytes")
        with pytest.raises(MigrationError, match="needs a descriptor"):
            target.service.migrate_incoming_over(b"bytes")
        source.service.migrate_over(Store())  # postcopy-ram is on, and there is no way back
        assert source.service.wait(60) == "failed"
        assert "one-way" in str(source.service.query()["error-desc"])
        source.assert_sweep_clean()
