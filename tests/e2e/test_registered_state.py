"""What else than descriptions can be registered: old-style functions travel beside them in one
stream, and a device that cannot be migrated keeps its guest here, by name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from migration.analyze.events import SectionEvent
from migration.analyze.session import Session
from migration.analyze.source import open_source
from migration.runtime.errors import MigrationError
from migration.wire.io import Reader, Writer
from migration.wire.vmstate import U32, VMStateDescription
from tests.support.pair import MIB, Side, pair, side

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


class OldStyle:
    """Two functions with a format of their own: a length, then that many bytes."""

    def __init__(self, one: Side, text: bytes = b"") -> None:
        self.text = text
        self.loaded_version: int | None = None
        one.machine.registry.register_legacy("old-style", None, 3, save=self.save, load=self.load)

    def save(self, writer: Writer) -> None:
        writer.write(len(self.text).to_bytes(2, "big") + self.text)

    def load(self, reader: Reader, version_id: int) -> None:
        self.loaded_version = version_id
        self.text = reader.read(int.from_bytes(reader.read(2), "big"))


@pytest.mark.parametrize("postcopy", [False, True])
def test_old_style_functions_migrate(tmp_path: Path, postcopy: bool) -> None:
    """Beside descriptions and live handlers."""
    with pair(postcopy=postcopy, ram_bytes=8 * MIB, disk_bytes=MIB) as (source, target):
        sent, received = OldStyle(source, b"as it was"), OldStyle(target)
        other, its_twin = OldStyle(source, b"a second one"), OldStyle(target)
        source.service.cont()
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(uri)
        if postcopy:
            source.service.start_postcopy()
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        assert (received.text, received.loaded_version) == (sent.text, 3)
        assert its_twin.text == other.text  # told apart by their instances
        target.assert_sweep_clean()


def test_the_analyser_shows_their_bytes(tmp_path: Path) -> None:
    """The description says no more of them than how long they are."""
    path = tmp_path / "snapshot"
    with side(ram_bytes=8 * MIB) as one:
        OldStyle(one, b"abc")
        one.service.savevm(f"file:{path}")
    with open_source(str(path)) as source:
        sections = [e for e in Session([source]).events() if isinstance(e, SectionEvent)]
    found = [each.device for each in sections if each.header.idstr == "old-style"]
    assert found == [{"data": "0003616263"}]


BLOCKER = VMStateDescription(
    name="passed-through", version_id=1, fields=(U32("ops"),), unmigratable=True
)


def test_an_unmigratable_device_keeps_its_guest_here(tmp_path: Path) -> None:
    """Refused at once and by name: neither migrated nor saved; the guest never notices."""
    with pair(ram_bytes=8 * MIB) as (source, target):
        uri = target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.cont()
        entry = source.machine.registry.register(BLOCKER, source.machine, path="0000:00:05.0")
        assert source.service.query()["blocked-reasons"] == [
            "device 0000:00:05.0/passed-through cannot be migrated"
        ]
        events = list(source.events)
        by_name = r"cannot be .*0000:00:05\.0/passed-through"
        with pytest.raises(MigrationError, match=by_name):
            source.service.migrate(uri)
        with pytest.raises(MigrationError, match=by_name):
            source.service.savevm(f"file:{tmp_path}/snapshot")
        assert source.events == events
        assert list(tmp_path.glob("snapshot*")) == []
        source.machine.registry.unregister(entry)
        assert "blocked-reasons" not in source.service.query()
        source.service.migrate(uri)
        assert source.service.wait(60) == target.service.wait(60) == "completed"
        target.assert_sweep_clean()
