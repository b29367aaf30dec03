"""Builds ``migration.toyvm._native``; run as a script it compiles in place, beside the package."""

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "migration" / "toyvm"
# Paths that setuptools sees stay relative to the repository root.
UNITS = ("guard", "gate", "auxmem", "oracle", "vcpu", "ring", "kvm", "kvm_state")
ALSO_COMPILED = ("kvm_vcpu", "kvm_guest")
# Of the room below, compiled in: extensions never depend on one another's symbols. A vCPU empties
# its own full dirty ring with the very code that the tracker uses.
LOWER_UNITS = ("kvmring", "bitmap")
HEADERS = ("toy", "page", "workload", "touch", "pace", *UNITS)
# Types are declared in dependency order.
DECLARATIONS = ("toy", "auxmem", "vcpu", "oracle", "ring", "kvm")

ffibuilder = FFI()
for name in DECLARATIONS:
    ffibuilder.cdef((HERE / "cdef" / f"{name}.h").read_text())

ffibuilder.set_source(
    "migration.toyvm._native",
    "\n".join(f'#include "{header}.h"' for header in HEADERS),
    sources=[
        *(f"migration/toyvm/csrc/{unit}.c" for unit in (*UNITS, *ALSO_COMPILED)),
        *(f"guestmem/csrc/{unit}.c" for unit in LOWER_UNITS),
    ],
    depends=[
        *(f"migration/toyvm/csrc/{header}.h" for header in (*HEADERS, "kvm_guest")),
        *(f"guestmem/csrc/{unit}.h" for unit in LOWER_UNITS),
    ],
    include_dirs=["migration/toyvm/csrc", "guestmem/csrc"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=False)
