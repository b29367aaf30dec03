"""``postcopy demo`` on the real kernel: all kinds of memory, transport, vCPU; how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.guestmem_memory import more_hugepages
from tests.support.monitor_process import ROOT, TIMEOUT_S, postcopy_argv, run_postcopy
from tests.support.need import need
from tests.support.process import end, tied_to_us

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]
FIELDS = {
    "result",
    "kernel",
    "backing",
    "transport",
    "vcpus",
    "vcpu_backend",
    "ram_bytes",
    "downtime_ms",
    "total_ms",
    "page_requests",
    "requests_during_device_load",
    "duplicate_requests",
    "dirty_tracker",
    "collapse",
    "pages_copied",
    "pages_zero",
    "multifd_bytes",
    "fault_latency_us",
    "oracle",
}


def final_object(stdout: str) -> dict[str, Any]:
    """The last line of stdout."""
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return result


def assert_ok(options: tuple[str, ...]) -> dict[str, Any]:
    done = run_postcopy("demo", "--json", "-m", "64M", "--postcopy-after", "0.2", *options)
    assert done.returncode == 0, done.stderr
    result = final_object(done.stdout)
    assert set(result) == FIELDS
    assert result["result"] == "ok"
    assert result["oracle"] == {"pages_checked": 16384, "errors": 0}
    assert result["ram_bytes"] == 64 << 20
    assert result["pages_copied"] + result["pages_zero"] >= 16384
    assert result["requests_during_device_load"] >= 1  # the ring device walks guest RAM
    assert result["page_requests"] >= result["requests_during_device_load"]
    assert result["downtime_ms"] > 0
    return result


@pytest.mark.parametrize(
    "options",
    [
        ("--backing", "anon", "--transport", "unix"),
        ("--backing", "memfd", "--transport", "tcp", "--smp", "4"),
        ("--checksum", "off", "--workload", "chase", "--working-set", "16M"),
        ("--workload", "zipf", "--smp", "4", "--postcopy-after", "0"),
    ],
    ids=lambda options: "-".join(word.strip("-") for word in options),
)
def test_a_live_postcopy_migration(options: tuple[str, ...]) -> None:
    result = assert_ok(options)
    assert result["fault_latency_us"]["max"] >= result["fault_latency_us"]["p50"]


def test_on_hugepages(tmp_path: Path) -> None:
    with more_hugepages(64, tmp_path / "journal"):
        assert_ok(("--backing", "hugetlb"))


def test_with_kvm_vcpus() -> None:
    need(os.access("/dev/kvm", os.R_OK | os.W_OK), "no usable /dev/kvm on this host")
    assert assert_ok(("--vcpu", "kvm"))["vcpu_backend"] == "kvm"


def test_precopy_over_several_connections() -> None:
    """--multifd: what went before the switch went over them."""
    result = assert_ok(("--multifd", "3", "--postcopy-after", "0.5"))
    assert result["multifd_bytes"] > 1 << 20


def test_small_pages_made_huge_and_a_policy_of_ones_own() -> None:
    policy = ROOT / "docs" / "examples" / "policy.py"
    result = assert_ok(
        (
            *("--backing", "memfd", "--collapse", "--policy", f"{policy}:Neighbours"),
            *("--dirty-tracker", "wp-sync", "--workload", "zipf"),
        )
    )
    assert result["dirty_tracker"] == "wp-sync"
    assert result["collapse"]["state"] in ("done", "unsupported")


def test_a_policy_that_is_none_is_said_at_once() -> None:
    done = run_postcopy("demo", "-m", "32M", "--policy", "collections:OrderedDict")
    assert done.returncode == 1
    assert "neither 'decide' nor 'next_pages'" in done.stdout


def test_the_text_for_people() -> None:
    done = run_postcopy("demo", "-m", "32M", "--postcopy-after", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "guest at the destination" in done.stdout
    assert "OK: all 8,192 pages are what the guest wrote" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_without_hugepages_it_says_so_at_once() -> None:
    done = run_postcopy("demo", "--backing", "hugetlb", "-m", "1024G")
    assert done.returncode == 1
    assert "huge pages" in done.stderr
    assert "reserve" in done.stderr


@contextmanager
def running_demo(tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A demo that stays in precopy: little bandwidth would do, a far switchover does it too."""
    argv = postcopy_argv("demo", "--json", "-m", "128M", "--postcopy-after", "100", *options)
    demo = subprocess.Popen(
        tied_to_us(argv),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        yield demo
    finally:
        end(demo)


def wait_for_migration(demo: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Both VMs, once the migration is under way."""
    assert demo.stderr is not None
    for line in demo.stderr:
        if b" active " in line:
            break
    children = psutil.Process(demo.pid).children()
    assert len(children) == 2
    return children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with running_demo(tmp_path) as demo:
        children = wait_for_migration(demo)
        assert list(tmp_path.iterdir())
        demo.send_signal(number)
        assert demo.wait(TIMEOUT_S) == 130
    assert psutil.wait_procs(children, timeout=TIMEOUT_S)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_killed_its_vms_end_with_it(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        children = wait_for_migration(demo)
        demo.kill()
        assert psutil.wait_procs(children, timeout=TIMEOUT_S)[1] == []


@pytest.mark.parametrize("victim", ["source", "destination"])
def test_a_vm_that_dies_fails_it(tmp_path: Path, victim: str) -> None:
    """Before the switchover the guest survives at the source; without a source it is lost."""
    with running_demo(tmp_path) as demo:
        for child in wait_for_migration(demo):
            if victim in child.cmdline():
                child.kill()
        assert demo.stdout is not None
        result = final_object(demo.stdout.read().decode())
        assert demo.wait(TIMEOUT_S) == 1
    assert result["result"] == "failed"
    assert any(victim in reason for reason in result["failures"])
    assert list(tmp_path.iterdir()) == []
