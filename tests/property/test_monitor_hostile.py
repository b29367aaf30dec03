"""A hostile client: whatever it sends, the server answers in form and serves the next one."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.monitor_fake import MonitorUnderTest
from tests.support.qmp import QmpClient

TIMEOUT_S = 20.0
NAMES = st.sampled_from(
    ["execute", "exec-oob", "arguments", "id", "uri", "enable", "capabilities", "command-line", "x"]
)
VALUES = st.sampled_from(
    [
        "qmp_capabilities",
        "migrate",
        "stop",
        "human-monitor-command",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "getfd",
        "query-migrate",
        "migrate_set_parameter max-bandwidth 9e9",
        "info migrate -z",
        "fd:nope",
        True,
        None,
        -1,
        1 << 70,
        0.5,
    ]
)
MESSAGES = st.recursive(
    VALUES | st.text(max_size=8),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=8,
)
NOISE = st.binary(max_size=100)


@pytest.fixture(scope="module")
def vm() -> Iterator[MonitorUnderTest]:
    with tempfile.TemporaryDirectory() as folder:
        vm = MonitorUnderTest(Path(folder))
        yield vm
        vm.server.close()


@given(st.lists(MESSAGES.map(lambda m: json.dumps(m).encode()) | NOISE, max_size=12), st.booleans())
def test_every_answer_is_a_reply(
    vm: MonitorUnderTest, messages: list[bytes], negotiates: bool
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(vm.path)
        if negotiates:
            client.sendall(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
        for message in messages:
            client.sendall(message)
        client.sendall(b'\xff{"execute":"nope","id":"last"}')
        data = b""
        while b'"id": "last"' not in data:
            chunk = client.recv(65536)
            assert chunk, f"the server hung up after {data!r}"
            data += chunk
    for line in data.splitlines():
        reply = json.loads(line)
        assert set(reply) & {"QMP", "return", "error", "event"}, reply
        if "error" in reply:
            assert set(reply["error"]) == {"class", "desc"}
            assert "internal error" not in reply["error"]["desc"], reply
    with QmpClient(vm.path) as next_client:
        assert next_client.execute("query-name") == {"name": "vm"}
