"""``postcopy migrate`` drives ours and a stock QEMU through QMP; its status says how it went."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.monitor_process import (
    ROOT,
    TIMEOUT_S,
    RunningVM,
    postcopy_argv,
    run_postcopy,
)
from tests.support.process import end, tied_to_us
from tests.support.qemu import Qemu, pattern, require_qemu

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]
SHAPE = ("-m", "64M", "--smp", "2")


def objects(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_postcopy_of_ours_and_the_guest_is_intact(tmp_path: Path) -> None:
    with (
        RunningVM(tmp_path, "src", *SHAPE) as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--json", "--watch"),
            *("--destination", destination.path, "--postcopy-after", "0.2"),
        )
        assert done.returncode == 0, done.stderr
        *moments, last = objects(done.stdout)
        assert last["result"] == "ok"
        assert last["run_states"] == {"source": "postmigrate", "destination": "running"}
        statuses = [moment["migration"]["status"] for moment in moments]
        assert "postcopy-active" in statuses
        assert last["migration"]["ram"]["remaining"] == 0
        with destination.client() as client:
            client.execute("stop")
            assert client.execute("x-oracle-sweep")["errors"] == 0


def test_precopy_of_an_idle_guest(tmp_path: Path) -> None:
    with (
        RunningVM(tmp_path, "src", *SHAPE, "--rate", "100") as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--set", "downtime-limit=2000"),
            *("--set", "max-bandwidth=1G", "--destination", destination.path),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "migration completed" in done.stdout
        assert "running at the destination" in done.stdout
        with destination.client() as client:
            client.execute("stop")
            assert client.execute("x-oracle-sweep")["errors"] == 0


def test_memory_handed_over_within_the_host(tmp_path: Path) -> None:
    shape = (*SHAPE, "--backing", "memfd")
    with (
        RunningVM(tmp_path, "src", *shape) as source,
        RunningVM(tmp_path, "dst", *shape, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--set", "mode=cpr-transfer"),
            *("--destination", destination.path, "--json"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        last = objects(done.stdout)[-1]
        assert last["run_states"] == {"source": "postmigrate", "destination": "running"}
        assert last["migration"]["ram"]["normal"] == 0
        with destination.client() as client:
            client.execute("stop")
            assert client.execute("x-oracle-sweep")["errors"] == 0


def test_out_of_time_it_cancels_and_the_guest_goes_on(tmp_path: Path) -> None:
    with (
        RunningVM(tmp_path, "src", *SHAPE) as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--set", "max-bandwidth=1M"),
            *("--destination", destination.path, "--timeout", "0.5"),
        )
        assert done.returncode == 1
        assert "cancelled" in done.stderr
        with source.client() as client:
            assert client.execute("query-status")["running"] is True
            while client.execute("query-migrate")["status"] != "cancelled":
                pass


def test_interrupted_the_migration_goes_on(tmp_path: Path) -> None:
    with (
        RunningVM(tmp_path, "src", *SHAPE) as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        watcher = subprocess.Popen(
            tied_to_us(
                postcopy_argv(
                    *("migrate", source.path, f"unix:{tmp_path}/mig", "--set", "max-bandwidth=1M"),
                    *("--destination", destination.path),
                )
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert watcher.stdout is not None
        for line in watcher.stdout:
            if b" active " in line:
                break
        watcher.send_signal(signal.SIGINT)
        assert b"goes on" in watcher.stdout.read()
        assert watcher.wait(TIMEOUT_S) == 130
        end(watcher)
        with source.client() as client:
            assert client.execute("query-migrate")["status"] == "active"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/does/not/exist", "unix:x"), ["No such file", "try:"]),
        (("tcp:127.0.0.1:1", "unix:x"), ["127.0.0.1:1", "refused"]),
    ],
)
def test_nobody_to_talk_to(arguments: tuple[str, ...], words: list[str]) -> None:
    done = run_postcopy("migrate", *arguments)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("unix:/does/not/exist",), "connect"),
        (("pigeon:x",), "protocol"),
        (("unix:x", "--capability", "teleport"), "teleport"),
        (("unix:x", "--set", "max-bandwidth=fast"), "max-bandwidth"),
        (("unix:x", "--set", "nonsense"), "NAME=VALUE"),
    ],
)
def test_refusals_are_passed_on(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    with RunningVM(tmp_path, "src", "-m", "16M") as source:
        done = run_postcopy("migrate", source.path, *options)
        assert done.returncode == 1
        assert words in done.stderr
        with source.client() as client:
            assert client.execute("query-status")["running"] is True


@pytest.mark.interop
@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_a_stock_qemu_to_a_stock_qemu(tmp_path: Path, postcopy: bool) -> None:
    binary = require_qemu()
    ram = pattern(512)
    monitors = [f"{tmp_path}/{name}.qmp" for name in ("src", "dst")]
    extra = [("-qmp", f"unix:{path},server=on,wait=off") for path in monitors]
    with (
        Qemu(binary, load={0: ram}, args=extra[0]),
        Qemu(binary, incoming="defer", args=extra[1]) as destination,
    ):
        done = run_postcopy(
            *("migrate", monitors[0], f"unix:{tmp_path}/mig", "--json"),
            *("--destination", monitors[1]),
            *(("--postcopy-after", "0") if postcopy else ()),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert objects(done.stdout)[-1]["migration"]["status"] == "completed"
        assert destination.ram()[: len(ram)] == ram


@pytest.mark.interop
@pytest.mark.parametrize("ours", ["source", "destination"])
def test_ours_and_a_stock_qemu(tmp_path: Path, ours: str) -> None:
    """RAM only: ``-M none`` on both sides."""
    binary = require_qemu()
    shape = ("-M", "none", "-m", "2M", "--smp", "0")
    stock = f"{tmp_path}/stock.qmp"
    extra = ("-qmp", f"unix:{stock},server=on,wait=off")
    incoming = None if ours == "source" else "defer"
    theirs = "defer" if ours == "source" else None
    options = ("--incoming", "defer") if incoming else ()
    with (
        RunningVM(tmp_path, "ours", *shape, *options) as vm,
        Qemu(binary, incoming=theirs, args=extra),
    ):
        pair = (vm.path, stock) if ours == "source" else (stock, vm.path)
        done = run_postcopy(
            *("migrate", pair[0], f"unix:{tmp_path}/mig", "--destination", pair[1]),
            *("--postcopy-after", "0", "--json"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert objects(done.stdout)[-1]["migration"]["status"] == "completed"


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
def test_over_several_connections(tmp_path: Path, postcopy: bool) -> None:
    """How many is said once and holds at both ends."""
    after = ("--postcopy-after", "0.2") if postcopy else ()
    with (
        RunningVM(tmp_path, "src", *SHAPE, "--rate", "5000") as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--json", *after),
            *("--capability", "multifd", "--set", "multifd-channels=3"),
            *("--set", "downtime-limit=2000", "--destination", destination.path),
        )
        assert done.returncode == 0, done.stderr
        *_, last = objects(done.stdout)
        assert len(last["migration"]["x-postcopy"]["multifd-channel-bytes"]) == 3
        assert last["migration"]["ram"]["multifd-bytes"] > 1 << 20
        with destination.client() as client:
            client.execute("stop")
            assert client.execute("x-oracle-sweep")["errors"] == 0
