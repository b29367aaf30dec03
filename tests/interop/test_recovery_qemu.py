"""Preempt and recovery with a stock QEMU at the other end, in both roles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interop.test_wire_qemu import (
    CONTENTS,
    LOAD_AT,
    OPTIONS,
    RAM_BYTES,
    expected_ram,
    ram_of,
)
from tests.support.pair import Side, side
from tests.support.qemu import PAGE_BYTES, Qemu, QemuBinary, qemu_binary

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop


@pytest.fixture
def ours() -> Iterator[Side]:
    with side(**OPTIONS) as source:
        source.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
        source.machine.start()
        yield source


def prepare(side_: Side, preempt: bool) -> None:
    side_.service.set_capabilities({"postcopy-ram": True, "postcopy-preempt": preempt})


def qemu_capabilities(preempt: bool) -> list[str]:
    return ["postcopy-ram", "postcopy-preempt"] if preempt else ["postcopy-ram"]


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_ours_to_qemu(ours: Side, qemu_binary: QemuBinary, preempt: bool, cut: bool) -> None:
    """A stock destination gets every byte, also after a cut, also with a preempt channel."""
    with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as qemu:
        uri = f"unix:{qemu.folder}/migration"
        qemu.set_capabilities(*qemu_capabilities(preempt))
        qemu.execute("migrate-incoming", uri=uri)
        prepare(ours, preempt)
        old = preempt and qemu_binary.version < (8, 0)
        ours.service.set_parameters(
            {"x-hold-background": True, "x-preempt-pre-7-2": old, "max-bandwidth": 100_000}
        )
        ours.service.migrate(uri)
        ours.service.start_postcopy()
        qemu.qmp.wait_event("RESUME")
        asked = LOAD_AT + 300 * PAGE_BYTES
        assert qemu.read_ram(asked, PAGE_BYTES) == CONTENTS[300 * PAGE_BYTES : 301 * PAGE_BYTES]
        if cut:
            ours.service.pause()
            assert ours.service.wait(30) == "postcopy-paused"
            qemu.wait_status("postcopy-paused")
            again = f"unix:{qemu.folder}/again"
            qemu.execute("migrate-recover", uri=again)
            ours.service.migrate(again, resume=True)
            ours.wait_count("MIGRATION", 2, status="postcopy-active")
            asked = LOAD_AT + 400 * PAGE_BYTES
            page = CONTENTS[400 * PAGE_BYTES : 401 * PAGE_BYTES]
            assert qemu.read_ram(asked, PAGE_BYTES) == page
        ours.service.set_parameters({"x-hold-background": False})
        assert ours.service.wait(60) == "completed", ours.service.query()
        qemu.wait_status("completed")
        assert qemu.ram() == expected_ram()
        assert ours.machine.run_state == "postmigrate"


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_qemu_to_ours(qemu_binary: QemuBinary, preempt: bool, cut: bool) -> None:
    """We get every byte from a stock source, also after a cut, also with a preempt channel."""
    with (
        side(**OPTIONS, incoming=True) as target,
        Qemu(qemu_binary, ram_bytes=RAM_BYTES, load={LOAD_AT: CONTENTS}) as qemu,
    ):
        prepare(target, preempt)
        uri = f"unix:{qemu.folder}/migration"
        target.service.migrate_incoming(uri)
        qemu.set_capabilities(*qemu_capabilities(preempt))
        qemu.set_parameters(max_bandwidth=300_000, max_postcopy_bandwidth=60_000)
        qemu.execute("migrate", uri=uri)
        qemu.execute("migrate-start-postcopy")
        target.wait_event("RESUME")
        block = target.machine.ram.by_idstr("ram")
        last = LOAD_AT + len(CONTENTS) - PAGE_BYTES
        assert block.read(last, PAGE_BYTES) == CONTENTS[-PAGE_BYTES:]
        if cut:
            target.service.pause()
            assert target.service.wait(30) == "postcopy-paused"
            qemu.wait_status("postcopy-paused")
            again = target.service.recover(f"unix:{qemu.folder}/again")
            qemu.execute("migrate", uri=again, resume=True)
            target.wait_count("MIGRATION", 2, status="postcopy-active")
            asked = LOAD_AT + 600 * PAGE_BYTES
            assert block.read(asked, PAGE_BYTES) == CONTENTS[600 * PAGE_BYTES : 601 * PAGE_BYTES]
        qemu.set_parameters(max_postcopy_bandwidth=0)
        qemu.wait_status("completed")
        assert target.service.wait(60) == "completed", target.service.query()
        assert ram_of(target.machine) == expected_ram()
