"""Names that stay in their directory, files that appear whole or not at all, checksums."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.runtime.snapshots.files import (
    NewFile,
    SnapshotError,
    copy_front,
    locate,
    locked,
    names_in,
    open_stream,
    write_at,
)
from migration.runtime.snapshots.manifest import Manifest, checksum, read, verify

KIB = 1 << 10


def _publish(new: NewFile) -> None:
    with locked(new.path.parent, exclusive=True) as fd:
        new.publish(fd)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-rf", "a b", "a\nb", "a\0b"),
        *("x" * 201, "äß/..", "exec:x", "a:b", "~", "$HOME", "*", "_x"),
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Before anything is opened."""
    with pytest.raises(SnapshotError, match="no snapshot name"):
        locate(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(st.text())
def test_whatever_is_accepted_lies_in_the_directory(name: str) -> None:
    """Any text at all: either refused, or one file right there."""
    directory = Path("/snapshots")
    try:
        location = locate(name, directory)
    except SnapshotError:
        return
    if location.is_internal:
        assert location.path.parent == location.manifest_path.parent == directory
        assert os.path.normpath(location.path) == str(location.path)
        assert not location.path.name.startswith(".")
    else:
        assert name.startswith("file:")


def test_ordinary_names_and_files(tmp_path: Path) -> None:
    """Names with the suffix, files as they are, with an offset."""
    assert locate("before-upgrade_2.1", tmp_path).path == tmp_path / "before-upgrade_2.1.vmstate"
    assert locate("größe", tmp_path).is_internal
    outside = locate(f"file:{tmp_path}/x,offset=0x1000", None)
    assert (outside.path, outside.offset, outside.is_internal) == (tmp_path / "x", 4 * KIB, False)
    with pytest.raises(SnapshotError, match="--snapshot-dir"):
        locate("x", None)
    with pytest.raises(SnapshotError, match="no path"):
        locate("file:", None)


def test_a_link_in_the_directory_leads_nowhere(tmp_path: Path) -> None:
    """Neither reading nor replacing follows it."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    directory = tmp_path / "snapshots"
    directory.mkdir()
    location = locate("a", directory)
    location.path.symlink_to(victim)
    with pytest.raises(SnapshotError):
        open_stream(location)
    new = NewFile(location.path)
    write_at(new.fd, b"stream", 0)
    _publish(new)
    assert victim.read_text() == "mine"
    assert not location.path.is_symlink()
    assert location.path.read_bytes() == b"stream"


def test_a_new_file_is_not_there_before_it_is_published(tmp_path: Path) -> None:
    """The old one stays until then, and for good when it is discarded."""
    path = tmp_path / "a.vmstate"
    path.write_bytes(b"old")
    new = NewFile(path)
    write_at(new.fd, b"newer", 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.vmstate"]
    assert path.read_bytes() == b"old"
    new.discard()
    assert path.read_bytes() == b"old"
    new = NewFile(path)
    write_at(new.fd, b"newer", 0)
    new.sync()
    _publish(new)
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.vmstate"]
    new.discard()
    assert path.read_bytes() == b"newer"


def test_without_nameless_files_a_dead_writers_file_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a dead one's: who still writes holds a lock on it."""
    plain = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return plain(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    path = tmp_path / "a.vmstate"
    (tmp_path / ".a.vmstate.partial-dead").write_bytes(b"half")
    first = NewFile(path)
    second = NewFile(path)
    assert len(list(tmp_path.glob(".a.vmstate.partial-*"))) == 2
    write_at(first.fd, b"first", 0)
    _publish(first)
    second.discard()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.vmstate"]
    assert path.read_bytes() == b"first"


def test_names_in_a_directory(tmp_path: Path) -> None:
    """Only what could be named; nothing that is being written, no directories."""
    for name in ("b.vmstate", "a.vmstate", "a.vmstate.json", ".c.vmstate.partial-1", "other"):
        (tmp_path / name).touch()
    (tmp_path / "d.vmstate").mkdir()
    assert names_in(tmp_path) == ["a", "b"]


def test_what_is_in_front_is_copied_with_its_holes(tmp_path: Path) -> None:
    """And cut at the offset, or filled up to it."""
    old, new = tmp_path / "old", tmp_path / "new"
    with open(old, "wb") as file:
        file.write(b"head")
        file.seek(8 * KIB * KIB)
        file.write(b"tail and more")
    fd = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        copy_front(old, fd, 8 * KIB * KIB + 4)
        status = os.fstat(fd)
        assert status.st_size == 8 * KIB * KIB + 4
        assert status.st_blocks * 512 < KIB * KIB
        assert os.pread(fd, 4, 0) == b"head"
        assert os.pread(fd, 100, 8 * KIB * KIB) == b"tail"
        os.ftruncate(fd, 0)
        copy_front(tmp_path / "none", fd, 100)
        assert os.pread(fd, 200, 0) == bytes(100)
    finally:
        os.close(fd)


_PIECES = st.lists(
    st.tuples(st.integers(0, 300 * KIB), st.binary(min_size=1, max_size=6 * KIB)), max_size=6
)


@given(pieces=_PIECES, offset=st.sampled_from([0, 1, 4 * KIB, 5000]), length=st.integers(1, 400))
def test_a_checksum_does_not_see_holes_but_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[tuple[int, bytes]],
    offset: int,
    length: int,
) -> None:
    """Sparse, dense and moved files have one sum; another byte, or another length, another one."""
    length *= KIB - 7
    folder = tmp_path_factory.mktemp("sum")
    image = bytearray(length)
    with open(folder / "sparse", "wb+") as sparse, open(folder / "dense", "wb+") as dense:
        sparse.truncate(offset + length)
        for at, data in pieces:
            data = data[: max(0, length - at)]
            image[at : at + len(data)] = data
            sparse.seek(offset + at)
            sparse.write(data)
        sparse.flush()
        dense.write(image)
        dense.flush()
        expected = checksum(dense.fileno(), 0, length)
        assert checksum(sparse.fileno(), offset, length) == expected
        dense.seek(length // 2)
        dense.write(bytes([image[length // 2] ^ 1]))
        dense.flush()
        assert checksum(dense.fileno(), 0, length) != expected


def _manifest(**changes: object) -> Manifest:
    base: dict[str, object] = {
        "machine": "none",
        "run_state": "running",
        "layout": "stream",
        "offset": 0,
        "length": 4,
        "crc32c": 0,
        "blocks": (("ram", 4 * KIB),),
        "devices": (("timer", 0, 2),),
        "created_s": 1,
    }
    return Manifest(**{**base, **changes})  # type: ignore[arg-type]


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    """None when there is none."""
    path = tmp_path / "m.json"
    assert read(path) is None
    path.write_text(_manifest(guest_clock_ns=7).to_json())
    assert read(path) == _manifest(guest_clock_ns=7)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "7", '{"format": "other"}', '{"format": "postcopy-snapshot-1"}'),
        _manifest().to_json().replace('"length": 4', '"length": -4'),
        _manifest().to_json().replace('"length": 4', '"length": "4"'),
        _manifest().to_json().replace('"machine"', '"maschine"'),
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_manifest_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    """Whatever it is; and it is never replaced by one."""
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(SnapshotError, match="no snapshot's manifest"):
        read(path)


def test_verifying_tells_short_from_wrong(tmp_path: Path) -> None:
    """Bytes behind the stream do not matter."""
    path = tmp_path / "s"
    path.write_bytes(b"abcdef")
    with open(path, "rb") as file:
        fd = file.fileno()
        good = _manifest(crc32c=checksum(fd, 0, 4))
        verify(good, fd, offset=0, label="s")
        with pytest.raises(SnapshotError, match="cut short: 2 of 4"):
            verify(good, fd, offset=4, label="s")
        with pytest.raises(SnapshotError, match="checksum is wrong"):
            verify(good, fd, offset=1, label="s")
