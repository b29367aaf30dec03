"""What a kernel boots: three archives one after the other in one initramfs.

A root file system from Debian packages, this project as it is built here with the Python packages
it needs, and the few kernel modules the cases use.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from scripts.matrix.cpio import CpioWriter
from scripts.matrix.debian import FetchError, Kernel, mirrors

PROJECT = Path(__file__).resolve().parents[2]
#: Where the guest finds it.
HOME, SITE, PLAN = "opt/postcopy", "opt/site", "opt/plan.json"
_PARTS = ("uffd", "guestmem", "migration", "scripts", "tests")
# Compiled modules are for one Python: the root file system is the suite that has the same one.
SUITE_OF_PYTHON = {(3, 11): "bookworm", (3, 13): "trixie"}
_NOT_IN_ROOT = re.compile(
    r"(dev/|proc/|sys/|boot/|var/(cache|lib/apt|log)/|usr/share/(doc|man|locale|i18n|zoneinfo|info)/"
    r"|usr/lib/x86_64-linux-gnu/(gconv|perl)/|usr/share/perl)"
)
# mmdebstrap's "minbase" has no Python; ip(8) is for VMs that are connected.
_ROOT_PACKAGES = ("python3", "kmod", "e2fsprogs", "iproute2")
_TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis")
# Swap in compressed memory, a disk, a network card, KVM where the processor has it, and what these
# need.
_MODULES = re.compile(
    r"kernel/((mm|crypto|lib/(lz4|lzo|zstd|842|crypto)|drivers/(virtio|block)|arch/x86/(kvm|crypto)"
    r"|virt/lib)/|drivers/net/(virtio_net|net_failover)|net/core/failover)"
)
_INIT = f"""#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONPATH=/{HOME}:/{SITE} LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /disk
mount -t devpts pts /dev/pts
for at in /dev/shm /run /tmp; do mount -t tmpfs tmp $at; done
exec </dev/null >/dev/ttyS0 2>&1
depmod -a 2>/dev/null
for module in virtio_pci virtio_blk virtio_net zram kvm_intel kvm_amd; do modprobe -q $module; done
mkfs.ext4 -q /dev/vda && mount /dev/vda /disk && export TMPDIR=/disk
mount --bind /disk /var/tmp
# The probe maps its own interpreter where it needs a file on a disk.
cp /usr/bin/python3 /disk/python3
cd /{HOME} && /disk/python3 -m scripts.matrix.guest /{PLAN}
echo o >/proc/sysrq-trigger
sleep 60
"""


def build(kernel: Kernel, plan: Mapping[str, object], cache: Path, into: Path) -> tuple[Path, str]:
    """The initramfs for one kernel. ``plan`` is what :mod:`scripts.matrix.guest` does.

    :returns: it, and a key that is the same when kernel, root, project and plan are.
    :raises FetchError: a package or a tool is missing.
    """
    target = into / "initramfs"
    with open(target, "wb") as out:
        made = root(cache)
        with open(made, "rb") as base:
            shutil.copyfileobj(base, out, 1 << 20)
        archive = CpioWriter(out)
        _add_project(archive)
        _add_packages(archive, with_tests=bool(plan.get("tests")))
        _add_modules(archive, kernel)
        archive.file(PLAN, json.dumps(plan).encode())
        archive.file("init", _INIT.encode(), 0o755)
        archive.end()
    archive.digest.update(f"{kernel.release} {made.name} {made.stat().st_mtime_ns}".encode())
    return target, archive.digest.hexdigest()


def suite() -> str:
    """The Debian release that has the Python that runs this. :raises FetchError: none is known."""
    found = SUITE_OF_PYTHON.get(sys.version_info[:2])
    if found is None:
        have = ", ".join(f"{a}.{b}" for a, b in SUITE_OF_PYTHON)
        raise FetchError(f"no Debian suite is known for this Python; run it by one of {have}")
    return found


def root(cache: Path) -> Path:
    """A Debian with Python, as an archive; made once.

    :raises FetchError: no mmdebstrap, or no Debian with this Python.
    """
    target = root_in(cache)
    if target.exists():
        return target
    if shutil.which("mmdebstrap") is None:
        raise FetchError("no mmdebstrap; run: apt-get install mmdebstrap")
    cache.mkdir(parents=True, exist_ok=True)
    packed, new = cache / f"root.{os.getpid()}.tar", cache / f"root.{os.getpid()}.cpio"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(_ROOT_PACKAGES)}",
    ]
    command += ["--aptopt=Apt::Install-Recommends false", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    command += ["--dpkgopt=force-unsafe-io"]
    done = subprocess.run([*command, suite(), packed, mirrors()[0]], capture_output=True, text=True)
    try:
        if done.returncode:
            raise FetchError(f"mmdebstrap: {done.stderr.strip()[-600:]}")
        with tarfile.open(packed) as archive, open(new, "wb") as out:
            from_tar(archive, CpioWriter(out))
        new.rename(target)
    finally:
        packed.unlink(missing_ok=True)
        new.unlink(missing_ok=True)
    return target


def root_in(cache: Path) -> Path:
    """Where :func:`root` puts it. :raises FetchError: no Debian has this Python."""
    return cache / f"root-{suite()}-{'-'.join(_ROOT_PACKAGES)}.cpio"


def from_tar(archive: tarfile.TarFile, out: CpioWriter) -> None:
    """A root file system without what no test reads."""
    out.tar(archive, lambda name: not _NOT_IN_ROOT.match(name))
    out.folder("dev")
    # The kernel opens it for the first process, before anything is mounted.
    out.device("dev/console", 0o20600, 5, 1)
    for folder in ("proc", "sys", "run", "tmp"):
        out.folder(folder)
    out.end()


def _add_project(archive: CpioWriter) -> None:
    def wanted(path: Path) -> bool:
        return path.suffix not in (".c", ".o", ".h", ".S")

    for part in _PARTS:
        archive.tree(PROJECT / part, f"{HOME}/{part}", wanted)
    archive.copy(PROJECT / "pyproject.toml", f"{HOME}/pyproject.toml")


def _add_packages(archive: CpioWriter, *, with_tests: bool) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(_TEST_PACKAGES if with_tests else ())]
    for path, name in package_files(wanted):
        archive.copy(path, f"{SITE}/{name}")


def package_files(requirements: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The installed files of these packages and of all they need, with their import paths.

    A package that is not installed here is not needed here (its condition does not hold).
    """
    seen: set[str] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        name = re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0]
        if name in seen or "extra ==" in requirement:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        todo += found.requires or []
        for file in found.files or []:
            path = Path(str(found.locate_file(file)))
            if not str(file).startswith("..") and path.is_file():
                yield path, str(file)


def _add_modules(archive: CpioWriter, kernel: Kernel) -> None:
    home = kernel.modules

    def wanted(path: Path) -> bool:
        name = str(path.relative_to(home))
        return name.startswith("modules.") or bool(_MODULES.match(name))

    archive.tree(home, f"usr/lib/modules/{kernel.release}", wanted)
