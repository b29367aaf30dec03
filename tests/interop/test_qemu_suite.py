"""Counterparts of QEMU's own migration tests, with us as source, as destination and as both.

docs/qemu-tests.md says which of theirs is which of ours, and where the others are.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.proxy import Proxy
from tests.support.roles import ROLES, Ends, Role, ends, ends_of, page_at
from tests.support.stream_elements import Phase
from tests.support.tamper import StallAt, command, page

__all__ = ["ends"]

pytestmark = [pytest.mark.interop, pytest.mark.kernel]

WITH_NEWEST = [role for role in ROLES if "installed" not in (role.source, role.target)]
FROM_US = [role for role in ROLES if role.source is None]
TO_US = [role for role in ROLES if role.target is None]


@pytest.mark.parametrize("transport", ["unix", "tcp", "tcp6", "fd"])
@pytest.mark.parametrize("role", WITH_NEWEST, ids=str)
def test_precopy_plain(role: Role, transport: str, tmp_path: Path) -> None:
    """/migration/precopy/{unix,tcp}/plain, fd/tcp: both ends of every two-way transport."""
    with ends_of(role) as both:
        if transport == "fd":
            for end, descriptor in zip(
                (both.source, both.target), socket.socketpair(), strict=True
            ):
                end.pass_socket("wire", descriptor)
                descriptor.close()
            both.begin("fd:wire")
        elif transport == "unix":
            both.begin(f"unix:{tmp_path}/m")
        else:
            host = "[::1]" if transport == "tcp6" else "127.0.0.1"
            for end in (both.source, both.target):
                end.switch_on("return-path")
            both.target.execute("migrate-incoming", uri=f"tcp:{host}:0")
            [address] = both.target.execute("query-migrate")["socket-address"]
            assert address["type"] == "inet"
            both.source.execute("migrate", uri=f"tcp:{host}:{address['port']}")
        both.assert_completed()


@pytest.mark.parametrize("way", ["exec", "file", "file-offset"])
@pytest.mark.parametrize("role", WITH_NEWEST, ids=str)
def test_precopy_into_a_file(role: Role, way: str, tmp_path: Path) -> None:
    """/migration/precopy/file, file/offset, exec: nobody answers, and the file loads."""
    file = tmp_path / "vm"
    before = b"somebody else's" * 100
    offset = 1 << 16
    with ends_of(role) as both:
        if way != "exec" and any(
            e.version and e.version < (8, 2) for e in (both.source, both.target)
        ):
            pytest.skip("file: came with QEMU 8.2; this host has an older one only")
        if way == "file-offset":
            file.write_bytes(before)
        out, back = {
            "exec": (f"exec:cat >{file}", f"exec:cat {file}"),
            "file": (f"file:{file}", f"file:{file}"),
            "file-offset": (f"file:{file},offset={offset:#x}",) * 2,
        }[way]
        for end in (both.source, both.target):
            end.switch_on()
        both.source.execute("migrate", uri=out)
        both.source.wait("completed")
        if way == "file-offset":
            assert file.read_bytes()[: len(before)] == before
        both.listen(back)
        both.assert_completed()


@pytest.mark.parametrize("role", FROM_US, ids=str)
def test_a_bad_file_offset(role: Role, tmp_path: Path) -> None:
    """/migration/precopy/file/offset/bad: refused, the guest runs on."""
    with ends_of(role) as both, pytest.raises(AssertionError, match="offset"):
        both.source.execute("migrate", uri=f"file:{tmp_path}/vm,offset=0x20M")


def test_postcopy_plain(ends: Ends, tmp_path: Path) -> None:
    """/migration/postcopy/plain: asked-for pages come, the rest behind; blocktime can be read."""
    uri = f"unix:{tmp_path}/m"
    ends.target.switch_on("postcopy-blocktime")
    ends.source.set(max_bandwidth=100_000, max_postcopy_bandwidth=200_000)
    ends.begin(uri, "postcopy-ram")
    ends.source.execute("migrate-start-postcopy")
    ends.target.wait("postcopy-active")
    for index in (600, 33, 699):
        offset, wanted = page_at(index)
        assert ends.target.read(offset, len(wanted)) == wanted
    if ends.source.version is None:
        ends.source.wait("postcopy-active")  # the target says so already before RUN
        with pytest.raises(AssertionError, match="too late to cancel"):
            ends.source.execute("migrate_cancel")
    if ends.target.version is None:  # a QEMU leaves it out where there is no vCPU
        assert "postcopy-blocktime" in ends.target.execute("query-migrate")
    ends.source.set(max_postcopy_bandwidth=0)
    ends.assert_completed()
    assert ends.source.execute("query-migrate")["ram"]["postcopy-requests"] > 0
    if ends.target.version is None:
        assert ends.target.execute("query-migrate")["x-postcopy"]["last-word-us"] > 0


def test_urgent_pages_do_not_wait(ends: Ends, tmp_path: Path) -> None:
    """/migration/postcopy/preempt/plain, and its point: the main channel stands still in the middle
    of a page, and what is asked for comes all the same. A source of 7.2 has one thread for both."""
    uri = f"unix:{tmp_path}/m"
    stall = StallAt(page(Phase.POSTCOPY), nth=3, after=100)
    with Proxy(uri, stall) as proxy:
        if ends.source.version is None:
            early = ends.target.preempts_early
            ends.source.set(x_preempt_pre_7_2=early, x_checksum=False)
        ends.source.set(max_bandwidth=100_000)
        ends.begin(uri, "postcopy-ram", "postcopy-preempt", connect=proxy.uri)
        ends.source.execute("migrate-start-postcopy")
        assert stall.struck.wait(60)
        ends.target.wait("postcopy-active")
        if ends.source.preempts_early:
            stall.go_on()
        for index in (650, 333, 698):
            offset, wanted = page_at(index)
            assert ends.target.read(offset, len(wanted)) == wanted
        stall.go_on()
        ends.assert_completed()
        main, urgent = proxy.at_accept
        assert main == []
        is_early = ends.source.preempts_early or ends.target.preempts_early
        # Later: the first PONG was waited for. Early: a destination of 7.2 reads nothing before.
        if ends.source.version is None:
            assert ("PONG" in urgent) is not is_early
    ended_by_eos = (0x10).to_bytes(8, "big")
    assert [tail == ended_by_eos for tail in proxy.tails] == [is_early]


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_recovery(ends: Ends, preempt: bool, tmp_path: Path) -> None:
    """/migration/postcopy/recovery/plain, preempt/recovery/plain: cut by either side in turn, a
    page is waited for over the cut, and it goes on over a new socket, twice."""
    if ends.source.version is None:
        ends.source.set(x_preempt_pre_7_2=preempt and ends.target.preempts_early)
    ends.source.set(max_bandwidth=100_000, max_postcopy_bandwidth=50_000)
    extra = ["postcopy-preempt"] if preempt else []
    ends.begin(f"unix:{tmp_path}/m", "postcopy-ram", *extra)
    ends.source.execute("migrate-start-postcopy")
    for end in (ends.source, ends.target):
        end.wait("postcopy-active")
    while ends.target.run_state != "running":
        pass
    for round_, cutter in enumerate((ends.source, ends.target), start=1):
        cutter.execute("migrate-pause")
        for end in (ends.source, ends.target):
            end.wait("postcopy-paused", round_)
        assert ends.source.run_state == "finish-migrate"
        again = ends.listen(f"unix:{tmp_path}/r{round_}", recovery=True)
        ends.source.execute("migrate", uri=again, resume=True)
        for end in (ends.source, ends.target):
            end.wait("postcopy-active", round_ + 1)
        offset, wanted = page_at(100 * round_)
        assert ends.target.read(offset, len(wanted)) == wanted
    ends.source.set(max_postcopy_bandwidth=0)
    ends.assert_completed()


@pytest.mark.parametrize("status", ["active", "pre-switchover"])
def test_cancel(ends: Ends, status: str, tmp_path: Path) -> None:
    """/migration/cancel/src/after/STATUS: the source's guest goes on, and the next one works."""
    ends.source.set(max_bandwidth=100_000 if status == "active" else 0, downtime_limit=1)
    capabilities = ["pause-before-switchover"] if status == "pre-switchover" else []
    ends.source.switch_on("return-path", *capabilities)
    ends.target.switch_on("return-path")
    ends.source.execute("migrate", uri=ends.listen(f"unix:{tmp_path}/m"))
    ends.source.wait(status)
    ends.source.execute("migrate_cancel")
    ends.source.wait("cancelled")
    if status == "pre-switchover" and ends.source.version is not None:
        while ends.source.run_state != "running":
            pass
    assert ends.source.run_state == "running"
    ends.source.set(max_bandwidth=0, downtime_limit=2000)
    ends.source.execute(
        "migrate-set-capabilities",
        capabilities=[{"capability": "pause-before-switchover", "state": False}],
    )
    with ends_of(Role(None, None)) as others:
        # Any destination will do: what matters is that the source can.
        others.target.switch_on("return-path")
        again = others.listen(f"unix:{tmp_path}/again")
        ends.source.execute("migrate", uri=again)
        ends.source.wait("completed")
        others.target.wait("completed")
        offset, wanted = page_at(321)
        assert others.target.read(offset, len(wanted)) == wanted


