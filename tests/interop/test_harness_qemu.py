"""The QEMU harness itself: QEMU to QEMU, so that a later failure is not the harness's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.qemu import MIB, PAGE_BYTES, Qemu, QemuBinary, pattern, qemu_binary, require_qemu

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop

LOAD_AT = 0x40000
CONTENTS = pattern(96)


def start_pair(binary: QemuBinary) -> tuple[Qemu, Qemu]:
    """A source with a pattern in RAM, and an empty destination."""
    source = Qemu(binary, load={LOAD_AT: CONTENTS})
    try:
        return source, Qemu(binary, incoming="defer")
    except BaseException:
        source.close()
        raise


def expected_ram() -> bytes:
    """What both sides must hold."""
    return bytes(LOAD_AT) + CONTENTS + bytes(2 * MIB - LOAD_AT - len(CONTENTS))


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_qemu_to_qemu_arrives_whole(qemu_binary: QemuBinary, mode: str) -> None:
    """RAM equal, both sides ``completed``; in postcopy the missing pages were really asked for."""
    source, destination = start_pair(qemu_binary)
    with source, destination:
        uri = f"unix:{destination.folder}/migration"
        capabilities = ["postcopy-ram"] if mode == "postcopy" else ["return-path"]
        for side in (source, destination):
            side.set_capabilities(*capabilities)
        destination.execute("migrate-incoming", uri=uri)
        if mode == "postcopy":
            # Slow enough that pages are left when postcopy starts, and when it has started.
            source.set_parameters(max_bandwidth=300_000, max_postcopy_bandwidth=60_000)
        source.execute("migrate", uri=uri)
        if mode == "postcopy":
            source.execute("migrate-start-postcopy")
            destination.qmp.wait_event("RESUME")
            page = destination.read_ram(LOAD_AT + 95 * PAGE_BYTES, PAGE_BYTES)
            assert page == CONTENTS[-PAGE_BYTES:]
            source.set_parameters(max_postcopy_bandwidth=0)
        source.wait_status("completed")
        destination.wait_status("completed")
        assert destination.ram() == expected_ram() == source.ram()
        if mode == "postcopy":
            assert source.query_migrate()["ram"]["postcopy-requests"] >= 1
            assert "MIGRATION:postcopy-active" in source.qmp.event_names()


def test_a_qemu_that_cannot_start_says_why() -> None:
    """The reason is in the exception, and nothing stays behind."""
    before = set(Path("/tmp").glob("qemu-*"))
    with pytest.raises(RuntimeError, match="unsupported machine type"):
        Qemu(require_qemu(), machine="no-such-machine")
    assert set(Path("/tmp").glob("qemu-*")) == before


def test_leaving_the_block_ends_the_process_and_its_folder() -> None:
    """By its own pid, also when the test failed inside; the failure carries QEMU's state."""
    with pytest.raises(ValueError, match="inside") as caught, Qemu(require_qemu()) as qemu:
        raise ValueError("inside")
    assert qemu.process.poll() is not None
    assert not os.path.exists(qemu.folder)
    assert any("query-migrate" in note for note in caught.value.__notes__)


def test_wrong_final_status_is_reported_at_once() -> None:
    """Waiting for ``completed`` ends with the events when the migration failed instead."""
    with Qemu(require_qemu()) as source:
        source.set_capabilities()
        source.execute("migrate", uri=f"unix:{source.folder}/nobody")
        with pytest.raises(AssertionError, match="failed instead of"):
            source.wait_status("completed")
