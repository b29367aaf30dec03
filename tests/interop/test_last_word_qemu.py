"""The last word of a precopy to a stock QEMU is lost: the source's guest is taken back."""

from __future__ import annotations

import pytest

from migration.runtime.errors import MigrationError
from tests.interop.test_wire_qemu import CONTENTS, LOAD_AT, OPTIONS, RAM_BYTES, expected_ram, ram_of
from tests.support.pair import side
from tests.support.proxy import Proxy
from tests.support.qemu import Qemu, QemuBinary, qemu_binary
from tests.support.stream_elements import Kind
from tests.support.tamper import CutAt, kind

__all__ = ["qemu_binary"]

pytestmark = pytest.mark.interop


def test_taken_back_and_moved_to_another(qemu_binary: QemuBinary) -> None:
    """A QEMU that does not get the end of the stream ends, as is its way, without having run."""
    with side(**OPTIONS) as source:
        source.machine.ram.by_idstr("ram").write(LOAD_AT, CONTENTS)
        source.machine.start()
        with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as qemu:
            uri = f"unix:{qemu.folder}/migration"
            qemu.set_capabilities("return-path")
            qemu.execute("migrate-incoming", uri=uri)
            with Proxy(uri, CutAt(kind(Kind.END), after=0)) as proxy:
                source.service.migrate(proxy.uri)
                assert source.service.wait(60) == "failed", source.service.query()
            assert qemu.wait_exit() != 0
        assert source.machine.run_state == "finish-migrate"
        with pytest.raises(MigrationError, match="finish-migrate"):
            source.service.cont()
        source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "running"
        assert ram_of(source.machine) == expected_ram()
        with Qemu(qemu_binary, ram_bytes=RAM_BYTES, incoming="defer") as another:
            uri = f"unix:{another.folder}/migration"
            another.set_capabilities("return-path")
            another.execute("migrate-incoming", uri=uri)
            source.service.migrate(uri)
            assert source.service.wait(60) == "completed", source.service.query()
            another.wait_status("completed")
            assert another.ram() == expected_ram()
