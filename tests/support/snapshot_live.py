"""A live handler that notes how it is driven, and one that refuses."""

from __future__ import annotations

from migration.wire.io import Reader, Writer
from migration.wire.vmstate import PendingEstimate


class Diary:
    """State of two bytes; ``calls`` has every call in order.

    :ivar fails_in: the call that raises.
    """

    idstr = "diary"
    instance_id = 0
    version_id = 1
    minimum_version_id = 1
    has_postcopy = False

    def __init__(self, *, fails_in: str | None = None) -> None:
        self.calls: list[str] = []
        self.fails_in = fails_in

    def _note(self, call: str) -> None:
        if not self.calls or self.calls[-1] != call:
            self.calls.append(call)
        if call == self.fails_in:
            raise OSError(f"{call} was told to fail")

    def is_active(self) -> bool:
        return True

    def save_setup(self, writer: Writer) -> None:
        self._note("save_setup")
        writer.write(b"S")

    def save_iterate(self, writer: Writer, budget_bytes: int) -> bool:
        self._note("save_iterate")
        writer.write(b"I")
        return True

    def pending(self, *, exact: bool) -> PendingEstimate:
        return PendingEstimate()

    def save_complete(self, writer: Writer) -> None:
        self._note("save_complete")
        writer.write(b"C")

    def save_cleanup(self) -> None:
        self._note("save_cleanup")

    def load_setup(self) -> None:
        self._note("load_setup")

    def load(self, reader: Reader, version_id: int) -> None:
        self._note(f"load {reader.read(1).decode()}")

    def load_cleanup(self) -> None:
        self._note("load_cleanup")
