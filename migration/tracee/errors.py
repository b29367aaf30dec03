"""What can go wrong with another process."""


class TraceeError(Exception):
    """:ivar hint: what to try; ``None`` when there is nothing to suggest."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


class TraceeGone(TraceeError):
    """The process (or the thread) has ended."""
