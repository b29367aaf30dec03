"""The last word of a precopy is lost: the source gave its guest away and the destination never got
it. Who knows that takes the guest back; nobody else can, and nothing does so by itself.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing
from migration.runtime.errors import MigrationError
from tests.support.e2e_child import child
from tests.support.e2e_leaks import nothing_left
from tests.support.monitor_process import RunningVM, run_postcopy, switch_on
from tests.support.pair import MIB, Side, pair, side
from tests.support.proxy import Proxy
from tests.support.qmp import QmpClient, QmpError
from tests.support.stream_elements import Kind
from tests.support.tamper import CutAt, StallAt, Tamper, command, kind, message

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

OPTIONS: dict[str, Any] = {"ram_bytes": 8 * MIB, "smp": 2, "rate": 20_000}
SHAPE = ("-m", "8M", "--smp", "2", "--rate", "20000")


def end_lost() -> CutAt:
    """The byte that ends the stream, and starts the guest over there, never arrives."""
    return CutAt(kind(Kind.END), after=0)


@contextmanager
def broken(
    folder: Path, *tampers: Tamper, runs: bool = True, checksums: bool = True
) -> Iterator[tuple[Side, Side, Proxy]]:
    """A precopy on its way through a wire that breaks."""
    uri = f"unix:{folder}/m"
    with (
        nothing_left(),
        pair(postcopy=False, **OPTIONS) as (source, target),
        Proxy(uri, *tampers) as proxy,
    ):
        if runs:
            source.machine.start()
        source.service.set_parameters({"x-checksum": checksums})
        target.service.migrate_incoming(uri)
        source.service.migrate(proxy.uri)
        yield source, target, proxy


def assert_nowhere(source: Side, target: Side) -> None:
    """Held at the source, never run at the destination, and both say so."""
    assert source.service.wait(30) == "failed", source.service.query()
    assert target.service.wait(30) == "failed", target.service.query()
    assert (source.machine.run_state, target.machine.run_state) == ("finish-migrate", "inmigrate")
    assert "x-take-back" in str(source.service.query()["error-desc"])


def move_again(source: Side, target: Side, uri: str) -> None:
    """All of it, to the destination that had failed."""
    target.service.migrate_incoming(uri)
    source.service.migrate(uri)
    assert source.service.wait(30) == "completed", source.service.query()
    assert target.service.wait(30) == "completed", target.service.query()
    assert target.machine.run_state == "running"
    target.assert_sweep_clean()


def test_taken_back_and_migrated_again(tmp_path: Path) -> None:
    """It goes on with all of its memory, and it is a guest like any other from then on."""
    with broken(tmp_path, end_lost()) as (source, target, _):
        assert_nowhere(source, target)
        source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "running"
        assert source.events[-1] == ("RESUME", {})
        query = source.service.query()
        assert "taken back" in str(query["error-desc"])
        assert "downtime" not in query  # it never moved
        source.assert_sweep_clean()
        source.service.cont()
        move_again(source, target, f"unix:{tmp_path}/again")


def test_nobody_takes_it_back_by_mistake(tmp_path: Path) -> None:
    """Neither ``cont``, nor another migration, nor the command without the word that matters."""
    with broken(tmp_path, end_lost()) as (source, target, _):
        assert_nowhere(source, target)
        with pytest.raises(MigrationError, match="finish-migrate"):
            source.service.cont()
        with pytest.raises(MigrationError, match="finish-migrate"):
            source.service.migrate(f"unix:{tmp_path}/nobody")
        with pytest.raises(MigrationError, match="not-running-elsewhere"):
            source.service.take_back(not_running_elsewhere=False)
        with pytest.raises(MigrationError, match="none was given away here"):
            target.service.take_back(not_running_elsewhere=True)
        assert_nowhere(source, target)


def test_a_guest_that_stood_stands_again(tmp_path: Path) -> None:
    """It is taken back as it was."""
    with broken(tmp_path, end_lost(), runs=False) as (source, target, _):
        before = source.machine.run_state
        assert_nowhere(source, target)
        source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state != "running"
        source.assert_sweep_clean()
        assert ("RESUME", {}) not in source.events
        assert before != "running"


def test_only_once(tmp_path: Path) -> None:
    with broken(tmp_path, end_lost()) as (source, target, _):
        assert_nowhere(source, target)
        source.service.take_back(not_running_elsewhere=True)
        with pytest.raises(MigrationError, match="no guest to take back"):
            source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "running"


@pytest.mark.parametrize(
    "lost", ["its answer", "the description behind the word", "the channel for its answer"]
)
def test_destination_heard_it(lost: str, tmp_path: Path) -> None:
    """The guest runs over there, which the destination says without doubt: completed."""
    wires: dict[str, Tamper] = {
        "its answer": CutAt(message("SHUT"), after=0),
        "the description behind the word": CutAt(kind(Kind.END)),
        "the channel for its answer": StallAt(kind(Kind.END)),
    }
    wire = wires[lost]
    with broken(tmp_path, wire, checksums=lost == "its answer") as (source, target, proxy):
        if isinstance(wire, StallAt):
            assert wire.struck.wait(30)
            proxy.cut()
        assert target.service.wait(30) == "completed", target.service.query()
        assert source.service.wait(30) == "failed", source.service.query()
        assert target.machine.run_state == "running"
        assert source.machine.run_state == "finish-migrate"
        target.assert_sweep_clean()


def test_a_guest_that_never_left(tmp_path: Path) -> None:
    """Failed before the commit point, cancelled, completed, never migrated: refused, unchanged."""
    with side(**OPTIONS) as alone, pytest.raises(MigrationError, match="none was given away"):
        alone.service.take_back(not_running_elsewhere=True)
    with broken(tmp_path, CutAt(command("PING"), nth=1)) as (source, target, _):
        assert source.service.wait(30) == "failed"
        with pytest.raises(MigrationError, match=r"no guest to take back.*'failed'.*'running'"):
            source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "running"
        assert target.service.wait(30) == "failed"
        move_again(source, target, f"unix:{tmp_path}/again")
        with pytest.raises(MigrationError, match=r"no guest to take back.*'completed'"):
            source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "postmigrate"


def test_postcopy_is_recovered_instead(tmp_path: Path) -> None:
    """RUN was lost: the recovery says it again. The guest may have run, so nothing is taken
    back."""
    uri = f"unix:{tmp_path}/m"
    with (
        nothing_left(),
        pair(**OPTIONS) as (source, target),
        Proxy(uri, CutAt(command("RUN"), after=0)) as proxy,
    ):
        source.machine.start()
        target.service.migrate_incoming(uri)
        source.service.migrate(proxy.uri)
        source.service.start_postcopy()
        for each in (source, target):
            assert each.service.wait(30) == "postcopy-paused", each.service.query()
            assert each.figures["recoveries"] == 0
        with pytest.raises(MigrationError, match="recover"):
            source.service.take_back(not_running_elsewhere=True)
        # A wish alone is no recovery.
        target.service.recover(f"unix:{tmp_path}/never")
        assert target.figures["recoveries"] == 0
        target.service.pause()
        target.wait_count("MIGRATION", 2, status="postcopy-paused")
        assert target.figures["recoveries"] == 0
        target.service.recover(f"unix:{tmp_path}/again")
        source.service.migrate(f"unix:{tmp_path}/again", resume=True)
        source.wait_status("completed")
        target.wait_status("completed")
        assert [each.figures["recoveries"] for each in (source, target)] == [1, 1]
        target.assert_sweep_clean()


def test_destination_died_holding_it(tmp_path: Path) -> None:
    """Killed with the last word before it, after it acknowledged everything."""
    uri, stall = f"unix:{tmp_path}/m", StallAt(kind(Kind.END), after=0)
    with (
        nothing_left(),
        side(**OPTIONS) as source,
        child(incoming=True, **OPTIONS) as destination,
        Proxy(uri, stall) as proxy,
    ):
        source.machine.start()
        destination.call("service", "migrate_incoming", uri)
        source.service.migrate(proxy.uri)
        assert stall.struck.wait(30)
        destination.kill()
        proxy.cut()
        assert source.service.wait(30) == "failed"
        assert source.machine.run_state == "finish-migrate"
        source.service.take_back(not_running_elsewhere=True)
        assert source.machine.run_state == "running"
        source.assert_sweep_clean()


class PassesDescriptors:
    """A wire between unix sockets that carries descriptors, and breaks once the destination has
    acknowledged everything: whatever the source says then never arrives."""

    _PONG = struct.pack(">HHI", 2, 4, 3)  # to the PING behind the last device

    def __init__(self, folder: Path) -> None:
        self._to = str(folder / "m")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "wire"))
        self._listener.listen()
        self.uri = f"unix:{folder}/wire"
        self._is_broken = threading.Event()
        self._thread = threading.Thread(target=self._carry)

    def _carry(self) -> None:
        here, _ = self._listener.accept()
        with here, socket.socket(socket.AF_UNIX) as there:
            there.connect(self._to)
            forth = threading.Thread(target=self._forth, args=(here, there))
            forth.start()
            seen = b""
            while self._PONG not in seen and (data := there.recv(1 << 16)):
                seen += data
                if self._PONG in seen:
                    there.shutdown(socket.SHUT_RDWR)  # before the source hears of it
                    self._is_broken.set()
                here.sendall(data)
            forth.join()

    def _forth(self, here: socket.socket, there: socket.socket) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(here, 1 << 16, 16)
            if not data or self._is_broken.is_set():
                return  # what came now was the last word
            socket.send_fds(there, [data], fds)
            for fd in fds:
                os.close(fd)

    def __enter__(self) -> PassesDescriptors:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def test_memory_that_was_handed_over(tmp_path: Path) -> None:
    """Both had it mapped. The destination lets go before it says that it failed."""
    with (
        nothing_left(),
        pair(postcopy=False, backing=Backing.MEMFD, **OPTIONS) as (source, target),
        PassesDescriptors(tmp_path) as wire,
    ):
        source.machine.start()
        source.service.set_parameters({"mode": "cpr-transfer", "x-checksum": False})
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(wire.uri)
        assert_nowhere(source, target)
        assert source.figures["handed-over-bytes"] == 8 * MIB
        source.service.take_back(not_running_elsewhere=True)
        source.assert_sweep_clean()
        source.service.cont()
        source.service.set_parameters({"mode": "normal"})
        move_again(source, target, f"unix:{tmp_path}/again")


# -- by the monitor and the command line ----------------------------------------------------------


@contextmanager
def vms(folder: Path, *tampers: Tamper) -> Iterator[tuple[QmpClient, QmpClient, str]]:
    """Two VMs in their own processes after a precopy broke; the destination's is still there."""
    uri = f"unix:{folder}/m"
    with (
        RunningVM(folder, "src", *SHAPE) as source,
        RunningVM(folder, "dst", *SHAPE, "--incoming", "defer") as destination,
        Proxy(uri, *tampers) as proxy,
        source.client() as here,
        destination.client() as there,
    ):
        for monitor in (here, there):
            switch_on(monitor, "events")
        there.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})
        here.execute("migrate", {"uri": proxy.uri})
        here.wait_event("MIGRATION", lambda data: data["status"] == "failed")
        yield here, there, proxy.uri


