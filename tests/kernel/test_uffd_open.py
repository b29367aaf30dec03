"""Getting a context: three ways, the handshake, fds from other processes, dropped privileges."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from tests.support.need import need
from tests.support.uffd_kernel import need_user_mode_only, need_way
from tests.support.uffd_memory import PAGE, loading, memory, next_fault, open_uffd, pattern
from uffd import (
    Feature,
    FeatureUnsupported,
    InvalidRequest,
    Ioctls,
    Mapping,
    ProcessGone,
    UffdError,
    Userfaultfd,
    Way,
    enabled_features,
    kernel_support,
    pidfd_getfd,
    pidfd_open,
)
from uffd.opening import handshake, open_fd

pytestmark = pytest.mark.kernel

BOTH = (Way.DEVICE, Way.SYSCALL)


def needs_root() -> None:
    need(os.geteuid() == 0, "needs root", remedy="sudo -E python -m pytest")


def child_code(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body)]


@pytest.mark.parametrize("way", BOTH)
def test_open_by_either_way(way: Way) -> None:
    needs_root()
    need_way(way)
    with Userfaultfd.open(ways=(way,), user_mode_only=False) as uffd:
        assert uffd.opening.way is way
        assert not uffd.opening.user_mode_only
        assert uffd.support is not None
        assert Ioctls.REGISTER | Ioctls.UNREGISTER | Ioctls.API in uffd.support.ioctls
        assert not os.get_inheritable(uffd.fileno())


def test_user_mode_only_on_request() -> None:
    need_user_mode_only()
    with Userfaultfd.open(user_mode_only=True) as uffd:
        assert uffd.opening.user_mode_only


def test_enabled_features_are_read_back_from_the_kernel() -> None:
    with open_uffd(Feature.EVENT_REMOVE | Feature.THREAD_ID) as uffd:
        assert enabled_features(uffd.fileno()) == Feature.EVENT_REMOVE | Feature.THREAD_ID


def test_wp_async_brings_wp_unpopulated_along() -> None:
    with open_uffd(Feature.WP_ASYNC) as uffd:
        assert Feature.WP_UNPOPULATED in enabled_features(uffd.fileno())


def test_optional_features_are_taken_only_if_reported() -> None:
    reported = kernel_support().features
    future = Feature(1 << 55)
    with Userfaultfd.open(optional=future | Feature.THREAD_ID) as uffd:
        assert uffd.features == Feature.THREAD_ID & reported
    with pytest.raises(FeatureUnsupported):
        Userfaultfd.open(future)


def test_an_unknown_feature_is_refused_and_the_fd_can_try_again() -> None:
    fd, _ = open_fd(user_mode_only=None, nonblocking=True, ways=BOTH)
    try:
        with pytest.raises(InvalidRequest):
            handshake(fd, Feature(1 << 63))
        with pytest.raises(InvalidRequest):
            enabled_features(fd)
        assert handshake(fd, Feature.NONE).features == kernel_support().features
        with pytest.raises(InvalidRequest):
            handshake(fd, Feature.NONE)
    finally:
        os.close(fd)


def test_only_a_userfaultfd_can_be_adopted() -> None:
    fd = os.eventfd(0)
    try:
        with pytest.raises(InvalidRequest, match="eventfd"):
            Userfaultfd.from_fd(fd)
    finally:
        os.close(fd)
    with pytest.raises(UffdError):
        Userfaultfd.from_fd(fd)


def test_without_privileges_only_user_mode_is_left_and_the_reason_is_kept() -> None:
    needs_root()
    with open("/proc/sys/vm/unprivileged_userfaultfd") as sysctl:
        need(
            sysctl.read().strip() == "0",
            "unprivileged userfaultfd is allowed here",
            remedy="sysctl vm.unprivileged_userfaultfd=0",
        )
    body = """
        import os
        import uffd
        from uffd import Userfaultfd, Feature, NotPermitted, Mapping, Mode, FaultHandler, Served
        from uffd import BufferSource
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        with Userfaultfd.open(Feature.THREAD_ID) as u, Mapping.anonymous(4096) as region:
            assert u.opening.user_mode_only
            for refusal in u.opening.refusals:
                print(refusal.way.name, refusal.errno)
            u.register(region, Mode.MISSING)
            with FaultHandler(u, [Served(region, BufferSource(b"x" * 4096))]):
                assert region.load(7) == ord("x")
            # A fault inside a system call is not handed to us, but answered with EFAULT.
            region.advise(uffd.Advice.DONTNEED)
            pipe = os.pipe()
            try:
                os.write(pipe[1], region.unsafe_view())
            except OSError as error:
                print("write", error.errno)
        for options in ({"user_mode_only": False}, {"features": Feature.EVENT_FORK}):
            try:
                Userfaultfd.open(**options)
            except NotPermitted as error:
                print("refused:", error)
    """
    done = subprocess.run(child_code(body), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["DEVICE 13", "SYSCALL 1", f"write {errno.EFAULT}"]
    assert "vm.unprivileged_userfaultfd=0 and no CAP_SYS_PTRACE" in lines[3]
    assert "UFFDIO_API" in lines[4]


SERVED_CHILD = """
    import os, sys
    from uffd import Userfaultfd, Feature, Mapping, Mode
    region = Mapping.anonymous(4096)
    u = Userfaultfd.open(Feature.THREAD_ID | Feature.EVENT_REMOVE)
    u.register(region, Mode.MISSING)
    print(region.address, u.fileno(), os.getpid(), flush=True)
    %s
    print(region.load(1), flush=True)
    sys.stdin.readline()
