"""Names the cffi builders; everything else is in pyproject.toml (setuptools takes this only here)."""

from setuptools import setup

setup(
    cffi_modules=[
        "uffd/_build.py:ffibuilder",
        "guestmem/_build.py:ffibuilder",
        "migration/native/_build.py:ffibuilder",
        "migration/toyvm/_build.py:ffibuilder",
    ]
)