@pytest.mark.parametrize("role", FROM_US, ids=str)
def test_cancel_in_setup_and_while_devices_go(role: Role, tmp_path: Path) -> None:
    """/migration/cancel/src/after/{setup,device}: the stream stands still there, the guest does
    not."""
    for name in ("PING", "PACKAGED"):
        uri = f"unix:{tmp_path}/{name}"
        stall = StallAt(command(name), after=0)
        with ends_of(role) as both, Proxy(uri, stall) as proxy:
            both.source.set(max_bandwidth=100_000)
            both.begin(uri, "postcopy-ram", connect=proxy.uri)
            both.source.execute("migrate-start-postcopy")
            assert stall.struck.wait(60)
            if both.target.version is None or name == "PING":
                both.source.execute("migrate_cancel")
                both.source.wait("cancelled")
                assert both.source.run_state == "running"
            else:
                # Towards a stock QEMU the first byte of the package gives the guest away.
                with pytest.raises(AssertionError, match="too late"):
                    both.source.execute("migrate_cancel")
                assert both.source.run_state == "finish-migrate"
            stall.go_on()


@pytest.mark.parametrize("role", FROM_US, ids=str)
def test_yank(role: Role, tmp_path: Path) -> None:
    """A precopy whose connection is yanked fails; the guest runs on."""
    with ends_of(role) as both:
        both.source.set(max_bandwidth=100_000)
        both.begin(f"unix:{tmp_path}/m")
        both.source.wait("active")
        assert both.source.execute("query-yank") == [{"type": "migration"}]
        both.source.execute("yank", instances=[{"type": "migration"}])
        both.source.wait("failed")
        assert both.source.run_state == "running"
        assert both.source.execute("query-yank") == []


