"""park, unpark, parked and relay refuse what cannot work before another VM is troubled with it."""

from __future__ import annotations

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migration.park.store import ParkWriter
from migration.park.view import View, ViewError
from migration.wire import headers
from migration.wire.commands import (
    Command,
    DiscardRange,
    OpenReturnPath,
    Packaged,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
    write_command,
)
from migration.wire.constants import SectionType
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetup, RamSetupBlock, write_ram_setup
from tests.support.guest_hops import Verb
from tests.support.monitor_process import run_postcopy
from tests.support.need import need

GIB = 1 << 30
PAGE_BYTES = 4096
RAM_VERSION = 4


@pytest.fixture
def vm(tmp_path: Path) -> Path:
    """A parked VM of 1 GiB, all of it zero."""
    writer = ParkWriter(tmp_path / "vm")
    writer.add_blocks(RamSetup((RamSetupBlock("ram", GIB),)))
    writer.finish(machine="none", uuid=None, sections=[], origin="precopy", peer="unix:x")
    return tmp_path / "vm"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--listen", "unix:{}/s", "{}/nowhere/vm"], 1, "make it first"),
        (["--listen", "unix:{}/s", "--serve", "{}/nowhere/v", "{}/vm"], 1, "nowhere/v: No such"),
        (["--serve", "{}/v", "snapshot", "{}/vm"], 2, "a snapshot file is here already"),
        (["--resume", "snapshot", "{}/vm"], 2, "a snapshot file is here already"),
        (["--give-up-after", "0", "snapshot", "{}/vm"], 2, "a snapshot file is here already"),
        (["--listen", "unix:{}/s", "--give-up-after", "-1", "{}/vm"], 2, "no time in seconds"),
        (["--listen", "unix:{}/s", "--give-up-after", "nan", "{}/vm"], 2, "no time in seconds"),
    ],
)
def test_park_refuses_at_once(tmp_path: Path, words: list[str], status: int, said: str) -> None:
    """It does not listen first: a source that came could maybe not go back."""
    done = run_postcopy("park", *(word.format(tmp_path) for word in words))
    assert done.returncode == status, done
    assert said in done.stderr
    assert "listening" not in done.stdout + done.stderr
    assert os.listdir(tmp_path) == []


def test_park_says_where_it_cannot_write(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "mounting a file system needs root", remedy="run as root")
    folder = tmp_path / "read-only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    need(done.returncode == 0, f"no tmpfs can be mounted: {done.stderr.decode()}")
    try:
        parked = run_postcopy("park", "--listen", f"unix:{tmp_path}/s", str(folder / "vm"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert parked.returncode == 1
    assert f"cannot write in {folder}" in parked.stderr


def test_parked_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "snapshot"
    file.write_bytes(b"QEVM")
    for each in (file, tmp_path, tmp_path / "nothing"):
        assert "is no parked VM" in run_postcopy("parked", str(each)).stderr


@pytest.mark.parametrize("verb", ["unpark", "relay"])
def test_no_postcopy_into_a_file(tmp_path: Path, vm: Path, verb: str) -> None:
    first = ["--listen", f"unix:{tmp_path}/s"] if verb == "relay" else [str(vm)]
    done = run_postcopy(verb, *first, f"file:{tmp_path}/out")
    assert done.returncode == 1
    assert "one-way" in done.stderr
    assert os.listdir(tmp_path) == ["vm"]


def test_a_deaf_destination_is_not_suspected_of_its_page_sizes(vm: Path) -> None:
    read_end, write_end = os.pipe()
    with Verb("unpark", str(vm), f"fd:{write_end}", descriptors=(write_end,)) as verb:
        said = verb.fail("one-way", "still parked")
    os.close(read_end)
    os.close(write_end)
    assert "--page-size" not in said


def test_no_monitor(vm: Path) -> None:
    done = run_postcopy("unpark", str(vm), "unix:/nowhere", "--qmp", "unix:/nobody")
    assert "cannot connect to the destination's monitor unix:/nobody: No such file" in done.stderr


def test_unpark_warns_of_stalls(tmp_path: Path, vm: Path) -> None:
    """Pages of 1 GiB at the destination: each first touch waits for all of one."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/b")
        listening.listen(1)
        with Verb("unpark", str(vm), f"unix:{tmp_path}/b", "--page-size", "ram=1G") as verb:
            verb.wait_text("warning: RAM block ram has pages of 1 GiB")
            listening.accept()[0].close()
            verb.fail("still parked")


def test_a_view_can_be_opened_before_the_source_comes(tmp_path: Path) -> None:
    """The socket is there as soon as park listens; who connects waits."""
    words = ("--listen", f"unix:{tmp_path}/s", "--serve", f"{tmp_path}/view", f"{tmp_path}/vm")
    with Verb("park", *words) as verb:
        verb.wait_text("listening on")
        with pytest.raises(ViewError, match="timed out"):
            View(tmp_path / "view", timeout_s=0.05)
        with ThreadPoolExecutor(1) as pool:
            opening = pool.submit(View, tmp_path / "view", timeout_s=None)
            verb.process.terminate()
            with pytest.raises(ViewError):
                opening.result(30)
        assert verb.wait() == 130
    assert os.listdir(tmp_path) == []


def postcopy_stream(last_pings: list[int]) -> bytes:
    """Up to the end of the package, as a QEMU sends it; of its 16 pages none has come."""
    stream, package = BytesWriter(), BytesWriter()
    commands: list[Command] = [PostcopyListen(), *map(Ping, last_pings), PostcopyRun()]
    for command in commands:
        write_command(package, command)
    headers.write_file_header(stream)
    headers.write_configuration(stream, headers.Configuration("none"))
    write_command(stream, OpenReturnPath())
    write_command(stream, Ping(1))
    write_command(stream, PostcopyAdvise(PAGE_BYTES, PAGE_BYTES))
    headers.write_section_header(
        stream, headers.SectionHeader(SectionType.START, 2, "ram", 0, RAM_VERSION)
    )
    write_ram_setup(stream, RamSetup((RamSetupBlock("ram", 16 * PAGE_BYTES),)))
    headers.write_footer(stream, 2)
    write_command(stream, RamDiscard("ram", (DiscardRange(0, 16 * PAGE_BYTES),)))
    write_command(stream, Packaged(len(package.getvalue())))
    return stream.getvalue() + package.getvalue()


@pytest.mark.parametrize("may_take_back", [False, True], ids=["old", "10.2"])
def test_who_has_the_guest_of_a_source_cut_off_before_our_answer(
    tmp_path: Path, may_take_back: bool
) -> None:
    """One from 10.2 on asks for an answer to its package, and goes on with its guest without it:
    then it need not wait for us, and the user has to look."""
    stream = postcopy_stream([3, 0x42] if may_take_back else [3])
    words = ("--listen", f"unix:{tmp_path}/s", "--give-up-after", "0.01", f"{tmp_path}/vm")
    with Verb("park", *words) as verb, socket.socket(socket.AF_UNIX) as source:
        verb.wait_text("listening on")
        source.connect(f"{tmp_path}/s")
        source.sendall(stream)
        verb.wait_text("device state is on disk")
        source.shutdown(socket.SHUT_RDWR)
        said = verb.fail("The guest waits at its source", "migrate -r")
    assert ("unless that says failed" in said) == may_take_back
