"""Postcopy in small pages, huge ones afterwards: the guest runs on, its memory is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.need import need
from tests.support.pair import MIB, Side, pair

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RAM_BYTES = 16 * MIB


def migrate(source: Side, target: Side, folder: Path) -> None:
    """By postcopy, while the guest runs."""
    source.machine.start()
    target.service.migrate_incoming(f"unix:{folder}/m")
    migrate_by_postcopy(source.service, f"unix:{folder}/m")
    assert source.service.wait(60) == "completed", source.service.query()
    assert target.service.wait(60) == "completed", target.service.query()


def collapse_of(side: Side) -> dict[str, Any]:
    figures = side.figures["collapse"]
    assert isinstance(figures, dict)
    return figures


def wait_collapsed(side: Side) -> dict[str, Any]:
    with side._changed:
        came = side._changed.wait_for(
            lambda: any(name == "X_COLLAPSED" for name, _ in side.events), 60
        )
    assert came, side.events
    return collapse_of(side)


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_small_pages_are_collapsed_once_all_are_there(backing: Backing, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ram_bytes": RAM_BYTES, "backing": backing, "rate": 2000}
    with pair(**options) as (source, target):
        target.service.set_parameters({"x-collapse": True})
        migrate(source, target, tmp_path)
        figures = wait_collapsed(target)
        need(
            figures["state"] != "unsupported",
            f"no MADV_COLLAPSE for {backing.value}: {figures.get('last-error')}",
            remedy="Linux 6.1; transparent_hugepage/shmem_enabled must not be 'deny'",
        )
        assert figures["state"] == "done"
        assert figures["regions"] == RAM_BYTES // (2 * MIB)
        assert figures["collapsed"] + figures["busy"] + figures["no-memory"] == figures["regions"]
        assert figures["collapsed"] > 0
        (mapped,) = target.machine.ram.by_idstr("toy.ram").reports()
        # A busy guest may have split one again, and what the kernel made itself counts too.
        assert mapped.anon_huge_pages + mapped.shmem_pmd_mapped > 0
        target.assert_sweep_clean()


def test_nothing_is_collapsed_unasked(tmp_path: Path) -> None:
    with pair(ram_bytes=RAM_BYTES, rate=500) as (source, target):
        migrate(source, target, tmp_path)
        assert "collapse" not in target.figures
        target.assert_sweep_clean()


def test_huge_pages_are_allowed_again_on_every_mapping(tmp_path: Path) -> None:
    """Off while pages are placed one by one, on every alias; afterwards what was there before."""
    options: dict[str, Any] = {"ram_bytes": RAM_BYTES, "backing": Backing.MEMFD, "rate": 500}
    options["extra_blocks"] = (("toy.plain", 4 * MIB),)
    with pair(**options) as (source, target):
        main, plain = (target.machine.ram.by_idstr(f"toy.{name}") for name in ("ram", "plain"))
        main.add_alias()
        plain.set_thp(False)  # the user wants none here
        during: list[set[str]] = []

        def look(name: str, data: dict[str, object]) -> None:
            if name == "MIGRATION" and data["status"] == "postcopy-active":
                during.extend(set(each.vm_flags) for each in main.reports())

        target.service.add_listener(look)
        migrate(source, target, tmp_path)
        assert len(during) == 2
        assert all("nh" in flags for flags in during)
        after = [set(each.vm_flags) for each in main.reports()]
        assert all("hg" in flags and "nh" not in flags for flags in after)
        assert all("nh" in each.vm_flags for each in plain.reports())
        target.assert_sweep_clean()
