"""A migration over a descriptor that a client passes through QMP (``getfd``, ``fd:NAME``)."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.support.monitor_process import RunningVM, switch_on

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]
SHAPE = ("-m", "32M")


def pass_descriptor(path: str, name: str, end: socket.socket) -> None:
    """On a connection of its own, closed again: the VM keeps the descriptor."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("r") as answers:
        client.settimeout(20)
        client.connect(path)
        client.sendall(b'{"execute":"qmp_capabilities"}')
        command = {"execute": "getfd", "arguments": {"fdname": name}}
        socket.send_fds(client, [json.dumps(command).encode()], [end.fileno()])
        assert [json.loads(answers.readline()) for _ in range(3)][1:] == [{"return": {}}] * 2


def test_postcopy_over_a_passed_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with (
        RunningVM(tmp_path, "src", *SHAPE) as source_vm,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination_vm,
        source_vm.client() as source,
        destination_vm.client() as destination,
    ):
        for vm, end in ((source_vm, ours), (destination_vm, theirs)):
            pass_descriptor(vm.path, "channel", end)
            end.close()
        for client in (source, destination):
            switch_on(client, "events", "postcopy-ram")
        destination.execute("migrate-incoming", {"uri": "fd:channel"})
        source.execute("migrate", {"uri": "fd:channel"})
        source.execute("migrate-start-postcopy")
        for client in (source, destination):
            client.wait_event("MIGRATION", lambda data: data["status"] == "completed")
        destination.execute("stop")
        assert destination.execute("x-oracle-sweep")["errors"] == 0
