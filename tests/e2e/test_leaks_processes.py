"""Ctrl-C, at any moment: no process, file, socket or hugepage is left, and it ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.guestmem_memory import more_hugepages
from tests.support.leaks import leaked, snapshot
from tests.support.monitor_process import (
    ROOT,
    TIMEOUT_S,
    RunningVM,
    postcopy_argv,
    start_postcopy_pair,
    switch_on,
)
from tests.support.process import end, tied_to_us

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

SHAPE = ("-m", "8M", "--smp", "2")
INTERRUPTED = 130


@contextmanager
def machine_wide(*, hugepages: bool = False) -> Iterator[None]:
    """Temporary files and our own children afterwards as before.

    :param hugepages: these too. They are the whole machine's: only where there is need to look.
    """
    before = snapshot()
    yield
    found = [line for line in leaked(before) if hugepages or "hugepages" not in line]
    assert not found, "left behind:\n" + "\n".join(found)


# -- run ------------------------------------------------------------------------------------------


def interrupt(vm: RunningVM, number: signal.Signals = signal.SIGINT) -> None:
    """Once; it ends by itself, cleanly, and its monitor's socket is gone."""
    vm.signal(number)
    assert vm.wait_exit() == 0, vm.stderr()
    assert not os.path.exists(vm.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_running_vm(tmp_path: Path, number: signal.Signals) -> None:
    with machine_wide(), RunningVM(tmp_path, "vm", *SHAPE) as vm:
        interrupt(vm, number)


def test_a_vm_that_waits_for_a_migration(tmp_path: Path) -> None:
    """The socket it listens on goes as well."""
    uri = f"unix:{tmp_path}/in"
    with machine_wide(), RunningVM(tmp_path, "vm", *SHAPE, "--incoming", uri) as vm:
        assert (tmp_path / "in").exists()
        interrupt(vm)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("first", ["source", "destination"])
def test_both_ends_of_a_precopy(tmp_path: Path, first: str) -> None:
    """Whoever is interrupted first, the other notices and can be ended too."""
    with (
        machine_wide(),
        RunningVM(tmp_path, "source", *SHAPE) as source,
        RunningVM(tmp_path, "destination", *SHAPE, "--incoming", "defer") as target,
    ):
        with source.client() as at_source, target.client() as at_target:
            switch_on(at_source, "events")
            uri = f"unix:{tmp_path}/migration"
            at_target.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
            slow = {"max-bandwidth": 1 << 20, "downtime-limit": 0}
            at_source.execute("migrate-set-parameters", slow)
            at_source.execute("migrate", {"uri": uri})
            at_source.wait_event("MIGRATION", lambda data: data["status"] == "active")
        order = [source, target] if first == "source" else [target, source]
        for vm in order:
            interrupt(vm)


@pytest.mark.parametrize("first", ["source", "destination"])
def test_both_ends_of_a_postcopy(tmp_path: Path, first: str) -> None:
    """With pages missing and vCPUs asleep on them: they are woken by poison, not waited for."""
    with (
        machine_wide(),
        RunningVM(tmp_path, "source", *SHAPE) as source,
        RunningVM(tmp_path, "destination", *SHAPE, "--incoming", "defer") as target,
    ):
        with source.client() as at_source, target.client() as at_target:
            start_postcopy_pair(tmp_path, at_source, at_target, x_hold_background=True)
        order = [source, target] if first == "source" else [target, source]
        for vm in order:
            interrupt(vm)


def test_hugepages_of_an_interrupted_postcopy(tmp_path: Path) -> None:
    shape = (*SHAPE, "--backing", "hugetlb")
    with (
        more_hugepages(8, tmp_path / "journal"),
        machine_wide(hugepages=True),
        RunningVM(tmp_path, "source", *shape) as source,
        RunningVM(tmp_path, "destination", *shape, "--incoming", "defer") as target,
    ):
        with source.client() as at_source, target.client() as at_target:
            start_postcopy_pair(tmp_path, at_source, at_target, x_hold_background=True)
        interrupt(target)
        interrupt(source)


# -- demo -----------------------------------------------------------------------------------------


@contextmanager
def running_demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """With its own temporary folder, so that all it makes is in sight."""
    demo = subprocess.Popen(
        tied_to_us(postcopy_argv("demo", "--json", *options)),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        yield demo
    finally:
        end(demo)


def until_it_says(demo: subprocess.Popen[bytes], words: bytes) -> None:
    assert demo.stderr is not None
    seen = []
    for line in demo.stderr:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} was not said: {seen}")


MOMENTS = {
    "while the VMs start": (b"starting", ()),
    "in precopy": (b" active ", ("--postcopy-after", "100", "-m", "64M")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_demo(tmp_path: Path, moment: str) -> None:
    words, options = MOMENTS[moment]
    with machine_wide(), running_demo(tmp_path, *options) as demo:
        until_it_says(demo, words)
        children = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(TIMEOUT_S) == INTERRUPTED
        assert psutil.wait_procs(children, timeout=TIMEOUT_S)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_a_demo_on_hugepages(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    options = ("--backing", "hugetlb", "-m", "16M", "--postcopy-after", "100")
    with (
        more_hugepages(18, tmp_path / "journal"),
        machine_wide(hugepages=True),
        running_demo(folder, *options) as demo,
    ):
        until_it_says(demo, b" active ")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(TIMEOUT_S) == INTERRUPTED
    assert list(folder.iterdir()) == []


def test_the_terminal_interrupts_its_whole_group(tmp_path: Path) -> None:
    """As Ctrl-C really does: every process of the foreground group gets the signal at once."""
    with machine_wide():
        demo = subprocess.Popen(
            postcopy_argv("demo", "--json", "--postcopy-after", "100", "-m", "64M"),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            process_group=0,
        )
        try:
            until_it_says(demo, b" active ")
            children = psutil.Process(demo.pid).children(recursive=True)
            os.killpg(demo.pid, signal.SIGINT)
            assert demo.wait(TIMEOUT_S) == INTERRUPTED
            assert psutil.wait_procs(children, timeout=TIMEOUT_S)[1] == []
        finally:
            end(demo)
    assert list(tmp_path.iterdir()) == []
