"""Where a monitor listens: private socket files, loopback ports, and who is let in."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.monitor.address import TCPAddress, UnixAddress, parse_address
from migration.monitor.errors import QMPError
from migration.runtime.sockets import Access
from tests.support.monitor_fake import MonitorUnderTest
from tests.support.qmp import QmpClient

TIMEOUT_S = 20.0


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[MonitorUnderTest]:
    vm = MonitorUnderTest(tmp_path)
    yield vm
    vm.server.close()


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
        assert client.recv(8).startswith(b'{"QMP"')


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
    vm.server.close()  # it counts after the client was turned away
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
        ("tcp:0.0.0.0:1,allow-remote=on", TCPAddress("0.0.0.0", 1, Access(allows_remote=True))),
        ("unix:q,allow-uid=7,allow-uid=9", UnixAddress("q", Access(uids=frozenset({7, 9})))),
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
