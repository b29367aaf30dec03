"""Times on the command line."""

from __future__ import annotations

import argparse
import threading


def seconds(text: str) -> float:
    """An argparse type: 0 or more, and no more than a thread can wait.

    :raises ArgumentTypeError: not so.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")
    return value
