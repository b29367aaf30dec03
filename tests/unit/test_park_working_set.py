"""What is asked of an unpark about working sets is seen to be possible before anything is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from migration.park.give_back import GiveOptions, Giving
from migration.park.manifest import ParkError
from migration.park.working_set import Prefetch
from tests.unit.test_park_manifest import PAGE, write_vm

HEAD = {"kind": "postcopy working set", "format": 1, "requests": 1}


@pytest.fixture
def giving(tmp_path: Path) -> Iterator[Giving]:
    write_vm(tmp_path / "vm")
    giving = open_vm(tmp_path, GiveOptions(page_sizes={}))
    yield giving
    giving.close()


def open_vm(tmp_path: Path, options: GiveOptions) -> Giving:
    return Giving(tmp_path / "vm", options, lambda event, data: None)


def record(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "record.ws"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def request(page: int, count: int = 1, block: str = "ram") -> dict[str, object]:
    return {"block": block, "offset": page * PAGE, "length": count * PAGE, "us": 1}


def test_every_page_of_a_request_once_and_in_order(giving: Giving, tmp_path: Path) -> None:
    """Recorded with larger pages than those of the next destination: all of them are wanted."""
    path = record(tmp_path, HEAD, request(8, 4), request(3), request(9))
    assert Prefetch.load(path, giving.machine.ram).pages == tuple(
        (0, page) for page in (8, 9, 10, 11, 3)
    )


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ((), "it is empty"),
        (({"kind": "something"},), "another kind of file"),
        ((HEAD, request(3, block="nobody")), "it has no 'nobody'"),
        ((HEAD, request(15, 2)), "is not in ram"),
        ((HEAD, request(-1)), "is not in ram"),
        ((HEAD, request(1 << 60)), "is not in ram"),
        ((HEAD, request(3, 0)), "is not in ram"),
        ((HEAD, [1]), "no working-set record"),
    ],
)
def test_no_record_of_this_vm(
    giving: Giving, tmp_path: Path, lines: tuple[object, ...], why: str
) -> None:
    with pytest.raises(ParkError, match=why):
        Prefetch.load(record(tmp_path, *lines), giving.machine.ram)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (GiveOptions(page_sizes={}, prefetch=Path("/nobody.ws")), "No such file"),
        (GiveOptions(page_sizes={}, record=Path("/nowhere/first.ws")), "cannot be written"),
        (GiveOptions(page_sizes={}, record=Path("/")), "is a directory"),
    ],
)
def test_refused_before_there_is_a_connection(
    tmp_path: Path, options: GiveOptions, why: str
) -> None:
    """A destination that is sent nothing whole ends: it waits for one guest, once."""
    write_vm(tmp_path / "vm")
    with pytest.raises(ParkError, match=why):
        open_vm(tmp_path, options)
    open_vm(tmp_path, GiveOptions(page_sizes={})).close()
