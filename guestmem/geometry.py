"""Page arithmetic. Knows numbers only: no mappings, no kernel, no threads.

Two sizes of page meet here. A *target page* is the guest's, the granule of every bitmap and of
the stream. A *host page* is what the host maps, faults and places as one: 4 KiB, or 2 MiB and
1 GiB on hugetlb. A host page is always a whole number of target pages. This file is the only one
that spells the size of a target page.
"""

TARGET_PAGE_BITS = 12
TARGET_PAGE_BYTES = 1 << TARGET_PAGE_BITS
TARGET_PAGE_MASK = ~(TARGET_PAGE_BYTES - 1)

#: What one entry of the second page-table level maps on x86-64: transparent huge pages form
#: only where address and file offset are congruent modulo this.
THP_BYTES = 2 << 20


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, …; false for 0 and negative numbers."""
    return value > 0 and value & (value - 1) == 0


def is_aligned(value: int, unit: int) -> bool:
    """True if ``value`` is a multiple of ``unit`` (a power of two)."""
    return value & (unit - 1) == 0


def align_down(value: int, unit: int) -> int:
    """The greatest multiple of ``unit`` (a power of two) that is <= ``value``."""
    return value & ~(unit - 1)


def align_up(value: int, unit: int) -> int:
    """The least multiple of ``unit`` (a power of two) that is >= ``value``."""
    return (value + unit - 1) & ~(unit - 1)


def target_pages(length: int) -> int:
    """How many target pages hold ``length`` bytes, the last one perhaps partly."""
    return (length + TARGET_PAGE_BYTES - 1) >> TARGET_PAGE_BITS


def target_pages_per(page_size: int) -> int:
    """Target pages in one host page of ``page_size`` bytes.

    :raises ValueError: ``page_size`` is no power of two or smaller than a target page.
    """
    if not is_power_of_two(page_size) or page_size < TARGET_PAGE_BYTES:
        raise ValueError(f"{page_size} is not the size of a host page")
    return page_size >> TARGET_PAGE_BITS


def touched_pages(offset: int, length: int) -> tuple[int, int]:
    """Index of the first target page that ``[offset, offset + length)`` touches, and how many."""
    if length <= 0:
        return offset >> TARGET_PAGE_BITS, 0
    first = offset >> TARGET_PAGE_BITS
    last = (offset + length - 1) >> TARGET_PAGE_BITS
    return first, last - first + 1


def host_page_range(offset: int, length: int, page_size: int) -> tuple[int, int]:
    """The range widened to whole host pages, as ``(offset, length)`` in bytes."""
    start = align_down(offset, page_size)
    return start, align_up(offset + length, page_size) - start


def format_size(length: int) -> str:
    """``2 MiB``, ``1 GiB``, ``12 KiB``, ``7 bytes``: the largest unit that divides ``length``."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if length and length % (1 << shift) == 0:
            return f"{length >> shift} {unit}"
    return f"{length} bytes"


def size_option(length: int) -> str:
    """``2M``, ``1G``, ``64K``, ``7``: how :func:`parse_size`, mount(8) and QEMU spell a size."""
    number, unit = format_size(length).split()
    return number if unit == "bytes" else number + unit[0]


def parse_size(text: str) -> int:
    """Bytes of ``2M``, ``1G``, ``64K``, ``512`` (QEMU's suffixes; case does not matter).

    :raises ValueError: not a size.
    """
    stripped = text.strip().upper().removesuffix("IB").removesuffix("B")
    suffix = stripped[-1:] if stripped[-1:] in "KMGT" else ""
    digits = stripped[: len(stripped) - len(suffix)]
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"{text!r} is not a size: write a number with K, M, G or T, like 2M")
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[suffix]
