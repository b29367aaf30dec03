"""``postcopy run`` as a process: starts, listens, ends in every way, leaves nothing behind."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tests.support.monitor_process import (
    ROOT,
    TIMEOUT_S,
    RunningVM,
    postcopy_argv,
    run_postcopy,
    start_postcopy_pair,
)
from tests.support.process import end, tied_to_us
from tests.support.qmp import QmpClient, QmpError

pytestmark = pytest.mark.e2e
SMALL = ("-m", "16M")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with RunningVM(tmp_path, "vm", *SMALL) as vm, vm.client() as client:
        vm.signal(number)
        client.wait_event("SHUTDOWN", lambda data: data["reason"] == "host-signal")
        assert vm.wait_exit() == 0
        assert not os.path.exists(vm.path)
        assert "Traceback" not in vm.stderr()


def test_quit_ends_it_cleanly(tmp_path: Path) -> None:
    with RunningVM(tmp_path, "vm", *SMALL) as vm, vm.client() as client:
        assert client.execute("query-status")["running"] is True
        client.execute("quit")
        client.wait_event("SHUTDOWN", lambda data: data["reason"] == "host-qmp-quit")
        assert vm.wait_exit() == 0
        assert not os.path.exists(vm.path)


def test_stopped_at_the_start_until_cont(tmp_path: Path) -> None:
    with RunningVM(tmp_path, "vm", *SMALL, "-S") as vm, vm.client() as client:
        assert client.execute("query-status") == {"status": "prelaunch", "running": False}
        before = client.execute("x-query-machine")["ops"]
        client.execute("cont")
        client.wait_event("RESUME")
        client.execute("stop")
        client.wait_event("STOP")
        assert client.execute("x-query-machine")["ops"] >= before
        verdict = client.execute("x-oracle-sweep")
        assert (verdict["pages_checked"], verdict["errors"]) == (4096, 0)


def test_qemus_spelling(tmp_path: Path) -> None:
    """One dash, ``size=``, ``cpus=``, chardev options: as people's scripts have it."""
    extra = str(tmp_path / "extra")
    options = ("-m", "size=16M", "-smp", "cpus=2", "-M", "toy-1.0", "-mem-prealloc")
    with RunningVM(
        tmp_path, "vm", *options, "-qmp", f"unix:{extra},server=on,wait=off", "-S"
    ) as vm:
        assert f"unix:{extra}" in vm.ready["monitors"]
        with QmpClient(extra) as client:
            figures = client.execute("x-query-machine")
            assert (figures["machine_type"], len(figures["vcpus"])) == ("toy-1.0", 2)


