"""cffi builder of ``migration.probe._native``: a tiny KVM guest, and a few calls to the host.

Run as a script it builds in place (``python migration/probe/_build.py``); setuptools finds
``ffibuilder``.
"""

import os
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent.parent
_OWN = ("guest", "host")

ffibuilder = FFI()
ffibuilder.cdef((_HERE / "cdef" / "probe.h").read_text())

ffibuilder.set_source(
    "migration.probe._native",
    '#include "guest.h"\n#include "host.h"\n',
    # Relative to the repository root, where setuptools runs and where main() below goes.
    sources=[f"migration/probe/csrc/{topic}.c" for topic in _OWN],
    depends=[f"migration/probe/csrc/{topic}.h" for topic in _OWN],
    include_dirs=["migration/probe/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)


def main() -> None:
    os.chdir(_ROOT)
    ffibuilder.compile(verbose=False)


if __name__ == "__main__":
    main()
