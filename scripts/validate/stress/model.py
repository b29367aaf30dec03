"""What each page must hold: the model the real memory is compared with. Pure."""

from dataclasses import dataclass, field


@dataclass
class Page:
    """``contents`` is ``None`` while the page is missing."""

    contents: bytearray | None = None
    is_protected: bool = False


@dataclass(frozen=True)
class Asleep:
    """One thread that waits: ``token`` finds it again. ``value`` is what it stores; ``None``
    means that it loads.
    """

    token: int
    page: int
    offset: int
    value: int | None


@dataclass
class Model:
    """Pages by index, who sleeps where, and the pool of pages to move in.

    ``pool[j]`` is the contents of pool page j (``None``: a hole), ``is_exclusive[j]`` whether it
    may be moved: a fork shares it until it is written.
    """

    pages: list[Page]
    pool: list[bytes | None]
    is_exclusive: list[bool]
    asleep: list[Asleep] = field(default_factory=list)

    @classmethod
    def of(cls, pages: int, pool: int) -> "Model":
        return cls([Page() for _ in range(pages)], [None] * pool, [True] * pool)

    def absent(self) -> list[int]:
        return [i for i, page in enumerate(self.pages) if page.contents is None]

    def present(self) -> list[int]:
        return [i for i, page in enumerate(self.pages) if page.contents is not None]

    def sleepers_on(self, index: int) -> list[Asleep]:
        return [sleeper for sleeper in self.asleep if sleeper.page == index]

    def arrive(self, index: int, contents: bytes, *, protected: bool = False) -> list[Asleep]:
        """A page was placed: who goes on now, in order of their tokens.

        Who wants to store to a page that arrives protected sleeps on (and is reported again).
        """
        page = self.pages[index]
        assert page.contents is None, "the model has that page already"
        page.contents, page.is_protected = bytearray(contents), protected
        return self._go_on(index)

    def unprotect(self, index: int) -> list[Asleep]:
        """Writes are allowed again: who goes on now."""
        self.pages[index].is_protected = False
        return self._go_on(index)

    def _go_on(self, index: int) -> list[Asleep]:
        page = self.pages[index]
        awake = [s for s in self.sleepers_on(index) if s.value is None or not page.is_protected]
        self.asleep = [sleeper for sleeper in self.asleep if sleeper not in awake]
        return awake

    def store(self, sleeper: Asleep) -> None:
        contents = self.pages[sleeper.page].contents
        assert contents is not None
        assert sleeper.value is not None
        contents[sleeper.offset] = sleeper.value

    def forget(self, index: int) -> None:
        """The page was removed."""
        self.pages[index] = Page()

    def fork(self) -> None:
        """Every page of the pool is shared with the child until it is written."""
        self.is_exclusive = [contents is None for contents in self.pool]
