"""``postcopy migrate`` when the network breaks: paused, resumed, alarmed; ours and a stock QEMU."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from tests.support.proxy import Proxy
from tests.support.qemu import PAGE_BYTES, Qemu, QemuBinary, pattern, qemu_binary
from tests.support.qmp import QmpClient
from tests.support.tamper import CutAt, Tamper, message

__all__ = ["qemu_binary"]

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]
SHAPE = ("-m", "16M", "--smp", "2", "--rate", "2000")
BARE = ("-M", "none", "-m", "8M", "--smp", "0")
RAM_BYTES = 8 << 20
CONTENTS = pattern(RAM_BYTES // PAGE_BYTES, seed="recovery")


def objects(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


@dataclass
class Pair:
    """Two monitors, and a wire that can be cut between them.

    :ivar until_runs: returns once the guest runs at the destination.
    :ivar unlimited: lets the source push as fast as it can.
    """

    source: str
    destination: str
    proxy: Proxy
    listen: str
    until_runs: Callable[[], object]
    unlimited: Callable[[], object]

    def _argv(self, *options: str) -> tuple[str, ...]:
        return (
            *("migrate", self.source, self.proxy.uri, "--json", "--watch"),
            *("--destination", self.destination, "--listen", self.listen, *options),
        )

    def migrate(self, *options: str) -> Any:
        """``postcopy migrate`` through the wire."""
        return run_postcopy(*self._argv(*options))

    def migrate_and_cut(self, *options: str) -> tuple[int, str, str]:
        """The same; the wire is cut once the guest has moved. Status, stdout, stderr."""
        argv = postcopy_argv(*self._argv("--postcopy-after", "0", *SLOWLY, *options))
        process = subprocess.Popen(
            tied_to_us(argv), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            self.until_runs()
            self.proxy.cut()
            self.unlimited()
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            end(process)
        return process.returncode, stdout.decode(), stderr.decode()

    def assert_swept_clean(self) -> None:
        """The toy guest, stopped where it is now, has all of its memory."""
        with QmpClient(self.destination) as client:
            client.execute("stop")
            assert client.execute("x-oracle-sweep")["errors"] == 0


# Slow enough that nothing is over before it is cut.
SLOWLY = ("--set", "max-bandwidth=100K", "--set", "max-postcopy-bandwidth=100K")
PLAIN = ("--set", "x-checksum=off")  # the wire of the tests reads along


def set_unlimited(vm: RunningVM) -> None:
    with vm.client() as client:
        client.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})


@contextmanager
def ours(folder: Path, *tampers: Tamper) -> Iterator[Pair]:
    listen = f"unix:{folder}/mig"
    with (
        RunningVM(folder, "src", *SHAPE) as source,
        RunningVM(folder, "dst", *SHAPE, "--incoming", "defer") as destination,
        Proxy(listen, *tampers) as proxy,
    ):
        yield Pair(
            source.path,
            destination.path,
            proxy,
            listen,
            lambda: destination.wait_event("RESUME"),
            lambda: set_unlimited(source),
        )


def test_paused_and_resumed_by_hand(tmp_path: Path) -> None:
    with ours(tmp_path) as pair:
        status, stdout, stderr = pair.migrate_and_cut(*PLAIN)
        assert status == 3, stderr
        assert objects(stdout)[-1]["migration"]["status"] == "postcopy-paused"
        assert "--resume" in stderr
        again = pair.migrate("--resume")
        assert again.returncode == 0, again.stderr
        last = objects(again.stdout)[-1]
        assert last["run_states"] == {"source": "postmigrate", "destination": "running"}
        assert sum(last["destination"]["postcopy-latency-dist"]) > 0
        assert "faults p50" in again.stderr
        assert "vCPUs waited" in again.stderr
        pair.assert_swept_clean()


def test_resumes_by_itself(tmp_path: Path) -> None:
    """Cut in postcopy, and again in the recovery's handshake."""
    cut = CutAt(message("RECV_BITMAP"), after=2)
    with ours(tmp_path, cut) as pair:
        status, stdout, stderr = pair.migrate_and_cut("--retries", "5", *PLAIN)
        assert status == 0, stderr
        assert cut.hits == 1
        assert stderr.count("trying to go on") >= 2
        assert objects(stdout)[-1]["migration"]["status"] == "completed"
        pair.assert_swept_clean()


