"""Errors of the rooms below in the verb's words: the cause alone, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .output import UserError


@contextmanager
def telling_causes() -> Iterator[None]:
    """Turn what the runtime, the wire and the parking rooms raise into a :class:`UserError`."""
    from migration.park.manifest import ParkError
    from migration.runtime.errors import MigrationError
    from migration.wire.errors import StreamError

    try:
        yield
    except (MigrationError, ParkError) as error:
        raise UserError(str(error)) from error
    except StreamError as error:
        raise UserError(f"the incoming stream is not acceptable: {error}") from error
    except OSError as error:
        raise UserError(f"{error.filename or 'system'}: {error.strerror or error}") from error
