"""What a test asks of its host: skip with reason and remedy, or fail where all was promised.

A test that cannot run here must say why and what would change that. On a host that claims to have
everything (CI and the project's VMs set ``REQUIRE_KERNEL=1``) a missing thing that could have been
provided is a failure: a silently shrinking test run proves nothing. A thing without a remedy (a CPU
feature, a kernel's age) stays a skip everywhere.
"""

from __future__ import annotations

import os

import pytest

STRICT_VARIABLE = "REQUIRE_KERNEL"


def is_strict() -> bool:
    """True when this host promised everything that has a remedy (``REQUIRE_KERNEL=1``)."""
    return os.environ.get(STRICT_VARIABLE, "") not in ("", "0")


def need(ok: object, reason: str, *, remedy: str | None = None) -> None:
    """Go on when ``ok`` is true; otherwise end the calling test or fixture here.

    :param ok: anything with a truth value: a path found, a count of pages, a feature mask.
    :param reason: what is missing, as a statement: ``"no free 2 MiB hugepages"``.
    :param remedy: the exact command that provides it, or ``None`` when nothing on this host can.
    :raises pytest.skip.Exception: it is missing, and nothing was promised or there is no remedy.
    :raises pytest.fail.Exception: it is missing, there is a remedy, and ``REQUIRE_KERNEL=1``.

    At module level a skip is allowed too: it leaves the whole module out.
    """
    __tracebackhide__ = True  # the summary then names the line that asked
    if ok:
        return
    message = reason if remedy is None else f"{reason}; remedy: {remedy}"
    if remedy is not None and is_strict():
        pytest.fail(f"{message} ({STRICT_VARIABLE}=1 on this host)", pytrace=False)
    pytest.skip(message, allow_module_level=True)
