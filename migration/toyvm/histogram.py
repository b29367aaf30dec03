"""Percentiles out of the vCPUs' latency histograms.

A histogram is log-linear: below 32 ns each bucket is one nanosecond, above that an octave has 32
buckets, so a bucket is at most 3.2 % wide. Counting is C (``csrc/touch.h``); here is only
arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ._native import ffi, lib

BUCKETS = lib.HISTOGRAM_BUCKETS
BUCKET_BYTES = 4 * BUCKETS
_SUB_BITS = lib.HISTOGRAM_SUB_BITS
_SUB = 1 << _SUB_BITS


def bucket_top_ns(bucket: int) -> int:
    """The largest value that falls into a bucket, in ns."""
    if bucket < _SUB:
        return bucket
    octave, sub = divmod(bucket, _SUB)
    width = 1 << (octave - 1)
    return (_SUB + sub + 1) * width - 1


@dataclass(frozen=True)
class Latency:
    """What the guest felt: durations of its touches of pages not yet received.

    :ivar count: touches. :ivar sum_ns: of all of them. :ivar max_ns: the longest, exact.
    :ivar buckets: counts, :data:`BUCKETS` of them.
    """

    count: int
    sum_ns: int
    max_ns: int
    buckets: Sequence[int]

    @classmethod
    def read(cls, histogram: Any) -> Latency:
        """Copy a ``struct toy_histogram``. The vCPU may be counting meanwhile; then the copy is a
        moment old here and there, never torn within a number."""
        words = ffi.unpack(histogram.bucket, BUCKETS)
        return cls(histogram.count, histogram.sum_ns, histogram.max_ns, words)

    @classmethod
    def merge(cls, parts: Iterable[Latency]) -> Latency:
        """One histogram of all."""
        listed = list(parts)
        return cls(
            sum(part.count for part in listed),
            sum(part.sum_ns for part in listed),
            max((part.max_ns for part in listed), default=0),
            [sum(column) for column in zip(*(part.buckets for part in listed), strict=True)]
            or [0] * BUCKETS,
        )

    def percentile_ns(self, percent: float) -> int:
        """Upper end of the bucket that holds the ``percent``-th percentile (nearest rank), never
        more than the maximum; 0 when nothing was counted."""
        total = sum(self.buckets)
        rank = max(1, -(-total * percent // 100))
        seen = 0
        for bucket, count in enumerate(self.buckets):
            seen += count
            if count and seen >= rank:
                return min(bucket_top_ns(bucket), self.max_ns)
        return 0

    def summary_us(self) -> dict[str, float]:
        """``p50``, ``p90``, ``p99`` and ``max`` in microseconds."""
        points = {f"p{percent}": self.percentile_ns(percent) for percent in (50, 90, 99)}
        return {name: ns / 1000 for name, ns in {**points, "max": self.max_ns}.items()}

    def octaves_us(self) -> list[int]:
        """A histogram like QEMU's ``postcopy-latency-dist``.

        :returns: 24 counts: bucket N holds what took [2**N, 2**(N+1)) microseconds; the first one
            also what was quicker, the last one all that took longer.
        """
        counts = [0] * 24
        for bucket, count in enumerate(self.buckets):
            if count:
                octave = (bucket_top_ns(bucket) // 1000).bit_length() - 1
                counts[min(max(octave, 0), len(counts) - 1)] += count
        return counts
