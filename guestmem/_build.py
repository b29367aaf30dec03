"""Builds ``guestmem._native``; run as a script it compiles in place, beside the package."""

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
# Paths that setuptools sees stay relative to the repository root.
UNITS = (
    *("bitmap", "zero", "access", "backing", "pagescan", "numa", "prealloc"),
    *("kvmlog", "kvmring", "wpsync", "collapse"),
)
# The room below, compiled in: extensions never depend on one another's symbols.
LOWER_UNITS = ("memory", "pagemap", "uffd")
SYSTEM_HEADERS = ("fcntl.h", "sys/mman.h", "sys/types.h")

PRELUDE = "\n".join(
    [
        "#ifndef _GNU_SOURCE\n#define _GNU_SOURCE\n#endif",
        *(f"#include <{header}>" for header in SYSTEM_HEADERS),
        *(f'#include "{unit}.h"' for unit in (*LOWER_UNITS, *UNITS)),
    ]
)

ffibuilder = FFI()
for declarations in sorted((ROOT / "guestmem" / "cdef").glob("*.h")):
    ffibuilder.cdef(declarations.read_text())

ffibuilder.set_source(
    "guestmem._native",
    PRELUDE,
    sources=[
        *(f"guestmem/csrc/{unit}.c" for unit in UNITS),
        *(f"uffd/csrc/{unit}.c" for unit in LOWER_UNITS),
    ],
    depends=[
        *(f"guestmem/csrc/{unit}.h" for unit in UNITS),
        *(f"uffd/csrc/{unit}.h" for unit in LOWER_UNITS),
    ],
    include_dirs=["guestmem/csrc", "uffd/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=False)
