"""What every run has: a promise about the host, a watchdog that needs no GIL, printed seeds.

``REQUIRE_KERNEL=1`` says that this host has everything that can be installed or switched on; then
:func:`tests.support.need.need` fails where it would have skipped. ``HYPOTHESIS_PROFILE`` picks how
hard the property tests look: ``quick``, ``default`` or ``fuzz``.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.need import STRICT_VARIABLE, is_strict

# pytest-timeout interrupts a test from Python, which works while Python works. A thread asleep on a
# missing page with the GIL in hand stops Python as a whole; then only faulthandler's own C thread
# still runs. It gets this much longer, so that the gentle way is tried first.
HARD_LIMIT_MARGIN_S = 30.0

_PROFILES = {"quick": 25, "default": 100, "fuzz": 5000}
_stderr_key = pytest.StashKey[int]()
_seed_key = pytest.StashKey[int]()

for _name, _examples in _PROFILES.items():
    hypothesis.settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,  # two shared cores: a slow example is not a wrong one
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the profile and the seed; keep an uncaptured stderr for the last-resort dump."""
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
    # Set before hypothesis's own plugin reads the option, so that each run has one number to repeat
    # it by, whether the user gave it or not.
    given = config.getoption("hypothesis_seed", default=None)
    seed = int(given) if given not in (None, "random") else random.SystemRandom().getrandbits(32)
    config.option.hypothesis_seed = str(seed)
    config.stash[_seed_key] = seed
    # A shell lets what it starts in the background ignore Ctrl-C; tests send it all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_stderr_key] = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what :func:`pytest_configure` opened."""
    faulthandler.cancel_dump_traceback_later()
    descriptor = config.stash.get(_stderr_key, -1)
    if descriptor >= 0:
        os.close(descriptor)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """One screen line each: the host's promise, its kernel, the seed that repeats this run."""
    promise = "every miss with a remedy fails" if is_strict() else "misses skip with a remedy"
    return [
        f"host: Linux {os.uname().release}, euid {os.geteuid()}, {_free_hugepages()} free 2 MiB "
        f"hugepages; {STRICT_VARIABLE}={int(is_strict())}: {promise}",
        f"property tests: repeat with --hypothesis-seed={config.stash[_seed_key]}",
    ]


def _free_hugepages() -> int:
    try:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    except OSError:
        return 0


def _soft_limit_s(item: pytest.Item) -> float:
    """The limit pytest-timeout applies to this test: marker, command line, then the ini file."""
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        value = marker.args[0] if marker.args else marker.kwargs.get("timeout", 0)
        return float(value or 0)
    option = item.config.getoption("timeout", default=None)
    return float(option if option is not None else item.config.getini("timeout") or 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Arm the C watchdog around each test: all stacks to stderr, then the process ends."""
    limit_s = _soft_limit_s(item)
    if limit_s > 0:
        faulthandler.dump_traceback_later(
            limit_s + HARD_LIMIT_MARGIN_S, exit=True, file=item.config.stash[_stderr_key]
        )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