def take_back(folder: Path, *options: str) -> Any:
    return run_postcopy("migrate", str(folder / "src.qmp"), "--take-back", "--json", *options)


def assert_clean(monitor: QmpClient) -> None:
    monitor.execute("stop")
    assert monitor.execute("x-oracle-sweep")["errors"] == 0


def test_command_line_asks_the_destination(tmp_path: Path) -> None:
    with vms(tmp_path, end_lost()) as (here, there, _):
        there.wait_event("MIGRATION", lambda data: data["status"] == "failed")
        done = take_back(tmp_path, "--destination", str(tmp_path / "dst.qmp"))
        assert done.returncode == 0, done.stderr
        states = json.loads(done.stdout.splitlines()[-1])["run_states"]
        assert states == {"source": "running", "destination": "inmigrate"}
        assert here.execute("query-status")["running"]
        assert_clean(here)


def test_command_line_hears_that_it_runs_there(tmp_path: Path) -> None:
    """The answer was lost, not the word: refused, and the guest stays one."""
    with vms(tmp_path, CutAt(message("SHUT"), after=0)) as (here, there, _):
        there.wait_event("MIGRATION", lambda data: data["status"] == "completed")
        done = take_back(tmp_path, "--destination", str(tmp_path / "dst.qmp"))
        assert done.returncode == 1
        assert "'completed', its guest 'running'" in done.stderr
        assert not here.execute("query-status")["running"]
        assert_clean(there)


