"""The initramfs writer: what the kernel's unpacker asks for, read back field by field."""

from __future__ import annotations

import io
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.matrix.cpio import CpioWriter

_HEADER = 110


@dataclass(frozen=True)
class Entry:
    name: str
    mode: int
    data: bytes
    mtime: int
    device: tuple[int, int]


def entries(archive: bytes) -> Iterator[Entry]:
    """A reader of its own: thirteen fields of eight hex digits, names and data padded to four."""
    at = 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        digits = archive[at + 6 : at + _HEADER]
        fields = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
        name_end = at + _HEADER + fields[11]
        assert archive[name_end - 1] == 0
        data = name_end + -name_end % 4
        end = data + fields[6]
        name = archive[at + _HEADER : name_end - 1].decode()
        device = (fields[9], fields[10])
        yield Entry(name, fields[1], archive[data:end], fields[5], device)
        at = end + -end % 4
    assert at == len(archive)


def written() -> tuple[io.BytesIO, CpioWriter]:
    out = io.BytesIO()
    return out, CpioWriter(out)


def test_parents_come_first_and_once() -> None:
    out, archive = written()
    archive.file("a/b/c", b"12345", 0o755)
    archive.link("a/b/d", "c")
    archive.device("a/console", stat.S_IFCHR | 0o600, 5, 1)
    archive.end()
    found = list(entries(out.getvalue()))
    assert [e.name for e in found] == ["a", "a/b", "a/b/c", "a/b/d", "a/console", "TRAILER!!!"]
    assert [stat.S_IFMT(e.mode) for e in found[:5]] == [
        *(stat.S_IFDIR, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR)
    ]
    assert stat.S_IMODE(found[2].mode) == 0o755
    assert (found[2].data, found[3].data, found[4].device) == (b"12345", b"c", (5, 1))


def test_a_tree_keeps_times_and_modes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    kept = tmp_path / "in" / "run"
    kept.write_bytes(b"x" * 7)
    kept.chmod(0o750)
    (tmp_path / "in" / "left.o").write_bytes(b"")
    out, archive = written()
    archive.tree(tmp_path, "opt", lambda path: path.suffix != ".o")
    found = {e.name: e for e in entries(out.getvalue())}
    assert set(found) == {"opt", "opt/in", "opt/in/run"}
    assert found["opt/in/run"].mtime == int(kept.stat().st_mtime)
    assert stat.S_IMODE(found["opt/in/run"].mode) == 0o750


def test_a_tar_file_without_what_is_not_wanted() -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, kind in (("./usr", tarfile.DIRTYPE), ("./usr/one", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o755
            member.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"one"))
        for name, kind, target in (
            ("./usr/two", tarfile.LNKTYPE, "./usr/one"),
            ("./bin", tarfile.SYMTYPE, "usr/bin"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("./doc"), io.BytesIO())
    packed.seek(0)
    out, archive = written()
    with tarfile.open(fileobj=packed) as tar:
        archive.tar(tar, lambda name: name != "doc")
    found = {e.name: e for e in entries(out.getvalue())}
    assert set(found) == {"usr", "usr/one", "usr/two", "bin"}
    assert found["usr/two"].data == b"one"  # a hard link is a copy
    assert found["bin"].data == b"usr/bin"