"""


def serve_one_page(uffd: Userfaultfd, address: int) -> None:
    assert uffd.features == Feature.THREAD_ID | Feature.EVENT_REMOVE
    assert uffd.opening.way is Way.RECEIVED
    fault = next_fault(uffd)
    assert fault.address == address
    assert uffd.copy(address, b"\x2a" * PAGE) == PAGE


def test_a_context_received_over_a_socket_serves_its_creator() -> None:
    ours, theirs = socket.socketpair()
    send = (
        "import socket; s = socket.socket(fileno=int(sys.argv[1]));"
        " socket.send_fds(s, [b'u'], [u.fileno()])"
    )
    with ours:
        child = subprocess.Popen(
            [*child_code(SERVED_CHILD % send), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        assert child.stdout is not None
        address = int(child.stdout.readline().split()[0])
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        with Userfaultfd.from_fd(fds[0]) as uffd, Mapping.anonymous(PAGE) as own:
            serve_one_page(uffd, address)
            assert child.stdout.readline() == "42\n"
            with pytest.raises(InvalidRequest):  # MOVE wants both sides in one address space
                uffd.move(address, own.address, PAGE)
            child.communicate("\n", timeout=30)
            with pytest.raises(ProcessGone):
                uffd.copy(address, bytes(PAGE))
            assert uffd.read_events() == []


def test_a_context_fetched_by_pidfd_serves_its_creator() -> None:
    needs_root()
    child = subprocess.Popen(
        child_code(SERVED_CHILD % ""), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    address, their_fd, pid = (int(word) for word in child.stdout.readline().split())
    pidfd = pidfd_open(pid)
    try:
        with Userfaultfd.from_fd(pidfd_getfd(pidfd, their_fd)) as uffd:
            serve_one_page(uffd, address)
            assert child.stdout.readline() == "42\n"
    finally:
        os.close(pidfd)
        child.communicate("\n", timeout=30)


def test_a_dead_pid_has_no_pidfd() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessGone):
        pidfd_open(child.pid)


def test_closing_is_explicit_and_forgetting_warns() -> None:
    uffd = Userfaultfd.open()
    fd = uffd.fileno()
    with pytest.warns(ResourceWarning, match="unclosed"):
        del uffd
    os.close(fd)  # not closed by the collector: that would let missing pages read as zeros
    uffd = Userfaultfd.open()
    uffd.close()
    uffd.close()
    assert uffd.is_closed
    with pytest.raises(ValueError, match="closed"):
        uffd.fileno()


def test_the_last_close_wakes_the_sleepers() -> None:
    with memory("anon") as region:
        with open_uffd() as uffd:
            uffd.register(region)
            sleeper = loading(region.address)
            next_fault(uffd)
            assert uffd.queue_depth().total == 1
        assert sleeper.join() == 0  # the documented hazard: zeros


def test_a_blocking_fd_reads_but_cannot_poll() -> None:
    with memory("anon") as region, Userfaultfd.open(nonblocking=False) as uffd:
        uffd.register(region)
        with pytest.raises(InvalidRequest):
            uffd.wait(0)
        sleeper = loading(region.address)
        (event,) = uffd.read_events()
        assert event.address == region.address  # type: ignore[union-attr]
        uffd.copy(region.address, pattern(region))
        assert sleeper.join() == 1
