"""The real qmp-shell (of the qemu.qmp package) drives a whole live migration of ours."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.support.monitor_process import RunningVM
from tests.support.process import end, tied_to_us

pytestmark = pytest.mark.e2e
PROMPT = "(QEMU) "


class Shell:
    """qmp-shell with its stdin and stdout on pipes: a line in, a JSON line out."""

    def __init__(self, socket_path: str, home: Path, *options: str) -> None:
        argv = [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, socket_path]
        self._process = subprocess.Popen(
            tied_to_us(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": str(home), "PYTHONUNBUFFERED": "1", "TERM": "dumb"},
        )
        self.banner = self._until_prompt()

    def _until_prompt(self) -> str:
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(PROMPT.encode()):
            byte = self._process.stdout.read(1)
            if not byte:
                raise EOFError(said.decode())
            said += byte
        return said.decode().removesuffix(PROMPT)

    def enter(self, line: str) -> str:
        """Type a line; what is printed until the next prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._until_prompt()

    def run(self, line: str) -> Any:
        """Type a command; what it returned."""
        reply = json.loads(self.enter(line))
        assert "return" in reply, reply
        return reply["return"]

    def events(self) -> list[dict[str, Any]]:
        """An empty line shows the events so far, as Python writes them."""
        return [ast.literal_eval(text) for text in self.enter("").splitlines()]

    def __enter__(self) -> Shell:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end(self._process)


@pytest.mark.kernel
def test_a_whole_postcopy_migration_by_hand(tmp_path: Path) -> None:
    shape = ("-m", "64M", "--smp", "2")
    with (
        RunningVM(tmp_path, "src", *shape) as source_vm,
        RunningVM(tmp_path, "dst", *shape, "--incoming", "defer") as destination_vm,
        Shell(source_vm.path, tmp_path) as source,
        Shell(destination_vm.path, tmp_path) as destination,
    ):
        assert "Connected to QEMU" in source.banner
        on = (
            'migrate-set-capabilities capabilities=[{"capability":"postcopy-ram","state":true},'
            '{"capability":"events","state":true}]'
        )
        for shell in (source, destination):
            assert shell.run(on) == {}
        assert destination.run(f"migrate-incoming uri=unix:{tmp_path}/mig") == {}
        assert source.run("migrate-set-parameters max-bandwidth=8388608") == {}
        assert source.run(f"migrate uri=unix:{tmp_path}/mig") == {}
        assert source.run("migrate-start-postcopy") == {}
        for shell in (source, destination):
            while shell.run("query-migrate")["status"] != "completed":
                pass
        assert source.run("query-status")["status"] == "postmigrate"
        assert destination.run("query-status") == {"status": "running", "running": True}
        statuses = [event["data"]["status"] for event in source.events() if "data" in event]
        assert statuses[0] == "setup"
        assert "postcopy-active" in statuses
        assert statuses[-1] == "completed"
        assert "RESUME" in [event["event"] for event in destination.events()]
        assert destination.run("stop") == {}
        assert destination.run("x-oracle-sweep")["errors"] == 0
        refused = json.loads(source.enter("cont"))
        assert "return" in refused or refused["error"]["class"] == "GenericError"


def test_hmp_through_qmp_shell(tmp_path: Path) -> None:
    """``qmp-shell -H`` reads the command list from ``help`` and runs lines."""
    with (
        RunningVM(tmp_path, "vm", "-m", "16M") as vm,
        Shell(vm.path, tmp_path, "-H") as shell,
    ):
        assert "VM status: running" in shell.enter("info status")
        assert "max-bandwidth" in shell.enter("info migrate_parameters")
        shell.enter("migrate_set_parameter max-bandwidth 7")
        assert "max-bandwidth: 7340032" in shell.enter("info migrate_parameters")