def test_command_line_finds_no_destination(tmp_path: Path) -> None:
    """Whoever sees that its process is gone says so by leaving it out."""
    with vms(tmp_path, end_lost()) as (here, there, _):
        there.execute("quit")
        gone = take_back(tmp_path, "--destination", str(tmp_path / "nobody.qmp"))
        assert gone.returncode == 1
        assert "leave out --destination" in gone.stderr
        assert not here.execute("query-status")["running"]
        done = take_back(tmp_path)
        assert done.returncode == 0, done.stderr
        assert_clean(here)


def test_migrate_tells_what_to_do(tmp_path: Path) -> None:
    """A migration driven by the command fails in its last word, and says how to go on."""
    listen = f"unix:{tmp_path}/m"
    with (
        RunningVM(tmp_path, "src", *SHAPE) as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
        Proxy(listen, end_lost()) as proxy,
    ):
        done = run_postcopy(
            *("migrate", source.path, proxy.uri, "--json", "--listen", listen),
            *("--destination", destination.path),
        )
        assert done.returncode == 1, done.stderr
        assert "--take-back" in done.stderr
        last = json.loads(done.stdout.splitlines()[-1])
        assert "--take-back" in last["note"]
        assert last["run_states"]["source"] == "finish-migrate"
        destination.wait_exit()  # exit-on-error, QEMU's default
        assert take_back(tmp_path).returncode == 0
        with source.client() as here:
            assert_clean(here)


def test_monitors(tmp_path: Path) -> None:
    """QMP wants the word that matters; HMP its flag."""
    with vms(tmp_path, end_lost()) as (here, there, _):
        there.wait_event("MIGRATION", lambda data: data["status"] == "failed")
        with pytest.raises(QmpError, match="not-running-elsewhere"):
            here.execute("x-take-back")
        with pytest.raises(QmpError, match="only if you know"):
            here.execute("x-take-back", {"not-running-elsewhere": False})

        def hmp(line: str) -> str:
            return str(here.execute("human-monitor-command", {"command-line": line}))

        assert "only if you know" in hmp("x_take_back")
        assert not here.execute("query-status")["running"]
        assert hmp("x_take_back -n") == ""
        here.wait_event("RESUME")
        assert "no guest to take back" in hmp("x_take_back -n")
        assert_clean(here)


@pytest.mark.parametrize(
    "words",
    [
        ["src.qmp", "unix:m", "--take-back"],
        ["src.qmp", "--take-back", "--resume"],
        ["src.qmp"],
    ],
)
def test_wrong_use(words: list[str]) -> None:
    done = run_postcopy("migrate", *words)
    assert done.returncode == 2, done.stderr
    assert "traceback" not in done.stderr.lower()
