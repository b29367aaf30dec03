"""``postcopy probe`` as its users run it: exit status, JSON lines, and what it says when masked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.need import need
from tests.support.probe_filters import is_supported
from uffd import UffdError, Userfaultfd

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

Record = dict[str, Any]
PROBE = (sys.executable, "-m", "migration", "probe")
ROW_KEYS = {
    *("record", "row", "title", "tier", "group", "status"),
    *("detail", "cause", "reason", "remedy", "since", "need"),
}
TIERS = {"required", "hugepages", "shared-memory", "kvm", "optional"}
CAUSES = {
    *("permission", "restriction", "kernel", "setting", "resource", "hardware", "design"),
    *("prerequisite", "unexpected", "lost"),
}


def call(argv: Sequence[str], *, code: int) -> subprocess.CompletedProcess[str]:
    """Run it; its exit status is checked."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def probe(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return call([*PROBE, *words], code=code)


def filtered(how: str, *words: str, code: int) -> subprocess.CompletedProcess[str]:
    """Under a seccomp filter, as a container would have it."""
    need(is_supported(), "no system call numbers for this machine here")
    return call([sys.executable, "-m", "tests.support.probe_filters", how, *words], code=code)


def records(done: subprocess.CompletedProcess[str]) -> list[Record]:
    """One object a line, nothing else on stdout."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, Record]:
    return {one["row"]: one for one in records(done) if one["record"] == "row"}


def need_userfaultfd() -> None:
    try:
        Userfaultfd.open().close()
    except UffdError as error:
        need(False, str(error), remedy="sudo -E python -m pytest")


def need_root() -> None:
    need(os.geteuid() == 0, "this takes root", remedy="sudo -E python -m pytest")


def test_ready_is_0_and_json_is_a_host_rows_and_a_verdict() -> None:
    """The schema, of everything there is."""
    need_userfaultfd()
    found = records(probe("--json"))
    host, *middle, verdict = found
    assert host["record"] == "host"
    assert host["kernel"] == os.uname().release
    assert host["uid"] == os.geteuid()
    assert len(middle) > 100
    for row in middle:
        assert row.keys() == ROW_KEYS
        assert row["record"] == "row"
        assert row["tier"] in TIERS
        assert row["status"] in ("yes", "no", "untested")
        assert (row["status"] == "yes") == (row["cause"] is None) == (row["reason"] is None)
        assert row["cause"] is None or row["cause"] in CAUSES
        assert row["reason"] is None or row["reason"].startswith(f"{row['cause']}: ")
        assert row["need"] in ("required", "wanted", None)
    assert verdict["record"] == "verdict"
    assert verdict["ready"] is True
    assert verdict["missing"] == []
    assert verdict["for"] == "postcopy"
    assert sum(verdict["counts"].values()) == len(middle)
    assert verdict["purposes"]["postcopy"] == []


def test_text_begins_with_the_verdict_and_goes_to_stdout() -> None:
    need_userfaultfd()
    done = probe()
    assert done.stderr == ""
    assert "Ready for postcopy migration of toy VMs." in done.stdout.splitlines()[3]
    assert "Every operation on every kind of memory:" in done.stdout
    assert "\x1b[" not in done.stdout  # a pipe is no terminal


def test_a_purpose_that_lacks_something_is_1() -> None:
    """A filter takes both system call and, as nobody, the device away."""
    need_root()
    done = filtered(
        "userfaultfd=EPERM", "--as", "nobody", "--for", "unprivileged", "--json", code=1
    )
    found = rows(done)
    assert found["open-user-mode"]["reason"] == (
        "restriction: a system call filter (seccomp) forbids userfaultfd(2)"
    )
    assert "seccomp=PROFILE" in found["open-user-mode"]["remedy"]
    assert found["copy-anon"]["status"] == "untested"
    assert found["copy-anon"]["cause"] == "prerequisite"
    verdict = records(done)[-1]
    assert verdict["ready"] is False
    assert "open-user-mode" in verdict["missing"]


def test_a_filter_that_says_enosys_is_told_from_an_old_kernel() -> None:
    """Newer container runtimes answer so."""
    done = filtered("userfaultfd=ENOSYS", "--feature", "open-syscall", "--json", code=1)
    reason = rows(done)["open-syscall"]["reason"]
    assert reason == "restriction: a filter answers ENOSYS to userfaultfd(2)"


def test_a_filter_that_kills_loses_only_the_rows_it_hits() -> None:
    """Whoever makes a memory file dies; the rest goes on."""
    need_userfaultfd()
    done = filtered("memfd_create=kill", "--for", "shared-memory", "--json", code=1)
    found = rows(done)
    assert found["copy-shmem"]["status"] == "untested"
    assert found["copy-shmem"]["reason"] == (
        "restriction: a system call filter (seccomp) killed the check"
    )
    assert found["open"]["status"] == "yes"


def test_a_filter_on_another_call_is_named() -> None:
    done = filtered("process_madvise=EPERM", "--feature", "system-calls", "--json", code=1)
    row = rows(done)["system-calls"]
    assert row["cause"] == "restriction"
    assert "process_madvise (EPERM)" in row["reason"]


def test_a_dev_without_the_device_names_the_node_to_make(tmp_path: Path) -> None:
    """As in a container: the kernel has it, /dev does not."""
    need_root()
    need(shutil.which("unshare"), "no unshare(1)", remedy="apt-get install util-linux")
    need("userfaultfd" in Path("/proc/misc").read_text(), "no /dev/userfaultfd in this kernel")
    for name, minor in (("null", 3), ("zero", 5), ("urandom", 9)):
        os.mknod(tmp_path / name, 0o666 | 0o020000, os.makedev(1, minor))
    script = 'mount --bind "$0" /dev && exec "$@"'
    words = ("--feature", "open-device", "--feature", "open", "--feature", "kvm", "--json")
    unshare = ("unshare", "--mount", "sh", "-c", script, str(tmp_path))
    found = rows(call([*unshare, *PROBE, *words], code=1))
    device = found["open-device"]
    assert device["reason"] == (
        "restriction: the kernel has the device, but there is no /dev/userfaultfd here"
    )
    assert "userfaultfd" in device["remedy"]
    assert found["open"]["status"] == "yes"  # the system call is another way
    assert found["kvm"]["status"] == "no"


def test_an_unreadable_device_names_user_mode_and_command() -> None:
    """Nobody is told whose file it is, and how to be let in."""
    need_root()
    done = call([*PROBE, "--as", "nobody", "--feature", "open-device", "--json"], code=1)
    row = rows(done)["open-device"]
    assert row["cause"] == "permission"
    assert "this is nobody" in row["reason"]
    assert "nobody" in row["remedy"]
    assert "(as root)" in row["remedy"]


def test_nobody_is_ready_for_what_needs_no_rights() -> None:
    """And the letter says what root would add."""
    need_root()
    assert records(probe("--as", "nobody", "--for", "unprivileged", "--json"))[-1]["ready"]
    text = probe("--as", "nobody").stdout
    assert "asked as nobody" in text
    assert "What root would add:" in text


def test_the_whole_command_as_nobody() -> None:
    """Started by that very user, not only asked for it."""
    need_root()
    need(shutil.which("setpriv"), "no setpriv(1)", remedy="apt-get install util-linux")
    drop = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c")
    can = [*drop, f"exec {sys.executable} -c 'import uffd'"]
    need(
        subprocess.run(can, capture_output=True, check=False).returncode == 0,
        "this interpreter lies where nobody may not read",
    )
    found = call([*drop, f"exec {' '.join(PROBE)} --for unprivileged --json"], code=0)
    assert records(found)[0]["uid"] == 65534


def test_feature_is_for_scripts() -> None:
    """0 yes, 1 no, and no word with -q."""
    need_userfaultfd()
    assert probe("--feature", "COPY-ANON", "-q").stdout == ""
    assert probe("--feature", "zeropage-file-private", "-q", code=1).stdout == ""
    both = probe("--feature", "copy-anon", "--feature", "zeropage-file-private", code=1)
    heads = [line for line in both.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in heads] == ["yes", "no"]
    assert set(rows(probe("--feature", "open", "--feature", "Handshake", "--json"))) == {
        "open",
        "handshake",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--feature", "wpasync"), "feature-wp-async"),
        (("--feature", "%%"), "postcopy probe --list"),
        (("--for", "nothing"), "invalid choice"),
        (("--for", "kvm", "--feature", "open"), "not allowed with"),
        (("--timeout", "0"), "no time between"),
        (("--as", "no-such-user-here"), "there is no user"),
    ],
)
def test_wrong_use_is_2_and_says_what_is_right(words: tuple[str, ...], says: str) -> None:
    done = probe(*words, code=2)
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_list_names_every_row_and_asks_nothing() -> None:
    names = [line.split()[0] for line in probe("--list").stdout.splitlines()]
    listed = [one["row"] for one in records(probe("--list", "--json"))]
    assert names == listed
    assert {"open", "copy-anon", "kvm-fault", "feature-wp-async"} <= set(names)


def test_it_works_from_anywhere(tmp_path: Path) -> None:
    """The child finds the package wherever the command was started."""
    need_userfaultfd()
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*PROBE, "--feature", "open", "-q"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
