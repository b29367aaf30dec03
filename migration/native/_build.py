"""cffi builder of ``migration.native._native``: the data plane in C, with the interpreter lock
released.

Run as a script it builds in place (``python migration/native/_build.py``); setuptools finds
``ffibuilder``.
"""

import os
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).resolve().parent
_OWN = (
    "err",
    "crc32c",
    "chan",
    "ramrec",
    "dst",
    "dst_ram",
    "dst_listen",
    "dst_fault",
    "dst_store",
    "dst_multifd",
    "multifd",
    "relay",
    "xbzrle",
    "blocktime",
    "pagesum",
    "mapped",
    "src",
    "src_ram",
    "src_rp",
    "src_advice",
    "src_xbzrle",
    "src_release",
    "src_multifd",
)
_HEADERS = (
    "err",
    "be",
    "crc32c",
    "chan",
    "ramrec",
    "multifd",
    "dst",
    "src",
    "xbzrle",
    "pagesum",
    "mapped",
)
_FACES = ("crc32c", "ramrec", "dst", "src", "xbzrle", "pagesum", "mapped")  # what Python sees
# Lower rooms are compiled in: no extension depends on another's symbols at link time.
_LOWER = ("uffd/csrc/uffd", "uffd/csrc/pending", "guestmem/csrc/bitmap", "guestmem/csrc/zero")

ffibuilder = FFI()
ffibuilder.cdef((_HERE / "cdef" / "native.h").read_text())
ffibuilder.set_source(
    "migration.native._native",
    "".join(f'#include "{name}.h"\n' for name in _FACES),
    # Relative to the repository root, where setuptools runs and where main() below goes.
    sources=[f"migration/native/csrc/{name}.c" for name in _OWN] + [f"{path}.c" for path in _LOWER],
    depends=[f"migration/native/csrc/{name}.h" for name in _HEADERS]
    + [f"{path}.h" for path in _LOWER],
    include_dirs=["migration/native/csrc", "uffd/csrc", "guestmem/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)


def main() -> None:
    os.chdir(_HERE.parents[1])
    ffibuilder.compile(verbose=False)


if __name__ == "__main__":
    main()