def test_a_guest_that_stood_does_not_run_there(tmp_path: Path) -> None:
    """RUN starts a guest whatever its state was; this command was asked to move it, not to start
    it."""
    with (
        RunningVM(tmp_path, "src", *SHAPE, "-S") as source,
        RunningVM(tmp_path, "dst", *SHAPE, "--incoming", "defer") as destination,
    ):
        done = run_postcopy(
            *("migrate", source.path, f"unix:{tmp_path}/mig", "--destination", destination.path),
            *("--postcopy-after", "0", "--set", "max-bandwidth=1M", "--json"),
        )
        assert done.returncode == 0, done.stderr
        assert "it was stopped at the destination" in objects(done.stdout)[-1]["note"]
        with destination.client() as client:
            assert client.execute("query-status")["status"] == "paused"
            assert client.execute("x-oracle-sweep")["errors"] == 0


def test_nothing_to_resume(tmp_path: Path) -> None:
    with RunningVM(tmp_path, "src", "-m", "16M") as source:
        done = run_postcopy("migrate", source.path, f"unix:{tmp_path}/x", "--resume")
        assert done.returncode == 1
        assert "no paused migration" in done.stderr


@contextmanager
def with_qemu(binary: QemuBinary, ours_is: str, folder: Path, *tampers: Tamper) -> Iterator[Pair]:
    """A RAM-only machine of ours and a stock QEMU's ``-M none``; the source's RAM has contents."""
    listen = f"unix:{folder}/mig"
    stock = f"{folder}/stock.qmp"
    args = ("-qmp", f"unix:{stock},server=on,wait=off")
    with ExitStack() as stack:
        options = ("--incoming", "defer") if ours_is == "destination" else ()
        vm = stack.enter_context(RunningVM(folder, "ours", *BARE, *options))
        qemu = stack.enter_context(
            Qemu(
                binary,
                ram_bytes=RAM_BYTES,
                incoming="defer" if ours_is == "source" else None,
                load={0: CONTENTS} if ours_is == "destination" else {},
                args=args,
            )
        )
        proxy = stack.enter_context(Proxy(listen, *tampers))
        if ours_is == "source":
            yield Pair(
                vm.path,
                stock,
                proxy,
                listen,
                lambda: qemu.qmp.wait_event("RESUME"),
                lambda: set_unlimited(vm),
            )
            return
        yield Pair(
            stock,
            vm.path,
            proxy,
            listen,
            lambda: vm.wait_event("RESUME"),
            lambda: qemu.set_parameters(max_postcopy_bandwidth=0),
        )


@pytest.mark.interop
@pytest.mark.parametrize("ours_is", ["source", "destination"])
def test_resumes_by_itself_with_a_stock_qemu(
    qemu_binary: QemuBinary, ours_is: str, tmp_path: Path
) -> None:
    """A cut in postcopy, one in the handshake of the recovery, in both roles. The second one is for
    9.1 and newer: before, the source waits for ever, and the destination crashes."""
    cut = CutAt(message("RECV_BITMAP"), after=2)
    cuts = [cut] if qemu_binary.version >= (9, 1) else []
    with with_qemu(qemu_binary, ours_is, tmp_path, *cuts) as pair:
        status, stdout, stderr = pair.migrate_and_cut("--retries", "10")
        assert status == 0, stderr
        assert cut.hits == len(cuts)
        assert objects(stdout)[-1]["run_states"]["destination"] == "running"


@pytest.mark.interop
def test_a_second_guest_is_stopped(qemu_binary: QemuBinary, tmp_path: Path) -> None:
    """The connection breaks under the destination's last word. A QEMU 10.0 then starts its guest
    again although it runs here: that is seen, and ended. A 7.2 waits for ever: that is said."""
    shut = CutAt(message("SHUT"), after=0)
    with with_qemu(qemu_binary, "destination", tmp_path, shut) as pair:
        done = pair.migrate("--postcopy-after", "0", "--set", "max-bandwidth=100K")
        assert shut.hits == 1
        last = objects(done.stdout)[-1]
        with QmpClient(pair.destination) as client:
            assert client.execute("query-status")["status"] == "running"
        if "alarm" in last:
            assert done.returncode == 4
            assert last["run_states"] == {"source": "running", "destination": "running"}
        else:
            assert done.returncode == 0, done.stderr
            assert last["run_states"]["source"] != "running"
            assert "never came" in last["note"]
        if qemu_binary.version >= (10, 0):
            assert "alarm" in last
