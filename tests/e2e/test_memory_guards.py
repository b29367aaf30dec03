"""A destination without the memory refuses before ADVISE, with numbers; pressure is told of."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from guestmem import Backing, RAMBlock, RAMList
from migration.runtime.destination.guards import check_memory
from migration.runtime.errors import MigrationError
from migration.runtime.pressure import PRESSURE, Pressure, PressureWatch
from tests.kernel.test_guestmem_cgroups import group
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import more_hugepages
from tests.support.monitor_process import RunningVM, switch_on
from tests.support.need import need
from tests.support.pair import MIB, pair, side
from tests.support.toyvm_machines import until

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]


def more_than_there_is() -> int:
    """Bytes of RAM this host cannot hold, in whole MiB."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return (memory.total + swap.total + (1 << 30)) >> 20 << 20


def test_more_ram_than_the_host_has(tmp_path: Path) -> None:
    """From a source that does not say how much of it is used: all of it counts. Nothing is
    allocated on either side: neither has anything in it."""
    length = more_than_there_is()
    with (
        nothing_left(),
        pair(ram_bytes=length, smp=0, ring_pages=0, fill_share=0) as (
            source,
            target,
        ),
    ):
        source.service.set_parameters({"x-sparse": False})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(60) == "failed"
        assert target.service.wait(60) == "failed"
        error = str(target.service.query()["error-desc"])
        print(error)
        assert f"{length >> 20} MiB of guest RAM may be filled" in error
        assert re.search(r"\d+ MiB of \d+ MiB are available and \d+ MiB of swap are free", error)
        assert "x-memory-guard off" in error
        assert source.machine.run_state == "running"
        assert target.machine.run_state == "inmigrate"


def test_what_a_sparse_guest_holds_is_what_counts(tmp_path: Path) -> None:
    """The same size, and a source that tells: it fits."""
    with (
        nothing_left(),
        pair(ram_bytes=more_than_there_is(), fill_share=0.0001) as (
            source,
            target,
        ),
    ):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


@pytest.mark.parametrize("guard", [True, False])
def test_a_control_group_that_is_too_small(guard: bool, tmp_path: Path) -> None:
    """A real destination in a real group. Without the guard it is let in, as was asked for."""
    with group("memory", tmp_path) as (made, is_v2):
        name = "memory.max" if is_v2 else "memory.limit_in_bytes"
        (made / name).write_text(str(192 * MIB))
        with (
            side(ram_bytes=256 * MIB, smp=1, fill_share=0.9 if guard else 0.05) as source,
            RunningVM(
                tmp_path, "destination", "-m", "256M", "--fill-share",
                "0.9" if guard else "0.05", "--incoming", "defer",
            ) as target,
        ):  # fmt: skip
            (made / "cgroup.procs").write_text(str(target.process.pid))
            client = target.client()
            switch_on(client, "events", "postcopy-ram")
            client.execute("migrate-set-parameters", {"x-memory-guard": guard})
            uri = f"unix:{tmp_path}/m"
            client.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
            source.service.set_capabilities({"postcopy-ram": True})
            if not guard:
                source.service.set_parameters({"x-sparse": False})
            source.machine.start()
            migrate_by_postcopy(source.service, uri)
            if guard:
                assert source.service.wait(60) == "failed"
                client.wait_event("MIGRATION", lambda data: data["status"] == "failed")
                error = client.execute("query-migrate")["error-desc"]
                assert f"cgroup {made} allows 192 MiB ({name})" in error
                assert f"raise {name} by" in error
                assert source.machine.run_state == "running"
            else:
                assert source.service.wait(60) == "completed", source.service.query()
            client.close()


def test_blocks_of_one_pool_are_counted_together(tmp_path: Path) -> None:
    """Each fits what is free, both do not."""
    with more_hugepages(8, tmp_path / "journal") as pool, contextlib.ExitStack() as stack:
        length = pool.state().obtainable * 6 // 10 * pool.page_size
        first, second = (
            stack.enter_context(
                RAMBlock.allocate(name, length, backing=Backing.HUGETLB, is_reserved=False)
            )
            for name in ("one", "other")
        )
        check_memory(RAMList([first]), None)
        check_memory(RAMList([second]), None)
        with pytest.raises(MigrationError, match="RAM of blocks 'one', 'other' needs"):
            check_memory(RAMList([first, second]), None)


def test_pressure_is_in_the_figures(tmp_path: Path) -> None:
    need(Pressure.read() is not None, "this kernel tells no memory pressure (CONFIG_PSI)")
    with nothing_left(), pair(ram_bytes=4 * MIB) as (source, target):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(30) == "completed"
        assert target.service.wait(30) == "completed"
        for each in (source, target):
            pressure = each.figures["memory-pressure"]
            assert pressure["some-ms"] >= pressure["full-ms"] >= 0
            assert pressure == each.figures["memory-pressure"]  # over: they stand still


THRASH = """
import mmap, os, sys
path, length = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as out:  # here: a page in memory is paid for by whoever brought it there
    for _ in range(length >> 20):
        out.write(bytes(1 << 20))
    os.fsync(out.fileno())
print(flush=True)
while True:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, length) as view:
        for at in range(0, length, 4096):
            view[at] = (view[at] + 1) & 255
    os.close(fd)
"""


def waited_ms(watch: PressureWatch) -> int:
    figures = watch.figures()
    return 0 if figures is None else int(str(figures["some-ms"]))


def test_the_alarm_goes_when_tasks_really_wait(tmp_path: Path) -> None:
    """A process in a group far too small for what it works on waits for memory all the time."""
    need(Pressure.read() is not None, "this kernel tells no memory pressure (CONFIG_PSI)")
    need(os.geteuid() == 0, "control groups need root", remedy="sudo -E python -m pytest")
    heard = threading.Event()
    said: list[str] = []

    def alarm(text: str) -> None:
        said.append(text)
        heard.set()

    length, file = 64 * MIB, tmp_path / "work"
    with group("memory", tmp_path) as (made, is_v2):
        (made / ("memory.max" if is_v2 else "memory.limit_in_bytes")).write_text(str(24 * MIB))
        watch = PressureWatch(alarm)
        need(watch.has_alarm, f"the kernel takes no trigger on {PRESSURE} from this process")
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        worker = subprocess.Popen(
            ["sh", "-c", script, str(made), sys.executable, "-c", THRASH, str(file), str(length)],
            stdout=subprocess.PIPE,
        )
        try:
            came = heard.wait(60)
            # The alarm is the kernel's at once, the figures follow every two seconds.
            until(lambda: waited_ms(watch) > 100, "the figures to follow")
        finally:
            worker.kill()
            worker.communicate()
            figures = watch.figures()
            watch.close()
    assert came, figures
    assert said[0].startswith("this host is short of memory: tasks waited 200 ms of 2000")
    assert figures is not None
    assert int(str(figures["alarms"])) >= 1
