"""Builds ``guestmem._native``; run as a script it compiles in place, beside the package."""

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# Paths setuptools sees stay relative to the repository root.
ROOM = "guestmem"
UNITS = ("bitmap", "zero")

ffibuilder = FFI()
for declarations in sorted((ROOT / ROOM / "cdef").glob("*.h")):
    ffibuilder.cdef(declarations.read_text())

ffibuilder.set_source(
    f"{ROOM}._native",
    "\n".join(f'#include "{unit}.h"' for unit in UNITS),
    sources=[f"{ROOM}/csrc/{unit}.c" for unit in UNITS],
    include_dirs=[f"{ROOM}/csrc"],
    depends=[f"{ROOM}/csrc/{unit}.h" for unit in UNITS],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=False)
