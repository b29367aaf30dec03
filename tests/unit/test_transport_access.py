"""Who may connect to a waiting migration: other users and hosts only when told so in words."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.transport import Listener, connect

NOBODY = 65534
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


def visit_as_nobody(kind: str, where: str) -> str:
    """What another user of this host gets to see: how many bytes."""
    return subprocess.run(
        ["/usr/bin/env", "python3", "-c", VISIT, kind, where],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()


class Waiting:
    """A listener with a thread in ``accept``, which greets who was let in with one byte."""

    def __init__(self, uri: str) -> None:
        self.listener = Listener(uri)
        self.channel: Channel | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            self.channel = self.listener.accept()
        except MigrationError:
            return
        self.channel.write(b"!")
        self.channel.flush()

    def close(self) -> None:
        self.listener.wake()
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.listener.close()
        if self.channel is not None:
            self.channel.close()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_beyond_the_loopback_only_when_told_so(address: str) -> None:
    with pytest.raises(MigrationError, match=r"allow-remote=on if that is meant"):
        Listener(f"tcp:{address}")
    listener = Listener(f"tcp:{address},allow-remote=on")
    assert "allow-remote" not in listener.uri  # it is what a source connects to
    listener.close()


def test_the_words_are_for_who_listens() -> None:
    with pytest.raises(MigrationError, match="for the side that listens"):
        connect("tcp:127.0.0.1:1,allow-remote=on")
    with pytest.raises(MigrationError, match="numeric user id"):
        Listener("tcp:127.0.0.1:0,allow-uid=bob")


def test_the_socket_file_is_private(tmp_path: Path) -> None:
    listener = Listener(f"unix:{tmp_path}/m")
    assert stat.S_IMODE(os.stat(tmp_path / "m").st_mode) == 0o600
    listener.close()
    assert not (tmp_path / "m").exists()
    open_one = Listener(f"unix:{tmp_path}/m,allow-uid={NOBODY}")
    assert stat.S_IMODE(os.stat(tmp_path / "m").st_mode) == 0o666
    open_one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_stranger_does_not_end_the_waiting(kind: str, allowed: bool) -> None:
    """Turned away, even where the file is open to all, and the right one still gets in; a user
    on the list is the right one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "m")
        access = f",allow-uid={NOBODY}" if allowed else ""
        waiting = Waiting((f"unix:{path}" if kind == "unix" else "tcp:127.0.0.1:0") + access)
        try:
            if kind == "unix":
                os.chmod(path, 0o777)
            where = path if kind == "unix" else waiting.listener.uri.rpartition(":")[2]
            assert visit_as_nobody(kind, where) == str(int(allowed))
            if not allowed:
                mine = connect(waiting.listener.uri)
                assert mine.read(1) == b"!"
                mine.close()
        finally:
            waiting.close()


def test_ipv6(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this host has no IPv6 loopback address")
    waiting = Waiting("tcp:[::1]:0")
    try:
        assert waiting.listener.uri.startswith("tcp:[::1]:")
        mine = connect(waiting.listener.uri)
        assert mine.read(1) == b"!"
        mine.close()
    finally:
        waiting.close()
