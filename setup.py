"""Names the cffi builders, which setuptools takes only here; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# Each room with C has a _build.py; paths in it are relative to this folder.
_BUILDERS = sorted(
    path.as_posix()
    for room in ("uffd", "guestmem", "migration")
    for path in Path(room).rglob("_build.py")
)

setup(cffi_modules=[f"{path}:ffibuilder" for path in _BUILDERS])
