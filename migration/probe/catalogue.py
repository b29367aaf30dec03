"""Every check, in the order of the letter."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from .checks import (
    features,
    hugepages,
    kvm,
    limits,
    network,
    opening,
    operations,
    restrictions,
    tracking,
)
from .row import Check


def all_checks() -> list[Check]:
    """The whole catalogue. Some rows depend on the host: huge page sizes, NUMA nodes, links."""
    rooms = (
        opening.checks,
        operations.checks,
        hugepages.pool_checks,
        tracking.checks,
        features.checks,
        kvm.checks,
        hugepages.thp_checks,
        limits.checks,
        restrictions.checks,
        network.checks,
    )
    return [check for room in rooms for check in room()]


def find(checks: Sequence[Check], word: str) -> list[Check]:
    """The checks a user means: a row's name, an alias, or a pattern such as ``copy-*``.

    Case, ``_`` and ``-`` do not matter: ``WP_ASYNC``, ``UFFD_FEATURE_WP_ASYNC`` and
    ``feature-wp-async`` are one. Empty when nothing is meant.
    """
    wanted = _plain(word)
    return [
        check
        for check in checks
        if any(fnmatchcase(_plain(name), wanted) for name in (check.name, *check.aliases))
    ]


def nearest(checks: Sequence[Check], word: str) -> list[str]:
    """Names that look like ``word``, best first."""
    names = {_plain(name): check.name for check in checks for name in (check.name, *check.aliases)}
    found = difflib.get_close_matches(_plain(word), list(names), n=3, cutoff=0.5)
    return list(dict.fromkeys(names[name] for name in found))


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
