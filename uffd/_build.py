"""cffi builder of ``uffd._native``: the kernel interface in C, with the interpreter lock released.

Run as a script it builds in place (``python uffd/_build.py``); setuptools finds ``ffibuilder``.
"""

import os
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_TOPICS = ("uffd", "memory", "pagemap", "touch", "sigbus", "pending", "handler", "watchdog")
_INTERNAL = ("ranges", "place", "sleepers")  # C without a face in Python

ffibuilder = FFI()
for _topic in _TOPICS:
    ffibuilder.cdef((_HERE / "cdef" / f"{_topic}.h").read_text())

ffibuilder.set_source(
    "uffd._native",
    '#include "uffd_abi.h"\n' + "".join(f'#include "{topic}.h"\n' for topic in _TOPICS),
    # Relative to the repository root, where setuptools runs and where main() below goes.
    sources=[f"uffd/csrc/{topic}.c" for topic in (*_TOPICS, *_INTERNAL)],
    depends=[f"uffd/csrc/{topic}.h" for topic in (*_TOPICS, *_INTERNAL, "uffd_abi")],
    include_dirs=["uffd/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)


def main() -> None:
    os.chdir(_HERE.parent)
    ffibuilder.compile(verbose=False)


if __name__ == "__main__":
    main()
