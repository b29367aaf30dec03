"""Ctrl-C and SIGTERM for a verb whose work sleeps in native code, where no signal handler runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

Result = TypeVar("Result")


def run_interruptible(work: Callable[[], Result], stop: Callable[[], bool | None]) -> Result:
    """Do ``work`` in a thread while the main thread waits for signals.

    :param stop: called on SIGINT or SIGTERM; makes ``work`` end soon. False: it goes on, and the
        next signal asks again.
    :returns: what ``work`` returned.
    :raises KeyboardInterrupt: it was interrupted and did not succeed all the same.
    :raises Exception: what ``work`` raised.
    """
    results: list[Result] = []
    errors: list[BaseException] = []
    # Not Thread.join(): once interrupted, that of Python 3.11 takes the thread for ended.
    is_done = threading.Event()

    def job() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            is_done.set()

    thread = threading.Thread(target=job, name="verb", daemon=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        thread.start()
        goes_on = True
        while goes_on:
            try:
                is_done.wait()
                break
            except KeyboardInterrupt:
                goes_on = stop() is False
        else:
            is_done.wait()
            if errors:
                raise KeyboardInterrupt from errors[0]
    finally:
        signal.signal(signal.SIGTERM, before)
    if errors:
        raise errors[0]
    return results[0]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