@pytest.mark.parametrize("role", [Role(None, None)], ids=str)
def test_uri_and_channels(role: Role, tmp_path: Path) -> None:
    """/migration/validate_uri/channels/{both_set,none_set}: refused before anything begins."""
    address = {"transport": "socket", "type": "unix", "path": f"{tmp_path}/m"}
    channels = [{"channel-type": "main", "addr": address}]
    with ends_of(role) as both:
        for end, name in ((both.source, "migrate"), (both.target, "migrate-incoming")):
            for arguments in ({}, {"uri": f"unix:{tmp_path}/m", "channels": channels}):
                with pytest.raises(AssertionError, match="either 'uri' or 'channels'"):
                    end.execute(name, **arguments)
            assert end.status == "none"
        both.target.switch_on("return-path")
        both.source.switch_on("return-path")
        both.target.execute("migrate-incoming", channels=channels)
        both.source.execute("migrate", channels=channels)
        both.assert_completed()


@pytest.mark.parametrize("role", [Role(None, None)], ids=str)
def test_bad_destination(role: Role, tmp_path: Path) -> None:
    """/migration/bad_dest: nobody listens; the source is unharmed."""
    with ends_of(role) as both:
        for uri in ("tcp:127.0.0.1:1", f"unix:{tmp_path}/nobody"):
            with pytest.raises(AssertionError, match="Failed to connect"):
                both.source.execute("migrate", uri=uri)
        assert both.source.run_state == "running"
        both.begin(f"unix:{tmp_path}/m")
        both.assert_completed()
