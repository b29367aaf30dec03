"""PAGEMAP_SCAN: what it takes and what it refuses."""

import struct

from scripts.validate import raw
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.check import expect, refuses, same
from scripts.validate.host import feature
from scripts.validate.kinds import ANON, PAGE
from scripts.validate.tracking import Tracked
from uffd import Category, Feature, Mode

ASYNC = feature(Feature.WP_ASYNC)
_SIZE = 96
_FIELDS = ("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages")
_MASKS = ("category_inverted", "category_mask", "category_anyof_mask", "return_mask")


def scan(tracked: Tracked, **changes: int) -> int:
    """One scan with all twelve words as given: result or minus the error."""
    buffer = bytearray(24 * 8)
    words = dict.fromkeys((*_FIELDS, *_MASKS), 0) | {
        "size": _SIZE,
        "start": tracked.address,
        "end": tracked.end,
        "vec": raw.buffer_address(buffer),
        "vec_len": 8,
        "category_mask": int(Category.WRITTEN),
        "return_mask": int(Category.WRITTEN),
    }
    words.update(changes)
    packed = bytearray(struct.pack("<12Q", *(words[n] for n in (*_FIELDS, *_MASKS))))
    return raw.ioctl(tracked.pagemap.fileno(), raw.PAGEMAP_SCAN, packed)


_REFUSED: dict[str, dict[str, int]] = {
    "size of another version": {"size": _SIZE - 8},
    "unknown flag": {"flags": 1 << 2},
    "extra flag beside good ones": {"flags": 3 | 1 << 5},
    "start not aligned": {"start": 1},
    "a length without a vector": {"vec": 0},
    "unknown category to select": {"category_mask": 1 << 40},
    "unknown category of any": {"category_anyof_mask": 1 << 40},
    "unknown category inverted": {"category_inverted": 1 << 40},
    "unknown category to return": {"return_mask": 1 << 40},
    "good and bad categories mixed": {"category_mask": int(Category.WRITTEN) | 1 << 40},
    "good and bad to return mixed": {"return_mask": int(Category.WRITTEN) | 1 << 40},
}


@case("scan", on=_REFUSED, needs=[ASYNC], name="bad-arguments")
def bad_arguments(bench: Bench) -> None:
    """EINVAL, and nothing done, for this mistake."""
    tracked = Tracked.of(ANON.map(4))
    tracked.write(2)
    changes = dict(_REFUSED[bench.variant])
    if "start" in changes:
        changes["start"] = tracked.address + 1
    refuses(scan(tracked, **changes), 22, bench.variant)
    tracked.expect_written([(2, 3)], "written pages afterwards")


@case("scan", needs=[ASYNC], name="good-arguments")
def good_arguments(bench: Bench) -> None:
    """An empty range, no selection, no return mask, a vector address without a length, and
    protecting with any category are taken.
    """
    tracked = Tracked.of(ANON.map(4))
    tracked.write(1, 3)
    same(scan(tracked, end=tracked.address), 0, "regions of an empty range")
    same(scan(tracked, category_mask=0), 4, "regions without a selection")
    same(scan(tracked, return_mask=0), 2, "regions without a return mask")
    same(scan(tracked, category_mask=0, return_mask=0), 1, "regions without any mask")
    got = scan(tracked, vec=0, vec_len=0, flags=1)
    expect(got >= 0, f"protecting without a vector ({got})")
    tracked.expect_written([], "written pages after protecting without a vector")
    for category in (1 << bit for bit in range(8)):
        got = scan(tracked, flags=1, category_mask=category)
        expect(got >= 0, f"protecting what has category {category:#x} ({got})")


@case("scan", needs=[ASYNC], name="vector-without-length")
def vector_without_length(bench: Bench) -> None:
    """A vector of no length: finds nothing to write to, or is refused; never writes."""
    tracked = Tracked.of(ANON.map(2))
    tracked.write(0)
    got = scan(tracked, vec_len=0)
    expect(got in (0, -22, -28), f"a vector of no length is empty or refused ({got})")
    tracked.expect_written([(0, 1)], "written pages afterwards")


@case("scan", needs=[ASYNC], name="check-wp-async")
def check_wp_async(bench: Bench) -> None:
    """CHECK_WPASYNC fails with EPERM where a mapping is not in asynchronous mode: unregistered, or
    registered for synchronous protection.
    """
    tracked = Tracked.of(ANON.map(2))
    same(scan(tracked, flags=2), 0, "asynchronous range")
    plain = ANON.map(2)
    plain.store(0, 1)
    where = {"start": plain.address, "end": plain.address + 2 * PAGE}
    refuses(scan(tracked, flags=2, **where), 1, "unregistered range")
    uffd = bench.open()
    uffd.register(plain, Mode.WP)
    refuses(scan(tracked, flags=2, **where), 1, "synchronously protected range")
    refuses(scan(tracked, flags=3, **where), 1, "the same, protecting")