def test_the_port_the_kernel_chose_is_told(tmp_path: Path) -> None:
    options = ("--incoming", "tcp:127.0.0.1:0", "--qmp", "tcp:127.0.0.1:0")
    with RunningVM(tmp_path, "vm", *SMALL, *options) as vm, vm.client() as client:
        port = int(vm.ready["incoming"].rpartition(":")[2])
        (address,) = client.execute("query-migrate")["socket-address"]
        assert address == {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        monitor = next(text for text in vm.ready["monitors"] if text.startswith("tcp:"))
        with socket.create_connection(("127.0.0.1", int(monitor.rpartition(":")[2]))) as other:
            assert other.recv(8).startswith(b'{"QMP"')


def test_a_failed_incoming_migration_ends_it(tmp_path: Path) -> None:
    """As in QEMU: status 1, and the reason on stderr."""
    uri = f"unix:{tmp_path}/in"
    with RunningVM(tmp_path, "vm", *SMALL, "--incoming", uri) as vm:
        with socket.socket(socket.AF_UNIX) as intruder:
            intruder.connect(f"{tmp_path}/in")
            intruder.sendall(b"not a migration stream")
            assert vm.wait_exit() == 1
        assert "incoming migration failed" in vm.stderr()
        assert "offset" in vm.stderr()


def test_unless_it_is_to_stay(tmp_path: Path) -> None:
    with RunningVM(tmp_path, "vm", *SMALL, "--incoming", "defer") as vm, vm.client() as client:
        client.execute("migrate-incoming", {"uri": f"unix:{tmp_path}/in", "exit-on-error": False})
        with socket.socket(socket.AF_UNIX) as intruder:
            intruder.connect(f"{tmp_path}/in")
            intruder.sendall(b"not a migration stream")
        with pytest.raises(QmpError):
            client.execute("cont")
        while client.execute("query-migrate")["status"] != "failed":
            client.execute("query-status")
        assert "offset" in client.execute("query-migrate")["error-desc"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--qmp", "unix:/proc/version"), "not a socket"),
        (("--qmp", "pigeon:x"), "not an address"),
        (("--incoming", "pigeon:x"), "protocol"),
        (("--mem-path", "/does/not/exist"), "No such file"),
        (("-M", "none", "--write-share", "1"), "only read"),
    ],
)
def test_what_cannot_be_started_says_why(options: tuple[str, ...], words: str) -> None:
    done = run_postcopy("run", *SMALL, *options)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that dies without a word takes it along."""
    path = str(tmp_path / "orphan.qmp")
    argv = postcopy_argv(
        *("run", *SMALL, "--qmp", f"unix:{path}", "--run-with", "exit-with-parent=on")
    )
    parent = subprocess.Popen(
        tied_to_us([sys.executable, "-c", f"import subprocess; subprocess.run({argv!r})"]),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    with QmpClient(path, timeout_s=TIMEOUT_S) as client:
        parent.kill()
        client.wait_event("SHUTDOWN")
    end(parent)


# -- consoles -----------------------------------------------------------------------------------


def test_console_on_a_pipe() -> None:
    done = subprocess.run(
        postcopy_argv("run", *SMALL, "--monitor", "stdio", "--name", "piped"),
        cwd=ROOT,
        input="info status\nstop\ninfo status\nmigrate_set_parameter nope 1\ninfo name\nq\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0
    said = done.stdout.replace("(postcopy) ", "")
    assert "VM status: running\n" in said
    assert "VM status: paused\n" in said
    assert "no parameter 'nope'" in said
    assert "\npiped\n" in said


def test_a_console_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """The reader goes away, as ``head`` does: the console ends without a word, the VM goes on."""
    monitor = tmp_path / "qmp"
    process = subprocess.Popen(
        postcopy_argv("run", *SMALL, "--monitor", "stdio", "--qmp", f"unix:{monitor}"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"info status\n" * 3)
        process.stdin.close()
        with QmpClient(str(monitor)) as client:
            assert client.execute("query-status")["running"] is True
            client.execute("quit")
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(TIMEOUT_S) == 0
    finally:
        end(process)


def test_console_on_a_terminal_completes_and_remembers(tmp_path: Path) -> None:
    """Tab completes, the history is kept, Ctrl-C ends the VM and the terminal is as before."""
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        postcopy_argv("run", *SMALL, "--monitor", "stdio"),
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"},
        start_new_session=True,
    )
    seen = bytearray()

    def until(marker: bytes) -> None:
        while marker not in seen:
            ready, _, _ = select.select([master], [], [], TIMEOUT_S)
            assert ready, bytes(seen)
            seen.extend(os.read(master, 4096))
        del seen[: seen.index(marker) + len(marker)]

    try:
        until(b"(postcopy) ")
        os.write(master, b"info stat\t\n")
        until(b"VM status: running")
        until(b"(postcopy) ")
        process.send_signal(signal.SIGINT)
        until(b"ending: SIGINT")
        assert process.wait(TIMEOUT_S) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)
    assert "info status" in (tmp_path / "postcopy" / "monitor-history").read_text()


# -- ends that are harder ------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("way", ["quit", "SIGINT"])
def test_it_ends_while_threads_sleep_on_pages_that_never_come(tmp_path: Path, way: str) -> None:
    """The source is killed in postcopy: vCPUs and a monitor command sleep in page faults.

    The monitor answers others meanwhile, and the process still ends when it is told to.
    """
    shape = ("-m", "64M", "--smp", "2")
    with (
        RunningVM(tmp_path, "src", *shape) as source_vm,
        RunningVM(tmp_path, "dst", *shape, "--incoming", "defer") as vm,
        source_vm.client() as source,
        vm.client() as destination,
        vm.client() as other,
    ):
        start_postcopy_pair(tmp_path, source, destination, max_postcopy_bandwidth=1 << 20)
        destination.wait_event("MIGRATION", lambda data: data["status"] == "postcopy-active")
        source_vm.process.kill()
        destination.wait_event("MIGRATION", lambda data: data["status"] == "postcopy-paused")
        destination.execute("stop")
        asleep = threading.Thread(target=sweep_until_closed, args=(other,))
        asleep.start()
        for _ in range(20):
            assert destination.execute("query-migrate")["status"] == "postcopy-paused"
        if way == "quit":
            destination.execute("quit")
        else:
            vm.signal(signal.SIGINT)
        assert vm.wait_exit() == 0
        asleep.join(TIMEOUT_S)
        assert not asleep.is_alive()
        assert not os.path.exists(vm.path)


def sweep_until_closed(client: QmpClient) -> None:
    """Touch every page; the answer, if any, tells of lost pages."""
    try:
        verdict = client.execute("x-oracle-sweep", timeout_s=TIMEOUT_S)
        assert verdict["errors"] > 0
    except (ConnectionError, QmpError):
        return
