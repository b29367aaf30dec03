"""``migrate-start-postcopy`` at any time: what QEMU refuses is refused, the rest does no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migration.runtime.errors import MigrationError
from tests.support.e2e_leaks import nothing_left
from tests.support.pair import MIB, Side, pair, side
from tests.support.proxy import Proxy
from tests.support.tamper import StallAt, command

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

OPTIONS: dict[str, Any] = {"ram_bytes": 8 * MIB, "rate": 20_000}


def completed(source: Side, target: Side) -> None:
    assert source.service.wait(30) == "completed", source.service.query()
    assert target.service.wait(30) == "completed", target.service.query()
    target.assert_sweep_clean()


def test_before_any_migration() -> None:
    """Refused in QEMU's words, with and without the capability, at both kinds of machine."""
    with side(**OPTIONS) as one, side(**OPTIONS, incoming=True) as waiting:
        with pytest.raises(MigrationError, match=r"[Ee]nable postcopy"):
            one.service.start_postcopy()
        for each in (one, waiting):
            each.service.set_capabilities({"postcopy-ram": True})
            with pytest.raises(MigrationError, match="must be started after migration"):
                each.service.start_postcopy()


def test_while_waiting_at_the_destination(tmp_path: Path) -> None:
    """It is the source's command."""
    with nothing_left(), side(**OPTIONS, incoming=True) as waiting:
        waiting.service.set_capabilities({"postcopy-ram": True})
        waiting.service.migrate_incoming(f"unix:{tmp_path}/m")
        with pytest.raises(MigrationError, match="must be started after migration"):
            waiting.service.start_postcopy()
        assert waiting.service.query()["status"] == "setup"


def test_during_setup(tmp_path: Path) -> None:
    """Heard, and done as soon as it can be."""
    stall = StallAt(command("PING"), after=0)
    uri = f"unix:{tmp_path}/m"
    with nothing_left(), pair(**OPTIONS) as (source, target), Proxy(uri, stall) as proxy:
        source.machine.start()
        target.service.migrate_incoming(uri)
        source.service.migrate(proxy.uri)
        assert stall.struck.wait(30)
        assert source.service.query()["status"] == "setup"
        source.service.start_postcopy()
        source.service.start_postcopy()
        stall.go_on()
        completed(source, target)
        assert "postcopy-active" in source.statuses


def test_again_and_again(tmp_path: Path) -> None:
    """In precopy, at the switchover, in postcopy: at each change of status, from a listener."""
    uri = f"unix:{tmp_path}/m"
    with nothing_left(), pair(**OPTIONS) as (source, target):
        said: list[object] = []

        def say(name: str, data: dict[str, object]) -> None:
            if name == "MIGRATION" and data["status"] != "setup":
                source.service.start_postcopy()
                said.append(data["status"])

        source.service.add_listener(say)
        source.machine.start()
        target.service.migrate_incoming(uri)
        source.service.migrate(uri)
        completed(source, target)
        assert said == source.statuses[1:]
        assert "postcopy-active" in said


def test_after_the_end_and_not_remembered(tmp_path: Path) -> None:
    """No effect then, and none on the next migration, which nobody asked to go over."""
    first, second = f"unix:{tmp_path}/first", f"unix:{tmp_path}/second"
    with nothing_left(), pair(**OPTIONS, write_share=0.0) as (source, target):
        source.machine.start()
        target.service.migrate_incoming(first)
        source.service.set_parameters({"max-bandwidth": 1 * MIB})
        source.service.migrate(first)
        source.wait_status("active")
        source.service.cancel()
        assert source.service.wait(30) == "cancelled"
        source.service.start_postcopy()
        assert target.service.wait(30) == "failed"

        target.service.migrate_incoming(second)
        source.service.set_parameters({"max-bandwidth": 0})
        source.service.migrate(second)
        completed(source, target)
        assert "postcopy-active" not in source.statuses
        source.service.start_postcopy()
        assert source.service.query()["status"] == "completed"
