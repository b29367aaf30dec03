"""The monitor's sockets: clients, out-of-band, descriptors, slow readers, permissions, clean-up."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.monitor.address import TCPAddress, UnixAddress, parse_address
from migration.monitor.errors import QMPError
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
    number = int(vm.service.uris[0].removeprefix("fd:"))
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


# -- addresses ------------------------------------------------------------------------------------


def test_the_socket_is_private_and_removed(tmp_path: Path) -> None:
    vm = MonitorUnderTest(tmp_path)
    assert stat.S_IMODE(os.stat(vm.path).st_mode) == 0o600
    vm.server.close()
    assert not os.path.exists(vm.path)


def test_another_file_is_never_overwritten(vm: MonitorUnderTest, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(precious)
    for path in (precious, link):
        with pytest.raises(QMPError, match="not a socket"):
            vm.server.listen_qmp(UnixAddress(str(path)))
    assert precious.read_text() == "x"


def test_a_socket_in_use_is_refused_a_stale_one_replaced(
    vm: MonitorUnderTest, tmp_path: Path
) -> None:
    with pytest.raises(QMPError, match="another process"):
        vm.server.listen_qmp(UnixAddress(vm.path))
    stale = str(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(stale)
    vm.server.listen_qmp(UnixAddress(stale))
    QmpClient(stale).close()


def test_a_file_that_replaced_our_socket_is_left_alone(tmp_path: Path) -> None:
    vm = MonitorUnderTest(tmp_path)
    os.unlink(vm.path)
    Path(vm.path).write_text("somebody else's")
    vm.server.close()
    assert Path(vm.path).read_text() == "somebody else's"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_on_loopback_for_the_same_user(vm: MonitorUnderTest, host: str) -> None:
    """The kernel's socket table tells whose client it is; ours is let in."""
    try:
        bound = vm.server.listen_qmp(TCPAddress(host, 0))
    except QMPError as error:
        if host == "::1" and "assign" in error.desc:
            pytest.skip("this host has no IPv6 loopback address")
        raise
    assert isinstance(bound, TCPAddress)
    with socket.create_connection((host, bound.port), timeout=TIMEOUT_S) as client:
        assert "QMP" in read_lines(client, 1)[0]


def test_tcp_elsewhere_only_when_told_so(vm: MonitorUnderTest) -> None:
    with pytest.raises(QMPError, match="allow-remote=on"):
        vm.server.listen_qmp(parse_address("tcp:0.0.0.0:0"))


VISIT = """
import socket, sys
kind, where = sys.argv[1:]
client = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
client.settimeout(20)
try:
    client.connect(where if kind == "unix" else ("127.0.0.1", int(where)))
    print(len(client.recv(1)))
except (PermissionError, ConnectionResetError):
    print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_another_user_is_turned_away(vm: MonitorUnderTest, kind: str) -> None:
    """Even one who can reach the socket: its file and folder are opened up on purpose here."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "qmp")
        vm.server.listen_qmp(UnixAddress(path))
        os.chmod(path, 0o777)
        bound = vm.server.listen_qmp(TCPAddress("127.0.0.1", 0))
        assert isinstance(bound, TCPAddress)
        visit = subprocess.run(
            [
                "/usr/bin/env",
                "python3",
                "-c",
                VISIT,
                kind,
                path if kind == "unix" else str(bound.port),
            ],
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert (visit.stdout, visit.stderr) == ("0\n", "")
    assert vm.server.statistics().clients_refused == 1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/q", UnixAddress("/run/q")),
        ("unix:q,server=on,wait=off", UnixAddress("q")),
        ("unix:q,server,nowait", UnixAddress("q")),
        ("tcp:127.0.0.1:4444", TCPAddress("127.0.0.1", 4444)),
        ("tcp::4444", TCPAddress("127.0.0.1", 4444)),
        ("tcp:[::1]:0", TCPAddress("::1", 0)),
        ("tcp:0.0.0.0:1,allow-remote=on", TCPAddress("0.0.0.0", 1, allows_remote=True)),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "unix:", "q", "tcp:4444", "tcp:h:99999", "unix:q,wait=on", "unix:" + "x" * 108]
)
def test_not_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|option|path"):
        parse_address(text)


def test_migration_events_need_their_capability(vm: MonitorUnderTest) -> None:
    with QmpClient(vm.path) as client:
        off = [{"capability": "events", "state": False}]
        client.execute("migrate-set-capabilities", {"capabilities": off})
        client.execute("migrate", {"uri": "unix:/x"})
        client.execute("stop")
        client.wait_event("STOP")
        assert client.event_names() == ["STOP"]
