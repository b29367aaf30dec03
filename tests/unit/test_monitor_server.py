"""The monitor's sockets: clients, out-of-band, descriptors, slow readers, permissions, clean-up."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.monitor.address import UnixAddress
from migration.monitor.qmp_session import EVENTS_WAITING_MAX
from migration.monitor.server import CLIENTS_MAX
from tests.support.monitor_fake import MonitorUnderTest
from tests.support.qmp import QmpClient

TIMEOUT_S = 20.0


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[MonitorUnderTest]:
    vm = MonitorUnderTest(tmp_path)
    yield vm
    vm.guest.gate.set()
    vm.server.close()


def raw_client(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(TIMEOUT_S)
    client.connect(path)
    return client


def read_lines(client: socket.socket, count: int) -> list[dict[str, object]]:
    data = b""
    while data.count(b"\n") < count:
        chunk = client.recv(65536)
        if not chunk:
            raise ConnectionError(f"closed after {data!r}")
        data += chunk
    return [json.loads(line) for line in data.splitlines()]


def test_greeting_commands_events(vm: MonitorUnderTest) -> None:
    with QmpClient(vm.path) as one, QmpClient(vm.path) as two:
        assert one.greeting["QMP"]["capabilities"] == ["oob"]
        assert one.greeting["QMP"]["version"]["qemu"]["major"] >= 11
        assert one.execute("query-name") == {"name": "vm"}
        one.execute("stop")
        two.wait_event("STOP")
        one.execute("migrate", {"uri": "unix:/x"})
        two.wait_event("MIGRATION", lambda data: data["status"] == "active")
        stamp = two.events[0]["timestamp"]
        assert stamp["seconds"] > 1_700_000_000
        assert 0 <= stamp["microseconds"] < 1_000_000


def test_out_of_band_passes_a_command_that_waits(vm: MonitorUnderTest) -> None:
    """A sweep held up by the guest delays its own client's next command, nothing else."""
    vm.guest.gate.clear()
    vm.guest.run_state = "paused"
    vm.service.set_capabilities({"postcopy-ram": True})
    vm.service.start_postcopy()
    client = raw_client(vm.path)
    read_lines(client, 1)
    client.sendall(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    read_lines(client, 1)
    client.sendall(b'{"execute":"x-oracle-sweep","id":1}{"execute":"query-name","id":2}')
    assert vm.guest.is_sweeping.wait(TIMEOUT_S)
    client.sendall(b'{"exec-oob":"migrate-pause","id":3}')
    lines = read_lines(client, 2)
    assert {"return": {}, "id": 3} in lines
    assert [line["event"] for line in lines if "event" in line] == ["MIGRATION"]
    with QmpClient(vm.path) as other:
        assert other.execute("query-name") == {"name": "vm"}
    vm.guest.gate.set()
    assert [line["id"] for line in read_lines(client, 2)] == [1, 2]
    client.close()


def test_a_reader_that_never_reads_bothers_nobody(vm: MonitorUnderTest) -> None:
    """Its answers and events stay bounded; the others are served; what it missed is counted."""
    stuck = raw_client(vm.path)
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stuck.sendall(b'{"execute":"qmp_capabilities"}')
    read_lines(stuck, 2)
    stuck.setblocking(False)
    sent = 0
    try:
        while sent < 1 << 22:  # far more than the kernel's buffers hold
            sent += stuck.send(b'{"execute":"query-migrate-parameters"}' * 100)
    except BlockingIOError:
        pass
    with QmpClient(vm.path) as other:
        for _ in range(8):
            for _ in range(EVENTS_WAITING_MAX):
                vm.server.emit("MIGRATION_PASS", {"pass": 1})
            other.execute("query-name")
        assert other.event_names().count("MIGRATION_PASS") == EVENTS_WAITING_MAX * 8
    stuck.setblocking(True)
    stuck.settimeout(TIMEOUT_S)
    received = b""
    while b"X_EVENTS_DROPPED" not in received:
        received += stuck.recv(1 << 16)
    stuck.close()


def test_descriptors_are_passed_and_used_once(vm: MonitorUnderTest) -> None:
    ours, theirs = socket.socketpair()
    client = raw_client(vm.path)
    client.sendall(b'{"execute":"qmp_capabilities"}')
    read_lines(client, 2)
    socket.send_fds(client, [b'{"execute":"getfd","arguments":{"fdname":"c"}}'], [theirs.fileno()])
    theirs.close()
    assert read_lines(client, 1) == [{"return": {}}]
    client.sendall(b'{"execute":"migrate","arguments":{"uri":"fd:c"}}')
    read_lines(client, 3)
    (number,) = vm.service.received_fds
    assert not os.get_inheritable(number)
    os.write(number, b"x")
    assert ours.recv(1) == b"x"
    os.close(number)  # the service owns it by now
    for command in (
        b'{"execute":"migrate","arguments":{"uri":"fd:c"}}',
        b'{"execute":"closefd","arguments":{"fdname":"c"}}',
    ):
        client.sendall(command)
        assert "error" in read_lines(client, 1)[0]
    client.close()
    ours.close()


def test_descriptors_nobody_takes_are_closed(vm: MonitorUnderTest) -> None:
    ours, theirs = socket.socketpair()
    client = raw_client(vm.path)
    client.sendall(b'{"execute":"qmp_capabilities"}')
    read_lines(client, 2)
    for message in (b'{"execute":"getfd","arguments":{"fdname":"1"}}', b'{"execute":"stop"}'):
        socket.send_fds(client, [message], [theirs.fileno()])
        read_lines(client, 1)
    theirs.close()
    client.close()
    assert ours.recv(1) == b""  # every copy is gone
    ours.close()


def test_a_half_closed_client_still_gets_its_answers(vm: MonitorUnderTest) -> None:
    client = raw_client(vm.path)
    client.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"query-name"}\n')
    client.shutdown(socket.SHUT_WR)
    assert read_lines(client, 3)[-1] == {"return": {"name": "vm"}}
    assert client.recv(1) == b""
    client.close()


