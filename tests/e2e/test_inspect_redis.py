"""A Redis server under load gets huge pages from outside; its own client checks every value."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.tracee.mappings import mappings
from migration.tracee.memory import userfaultfds
from migration.tracee.replace import replace_with_hugepages
from tests.support.monitor_process import run_postcopy
from tests.support.need import need
from tests.support.process import end, tied_to_us
from tests.support.tracee import HUGE, killed_at_request
from tests.support.uffd_memory import hugepages

pytestmark = [pytest.mark.e2e, pytest.mark.kernel]

KEYS = 4000
VALUE_BYTES = 4 << 10
TIMEOUT_S = 60.0
# A whole replacement makes about 80 requests; `make test-tracer` kills after each of them.
KILL_AT = range(1, 100) if os.environ.get("POSTCOPY_TRACER") == "full" else (3, 31, 46, 61)


class Client:
    """Speaks RESP. Writes each key again and again and remembers what it must read."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self.rounds: dict[int, int] = {}
        self.checked = 0

    def _ask(self, *words: bytes) -> bytes:
        parts = [b"*%d\r\n" % len(words)]
        parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
        self._socket.sendall(b"".join(parts))
        line = self._file.readline()
        assert line[:1] in (b"+", b"$"), line
        if line[:1] == b"+":
            return line[1:-2]
        length = int(line[1:])
        assert length >= 0, "the key is gone"
        return self._file.read(length + 2)[:-2]

    def write(self, key: int) -> None:
        number = self.rounds.get(key, 0) + 1
        assert self._ask(b"SET", b"k%d" % key, value(key, number)) == b"OK"
        self.rounds[key] = number

    def check(self, key: int) -> None:
        assert self._ask(b"GET", b"k%d" % key) == value(key, self.rounds[key])
        self.checked += 1

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def value(key: int, number: int) -> bytes:
    return (b"%d/%d;" % (key, number) * VALUE_BYTES)[:VALUE_BYTES]


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[tuple[int, Path]]:
    """A server of our own on a unix socket in ``folder``: pid and socket."""
    # Debian's redis-tools has the server too, under the name of its checker; the package
    # redis-server would start one on the host.
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    need(binary, "no Redis", remedy="apt-get install redis-tools")
    assert binary is not None
    path = folder / "redis"
    # setpriv keeps argv[0]: the name says which program it is to be.
    (folder / "redis-server").symlink_to(binary)
    argv = [str(folder / "redis-server"), "--port", "0", "--unixsocket", str(path)]
    argv += ["--save", "", "--appendonly", "no", "--dir", str(folder), "--activedefrag", "no"]
    process = subprocess.Popen(tied_to_us(argv), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if b"ready to accept" in line.lower():
                break
        yield process.pid, path
    finally:
        end(process)


@contextlib.contextmanager
def load(path: Path) -> Iterator[Client]:
    """A client that writes and checks all the time; what it finds wrong is raised at the end."""
    client, stop, found = Client(path), threading.Event(), []
    for key in range(KEYS):
        client.write(key)

    def work() -> None:
        try:
            while not stop.is_set():
                for key in range(KEYS):
                    client.check(key)
                    client.write(key)
                    if stop.is_set():
                        return
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with contextlib.closing(client):
        try:
            yield client
        finally:
            stop.set()
            thread.join()
        if found:
            raise found[0]
        for key in range(KEYS):
            client.check(key)


def wait_checked(client: Client, more: int) -> None:
    """Until the client has checked so many values more."""
    goal, until = client.checked + more, time.monotonic() + TIMEOUT_S
    while client.checked < goal:
        assert time.monotonic() < until, "the server does not answer"
        time.sleep(0.01)


def heap(pid: int) -> tuple[int, int]:
    """Whole huge pages of its largest private anonymous mapping."""
    found = max(
        (m for m in mappings(pid) if m.is_private_anonymous and m.name != "[stack]"),
        key=lambda m: m.rss,
    )
    start, end_ = -(-found.start // HUGE) * HUGE, found.end // HUGE * HUGE
    return start, min(end_, start + 8 * HUGE)


def test_huge_pages_for_a_server_under_load(tmp_path: Path) -> None:
    with redis(tmp_path) as (pid, path), load(path) as client, hugepages(8):
        wait_checked(client, 100)
        start, stop = heap(pid)
        assert stop > start
        done = run_postcopy("inspect", str(pid), "--hugepages", f"{start:x}-{stop:x}", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["kind"] == "replaced"
        assert any(m.start == start and m.is_hugetlb for m in mappings(pid))
        wait_checked(client, KEYS)
        shown = run_postcopy("inspect", str(pid))
        assert "anon_hugepage" in shown.stdout
        assert "2 MiB" in shown.stdout


def test_collapse_of_a_server_under_load(tmp_path: Path) -> None:
    with redis(tmp_path) as (pid, path), load(path) as client:
        wait_checked(client, 100)
        done = run_postcopy("inspect", str(pid), "--collapse", "all", "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        need(answer["tried"] > 0, "this server has no whole huge page of memory")
        assert answer["after"] >= answer["before"]
        wait_checked(client, KEYS)


@pytest.mark.parametrize("number", KILL_AT)
def test_the_tracer_is_killed_beside_a_server_under_load(tmp_path: Path, number: int) -> None:
    """Old pages or new ones: the client reads what it wrote, and nothing is left over."""
    with redis(tmp_path) as (pid, path), load(path) as client, hugepages(4):
        wait_checked(client, 100)
        start, stop = heap(pid)
        length = min(stop - start, 4 * HUGE)
        was_killed = killed_at_request(
            number, lambda: replace_with_hugepages(pid, start, length, HUGE)
        )
        wait_checked(client, KEYS)
        wait_left_alone(pid)
        wait_checked(client, KEYS)
        assert was_killed or any(m.start == start and m.is_hugetlb for m in mappings(pid))


def wait_left_alone(pid: int) -> None:
    """Until the keeper has taken away what the dead tracer left."""
    until = time.monotonic() + TIMEOUT_S
    while userfaultfds(pid) or any(m.uffd_modes for m in mappings(pid)):
        assert time.monotonic() < until, mappings(pid)
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hugepages", "200000+2M"), "postcopy inspect {pid}"),
        (("--hugepages", "all", "--page-size", "3M"), "no huge pages of 3 MiB"),
        (("--hugepages", "600000+3M", "--page-size", "3M"), "no huge pages of 3 MiB"),
        (("--hugepages", "all", "--page-size", "much"), "'much' is not a size"),
        (("--collapse", "somewhere"), "is no range"),
        (("--collapse", "200000+2M"), "no private memory there"),
    ],
)
def test_what_cannot_be_is_told_with_the_way_out(
    tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    with redis(tmp_path) as (pid, _path):
        done = run_postcopy("inspect", str(pid), *options)
        assert done.returncode == 1
        assert words.format(pid=pid) in done.stderr
        assert "internal error" not in done.stderr
