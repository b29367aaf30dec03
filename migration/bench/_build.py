"""cffi builder of ``migration.bench._native``: measuring in C, without the interpreter lock.

Run as a script it builds in place (``python migration/bench/_build.py``); setuptools finds
``ffibuilder``.
"""

import os
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_OWN = ("common", "wake", "fault", "sockets", "place", "remote", "push")

ffibuilder = FFI()
ffibuilder.cdef((_HERE / "cdef" / "bench.h").read_text())

ffibuilder.set_source(
    "migration.bench._native",
    '#include "bench.h"\n',
    # Relative to the repository root, where setuptools runs and where main() below goes. The lower
    # room's C is compiled in: no extension needs another one's symbols.
    sources=[
        *(f"migration/bench/csrc/{topic}.c" for topic in _OWN),
        "uffd/csrc/uffd.c",
        "uffd/csrc/pagemap.c",
    ],
    depends=["migration/bench/csrc/bench.h", "migration/bench/csrc/toucher.h"],
    include_dirs=["migration/bench/csrc", "uffd/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)


def main() -> None:
    os.chdir(_ROOT)
    ffibuilder.compile(verbose=False)


if __name__ == "__main__":
    main()