def test_quit_is_answered(vm: MonitorUnderTest) -> None:
    with QmpClient(vm.path) as client:
        client.execute("quit")
        assert vm.has_quit.wait(TIMEOUT_S)
        assert vm.quit_reasons == ["host-qmp-quit"]


def test_clients_are_counted_and_bounded(vm: MonitorUnderTest) -> None:
    clients = [QmpClient(vm.path) for _ in range(CLIENTS_MAX)]
    surplus = raw_client(vm.path)
    assert surplus.recv(1) == b""
    surplus.close()
    statistics = vm.server.statistics()
    assert (statistics.clients, statistics.clients_refused) == (CLIENTS_MAX, 1)
    for client in clients:
        client.close()


def test_a_long_conversation_leaves_no_threads(vm: MonitorUnderTest) -> None:
    for _ in range(40):
        with QmpClient(vm.path) as client:
            client.execute("query-status")
    with QmpClient(vm.path) as client:
        client.execute("query-status")
        alive = [t.name for t in threading.enumerate() if t.name.startswith("qmp-")]
    assert len(alive) <= CLIENTS_MAX


def test_hmp_on_a_socket(vm: MonitorUnderTest, tmp_path: Path) -> None:
    path = str(tmp_path / "hmp")
    vm.server.listen_hmp(UnixAddress(path))
    client = raw_client(path)
    received = b""

    def until(marker: bytes) -> bytes:
        nonlocal received
        while marker not in received:
            received += client.recv(4096)
        text, _, received = received.partition(marker)
        return text

    assert b"help" in until(b"(postcopy) ")
    client.sendall(b"info status\r\n\ninfo na")
    assert until(b"(postcopy) ") == b"VM status: running\r\n"
    assert until(b"(postcopy) ") == b""
    client.sendall(b"me\n" + b"x" * 10000 + b"\n")
    assert until(b"(postcopy) ") == b"vm\r\n"
    assert b"Error" in until(b"(postcopy) ")
    client.close()


def test_migration_events_need_their_capability(vm: MonitorUnderTest) -> None:
    with QmpClient(vm.path) as client:
        off = [{"capability": "events", "state": False}]
        client.execute("migrate-set-capabilities", {"capabilities": off})
        client.execute("migrate", {"uri": "unix:/x"})
        client.execute("stop")
        client.wait_event("STOP")
        assert client.event_names() == ["STOP"]
