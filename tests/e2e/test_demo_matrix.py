"""``postcopy demo`` over every kind of memory, vCPU, transport and number of vCPUs: oracle clean.
And without privileges.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.guestmem_memory import more_hugepages
from tests.support.monitor_process import ROOT, TIMEOUT_S
from tests.support.need import need

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

RAM_BYTES = 16 << 20
PAGES = RAM_BYTES >> 12
HUGEPAGES = 2 * (RAM_BYTES >> 21) + 2
AXES = (("anon", "memfd", "hugetlb"), ("thread", "kvm"), ("unix", "tcp"), (1, 4))
Case = tuple[Any, ...]
CASES: tuple[Case, ...] = tuple(product(*AXES))
FIELDS = {
    "result": str,
    "kernel": str,
    "backing": str,
    "transport": str,
    "vcpus": int,
    "vcpu_backend": str,
    "ram_bytes": int,
    "downtime_ms": float,
    "total_ms": int,
    "page_requests": int,
    "requests_during_device_load": int,
    "duplicate_requests": int,
    "dirty_tracker": str,
    "collapse": type(None),
    "multifd_bytes": int,
    "pages_copied": int,
    "pages_zero": int,
    "fault_latency_us": dict,
    "oracle": dict,
}


def run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """To its end; our packages are found by whatever interpreter it is."""
    places = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    return subprocess.run(
        argv,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(places),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )


def demo(*options: str, python: Sequence[str] = (sys.executable,)) -> tuple[int, str, str]:
    """Run the demo to its end: status, stdout, stderr."""
    done = run([*python, "-m", "migration", "demo", "--json", "-m", "16M", *options])
    return done.returncode, done.stdout, done.stderr


def check(stdout: str, case: Case) -> None:
    """One object on stdout, its fields present and of their kind, and what they say possible."""
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    assert {name: type(value) for name, value in result.items()} == FIELDS, result
    named = ("backing", "vcpu_backend", "transport", "vcpus")
    assert tuple(result[name] for name in named) == case
    assert result["result"] == "ok"
    assert result["kernel"] == os.uname().release
    assert result["ram_bytes"] == RAM_BYTES
    assert result["oracle"] == {"pages_checked": PAGES, "errors": 0}
    # Every page came at least once; what the guest wrote during precopy, again.
    assert result["pages_copied"] + result["pages_zero"] >= PAGES
    assert result["pages_copied"] > 0
    assert 0 < result["downtime_ms"] <= result["total_ms"] + 1
    assert 0 <= result["requests_during_device_load"] <= result["page_requests"]
    assert 0 <= result["duplicate_requests"] <= result["page_requests"]
    assert list(result["fault_latency_us"]) == ["p50", "p90", "p99", "max"]
    latencies = list(result["fault_latency_us"].values())
    assert latencies == sorted(latencies)
    # All zero when every page was there before a vCPU touched it.
    assert latencies[0] >= 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_oracle_clean(case: Case, tmp_path: Path) -> None:
    backing, vcpu, transport, smp = case
    need(vcpu == "thread" or os.access("/dev/kvm", os.R_OK | os.W_OK), "no usable /dev/kvm here")
    options = ["--backing", backing, "--vcpu", vcpu, "--transport", transport, "--smp", str(smp)]
    options += ["--postcopy-after", "0.1"]
    if backing == "hugetlb":
        with more_hugepages(HUGEPAGES, tmp_path / "journal"):
            status, stdout, stderr = demo(*options)
    else:
        status, stdout, stderr = demo(*options)
    assert status == 0, stderr
    check(stdout, (backing, vcpu, transport, smp))


# -- without privileges ---------------------------------------------------------------------------


# Whoever may run this may also start another, as the demo does.
_CAN_RUN = (
    "import subprocess, sys, migration.native; subprocess.run([sys.executable, '-V'], check=1)"
)


def as_nobody() -> list[str]:
    """A Python without any privilege, group and capability: one that nobody may execute."""
    setpriv = shutil.which("setpriv")
    need(setpriv, "no setpriv", remedy="apt-get install util-linux")
    need(os.geteuid() == 0, "dropping privileges needs some", remedy="sudo -E python -m pytest")
    assert setpriv is not None
    ids = ("--reuid", "65534", "--regid", "65534", "--clear-groups")
    wrapper = [setpriv, *ids, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin")):
        if python and run([*wrapper, python, "-c", _CAN_RUN]).returncode == 0:
            return [*wrapper, python]
    need(
        False,
        f"no {version} that nobody may run: {ROOT} or the interpreter lies in private folders",
    )
    raise AssertionError


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_without_privileges(backing: str) -> None:
    """User-mode-only fault handling is open to everybody, and enough for thread vCPUs."""
    case = (backing, "thread", "unix", 2)
    options = ("--backing", backing, "--smp", "2", "--postcopy-after", "0.1")
    status, stdout, stderr = demo(*options, python=as_nobody())
    assert status == 0, stderr
    check(stdout, case)


def test_kvm_without_privileges_says_what_is_missing() -> None:
    """KVM's accesses are the kernel's: nobody may not serve those, and is told so before."""
    need(os.path.exists("/dev/kvm"), "no /dev/kvm here")
    status, stdout, stderr = demo("--vcpu", "kvm", python=as_nobody())
    assert status == 1
    assert "kvm" in (stdout + stderr).lower()
    assert "Traceback" not in stderr
