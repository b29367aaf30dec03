"""The archive format a kernel unpacks at boot: "newc" cpio.

Several archives one after the other are one initramfs: what does not change between boots is
written once. Nothing here needs root: owners and device nodes are entries, not files.
"""

import hashlib
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_END = "TRAILER!!!"
_MAGIC = "070701"


class CpioWriter:
    """Entries in the order they are added. Parent folders must come first (the kernel makes none).

    :param out: anything with ``write``; stays open.
    """

    def __init__(self, out: BinaryIO) -> None:
        #: Of all names and contents so far, without times and what Python compiled: two archives
        #: with the same one boot the same.
        self.digest = hashlib.sha256()
        self._out = out
        self._inode = 0
        self._folders: set[str] = set()

    def folder(self, name: str, mode: int = 0o755) -> None:
        """One folder, and those above it that are not there yet."""
        name = name.strip("/")
        if not name or name in self._folders:
            return
        self.folder(os.path.dirname(name))
        self._folders.add(name)
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644, *, mtime: int = 0) -> None:
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name, stat.S_IFREG | mode, data, mtime=mtime)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, mode: int, major: int, minor: int) -> None:
        """:param mode: with the type, ``S_IFCHR`` or ``S_IFBLK``."""
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name, mode, device=(major, minor))

    def tree(self, source: Path, name: str, wanted: Callable[[Path], bool]) -> None:
        """The files below ``source`` that are ``wanted``, with their times (Python's caches
        compare them).
        """
        for path in sorted(source.rglob("*")):
            if path.is_file() and wanted(path):
                self.copy(path, f"{name}/{path.relative_to(source)}")

    def copy(self, path: Path, name: str) -> None:
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        self.file(name, path.read_bytes(), mode, mtime=int(status.st_mtime))

    def tar(self, archive: tarfile.TarFile, wanted: Callable[[str], bool]) -> None:
        """What a tar file holds. A hard link becomes a second copy."""
        for member in archive:
            name = member.name.removeprefix("./").strip("/")
            if name and name != "." and wanted(name):
                self._member(archive, member, name)

    def end(self) -> None:
        self._entry(_END, 0)

    def _member(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        if member.isdir():
            self.folder(name, member.mode)
        elif member.issym():
            self.link(name, member.linkname)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            self.device(name, kind | member.mode, member.devmajor, member.devminor)
        elif member.isfile() or member.islnk():
            content = archive.extractfile(member)
            data = content.read() if content else b""
            self.file(name, data, member.mode, mtime=int(member.mtime))

    def _entry(
        self,
        name: str,
        mode: int,
        data: bytes = b"",
        *,
        mtime: int = 0,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        if "__pycache__" not in name:
            self.digest.update(f"{name} {mode} {len(data)}\n".encode())
            self.digest.update(data)
        self._inode += 1
        encoded = name.strip("/").encode() + b"\0"
        inode = 0 if name == _END else self._inode
        fields = (inode, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(encoded), 0)
        header = _MAGIC + "".join(f"{value:08x}" for value in fields)
        self._padded(header.encode() + encoded)
        self._padded(data)

    def _padded(self, data: bytes) -> None:
        """Every name and every file ends at a multiple of four bytes."""
        self._out.write(data)
        self._out.write(bytes(-len(data) % 4))
