"""The atheris target for :mod:`tests.fuzz.loaders`: run as a module, it takes libFuzzer's options.

atheris is no part of the locked requirements: ``make fuzz`` installs it.
"""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["migration.wire", "migration.analyze"]):
    from tests.fuzz.loaders import one_input


def main() -> None:
    """Run until a finding or a limit given by the options."""
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
