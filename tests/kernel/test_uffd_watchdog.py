"""The hang nothing else reports, provoked for real in child processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.support.uffd_memory import PAGE, TIMEOUT_S, loading, memory, next_fault, open_uffd
from uffd import FaultHandler, Served, UffdError, Watchdog, ZeroSource

pytestmark = pytest.mark.kernel

# A careless program: it touches the region through a memoryview, which keeps the interpreter
# lock, while the page has to come from a Python function.
MISUSE = """
    import threading
    from uffd import *

    region = Mapping.anonymous(1 << 16)
    uffd = Userfaultfd.open(Feature.THREAD_ID)
    uffd.register(region)
    source = CallableSource(lambda offset, length: bytes(length))
    handler = FaultHandler(uffd, [Served(region, source)])
    watchdog = Watchdog(stale_ms=200)
    watchdog.watch_handler(handler)
    assert watchdog.end_process
    watchdog.start()
    handler.start()
    print(region.page(3), flush=True)

    def careless():
        print(threading.get_native_id(), flush=True)
        region.unsafe_view()[region.page_size * 3]

    thread = threading.Thread(target=careless, name="careless")
    thread.start()
    thread.join()
    print("not reached")
"""


def run_child(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_misuse_ends_the_process_with_a_report() -> None:
    done = run_child(MISUSE)
    address, thread = (int(line) for line in done.stdout.split())
    assert done.returncode == 70, done.stderr
    report = done.stderr
    assert "no Python has run for" in report
    assert f"missing page at address {address:#x}" in report
    assert re.search(rf"thread {thread} \"\S+\"", report)
    assert "in careless" in report  # the Python traceback of the culprit
    assert "ending the process with status 70" in report


def test_the_misuse_without_any_reader_is_found_too() -> None:
    """The reader is Python, so the message was never read; the kernel still counts the waiter."""
    done = run_child("""
        from uffd import *

        region = Mapping.anonymous(1 << 16)
        uffd = Userfaultfd.open(Feature.THREAD_ID)
        uffd.register(region)
        with Watchdog(stale_ms=200, end_process=True, exit_status=71) as watchdog:
            watchdog.watch(uffd=uffd)
            print(region.page(2), flush=True)
            bytes(region.unsafe_view()[region.page_size * 2 :])
    """)
    assert done.returncode == 71, done.stderr
    assert f"fault nobody had read: address {int(done.stdout):#x}" in done.stderr
    assert "1 asleep" in done.stderr


def test_report_only_lets_the_process_go_on() -> None:
    """The page comes late, from a manager process; the watchdog reports and never ends anything."""
    body = """
        import os, sys
        from uffd import *

        region = Mapping.anonymous(1 << 16)
        uffd = Userfaultfd.open(Feature.THREAD_ID)
        uffd.register(region)
        report_write = int(sys.argv[1])
        with Watchdog(stale_ms=100, report_fd=report_write) as watchdog:
            watchdog.watch(uffd=uffd)
            print(os.getpid(), uffd.fileno(), region.address, flush=True)
            value = region.unsafe_view()[0]
            print("value", value, "reports", watchdog.report_count, flush=True)
            os._exit(0)
    """
    from uffd import Userfaultfd, pidfd_getfd, pidfd_open

    report_read, report_write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body), str(report_write)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[report_write],
    )
    os.close(report_write)
    assert child.stdout is not None
    pid, fd, address = (int(word) for word in child.stdout.readline().split())
    with os.fdopen(report_read) as report:
        pidfd = pidfd_open(pid)
        try:
            adopted = Userfaultfd.from_fd(pidfd_getfd(pidfd, fd))
        finally:
            os.close(pidfd)
        with adopted as uffd:
            text = ""
            while "still waiting" not in text:  # the report is the barrier
                line = report.readline()
                assert line, text
                text += line
            uffd.copy(address, b"\x2a" * PAGE)
            out, _ = child.communicate(timeout=60)
    assert out == "value 42 reports 1\n"
    assert child.returncode == 0
    assert "no Python has run for" in text


def test_a_sleeper_without_the_lock_is_nobodys_business() -> None:
    with memory("anon") as region, open_uffd() as uffd:
        uffd.register(region)
        read_end, write_end = os.pipe()
        with Watchdog(stale_ms=40, report_fd=write_end, traceback_signal=None) as watchdog:
            watch = watchdog.watch(uffd=uffd)
            sleeper = loading(region.address)
            next_fault(uffd)
            sleeper.thread.join(0.3)  # ample time for a wrong report; Python runs all along
            assert watchdog.report_count == 0
            uffd.zeropage(region)
            sleeper.join()
            watch.close()
            watch.close()
        os.close(write_end)
        assert os.read(read_end, 100) == b""
        os.close(read_end)


def test_watches_are_limited_and_come_back() -> None:
    with memory("anon") as region, open_uffd() as uffd:
        handler = FaultHandler(uffd, [Served(region, ZeroSource())])
        with Watchdog(stale_ms=int(TIMEOUT_S * 1000)) as watchdog:
            watches = [watchdog.watch_handler(handler) for _ in range(16)]
            assert not watchdog.end_process
            with pytest.raises(UffdError):
                watchdog.watch_handler(handler)
            watches.pop().close()
            watches.append(watchdog.watch_handler(handler))
            with pytest.raises(ValueError, match="running"):
                watchdog.start()
        watchdog.close()
        handler.close()
    with pytest.raises(UffdError):
        Watchdog(stale_ms=0)


def test_the_traceback_signal_is_given_back() -> None:
    number = signal.SIGRTMIN + 7
    before = signal.getsignal(number)
    with Watchdog():
        pass
    assert signal.getsignal(number) == before
