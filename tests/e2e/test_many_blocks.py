"""Thousands of RAM blocks: registered, migrated by postcopy with faults in any of them."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from migration.runtime.service import MigrationService
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.need import need
from tests.support.plain_machine import PlainMachine

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

#: ``make test-scale`` asks for ten thousand, which takes a busy machine half a minute.
BLOCKS = 10_000 if "POSTCOPY_SCALE_GIB" in os.environ else 2_000
PAGE = 4096
#: Two pages each, of which the second is a hole in every other block.
NAMES = [(f"block-{number:05}", 2 * PAGE) for number in range(BLOCKS)]


def contents(number: int) -> bytes:
    return f"page of block {number}".encode()


def test_thousands_of_blocks(tmp_path: Path) -> None:
    # A block is a mapping and its guard, registered at the destination; both sides are here.
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    need(limit > 5 * BLOCKS, f"at most {limit} mappings", remedy="sysctl vm.max_map_count=65530")
    with ExitStack() as stack:
        source = stack.enter_context(closing(PlainMachine(NAMES)))
        target = stack.enter_context(closing(PlainMachine(NAMES, incoming=True)))
        services = [
            stack.enter_context(closing(MigrationService(machine))) for machine in (source, target)
        ]
        for number, block in enumerate(source.blocks()):
            block.write(0, contents(number))
            if number % 2:
                block.write(PAGE, contents(-number))
        for service in services:
            service.set_capabilities({"postcopy-ram": True})
        going, coming = services
        going.set_parameters({"x-hold-background": True})
        source.start()
        runs = threading.Event()
        coming.add_listener(lambda name, data: runs.set() if name == "RESUME" else None)
        coming.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(going, f"unix:{tmp_path}/m")
        assert runs.wait(120), coming.query()
        here = target.blocks()
        for number in (0, BLOCKS - 1, 17, BLOCKS // 2, 18):  # faults, far apart
            assert here[number].read(0, 32).rstrip(b"\0") == contents(number)
        going.set_parameters({"x-hold-background": False})
        assert going.wait(120) == "completed", going.query()
        assert coming.wait(120) == "completed", coming.query()
        figures = coming.query()["x-postcopy"]
        assert isinstance(figures, dict)
        assert figures["page-requests"] >= 5
        for number, block in enumerate(here):
            assert block.read(0, 32).rstrip(b"\0") == contents(number)
            assert block.read(PAGE, 32).rstrip(b"\0") == (contents(-number) if number % 2 else b"")
