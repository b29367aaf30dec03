"""Multifd with a stock QEMU at one end: its format of 7.2, and the one of 9.0 and later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.qemu import PAGE_BYTES
from tests.support.roles import RAM_BYTES, ROLES, Ends, OurEnd, Role, ends_of, page_at
from tests.support.steps import Steps

pytestmark = [pytest.mark.interop, pytest.mark.kernel]

ZERO_DETECTION = ["none", "legacy", "multifd"]


@contextlib.contextmanager
def multifd_ends(role: Role, channels: int = 2) -> Iterator[Ends]:
    """Both ends with the capability; our source in the manner of its destination."""
    with ends_of(role) as both:
        for end in (both.source, both.target):
            end.switch_on("multifd")
            end.set(multifd_channels=channels)
        if both.source.version is None and both.target.version is not None:
            both.source.set(x_multifd_flush_after_each_section=both.target.version < (8, 1))
        yield both


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("channels", [1, 2, 7])
@pytest.mark.parametrize("role", ROLES, ids=str)
def test_plain(role: Role, channels: int, transport: str, tmp_path: Path) -> None:
    """/migration/multifd/{unix,tcp/uri}/plain/none."""
    with multifd_ends(role, channels) as both:
        if transport == "unix":
            both.begin(f"unix:{tmp_path}/m")
        else:
            for end in (both.source, both.target):
                end.switch_on("return-path")
            both.target.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
            [address] = both.target.execute("query-migrate")["socket-address"]
            both.source.execute("migrate", uri=f"tcp:127.0.0.1:{address['port']}")
        both.assert_completed()
        ram = both.source.execute("query-migrate")["ram"]
        assert ram["multifd-bytes"] > ram["normal"] * PAGE_BYTES > 0


@pytest.mark.parametrize("how", ZERO_DETECTION)
@pytest.mark.parametrize("role", ROLES, ids=str)
def test_zero_pages(role: Role, how: str, tmp_path: Path) -> None:
    """/migration/multifd/tcp/plain/zero-page/{legacy,none}: by record, in packets, as data."""
    with multifd_ends(role) as both:
        if both.source.version is None or both.source.version >= (9, 0):
            both.source.set(zero_page_detection=how)
        elif how != "legacy":
            pytest.skip("the source is older than zero-page-detection")
        both.begin(f"unix:{tmp_path}/m")
        both.assert_completed()
        ram = both.source.execute("query-migrate")["ram"]
        assert (ram["duplicate"] == 0) is (how == "none")


@pytest.mark.parametrize("role", [role for role in ROLES if role.source is None], ids=str)
def test_pages_that_turn_zero(role: Role, tmp_path: Path) -> None:
    """Pages that went out as data are zero in the next pass, and data again; towards a stock QEMU
    of whatever version none of that may be lost."""
    steps = Steps()
    with multifd_ends(role, channels=3) as both:
        assert isinstance(both.source, OurEnd)
        both.source.side.service.policy = steps
        block = both.source.side.machine.ram.by_idstr("ram")
        both.begin(f"unix:{tmp_path}/m")
        for number in range(1, 7):
            steps.wait()
            data = bytes([number]) * PAGE_BYTES if number % 2 else bytes(PAGE_BYTES)
            for index in range(number, RAM_BYTES // PAGE_BYTES, 3):
                block.write(index * PAGE_BYTES, data)
            if number < 6:
                steps.go_on()
        expected = block.read(0, RAM_BYTES)
        steps.finish()
        both.source.wait("completed")
        both.target.wait("completed")
        assert both.target.read(0, RAM_BYTES) == expected


@pytest.mark.parametrize("role", ROLES, ids=str)
def test_cancel_and_again(role: Role, tmp_path: Path) -> None:
    """/migration/multifd/tcp/plain/cancel: the source goes on, and migrates to somebody else."""
    with multifd_ends(role) as both:
        both.source.set(max_bandwidth=100_000, downtime_limit=1)
        both.begin(f"unix:{tmp_path}/m")
        both.source.wait("active")
        both.source.execute("migrate_cancel")
        both.source.wait("cancelled")
        both.source.set(max_bandwidth=0, downtime_limit=2000)
        with ends_of(Role(None, None)) as others:
            others.target.switch_on("return-path", "multifd")
            others.target.set(multifd_channels=2)
            both.source.execute("migrate", uri=others.listen(f"unix:{tmp_path}/again"))
            both.source.wait("completed")
            others.target.wait("completed")
            offset, wanted = page_at(321)
            assert others.target.read(offset, len(wanted)) == wanted


def test_the_new_manner_towards_an_old_qemu(tmp_path: Path) -> None:
    """A QEMU of 7.2 ends at the flush in the block list; our guest runs on."""
    with multifd_ends(Role(None, "installed")) as both:
        if both.target.version is None or both.target.version >= (8, 1):
            pytest.skip("the installed QEMU knows the flush")
        both.source.set(x_multifd_flush_after_each_section=False)
        both.begin(f"unix:{tmp_path}/m")
        both.source.wait("failed")
        assert both.source.run_state == "running"
