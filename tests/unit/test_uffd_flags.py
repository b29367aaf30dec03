"""Bits nobody has named yet are kept, shown and masked."""

from __future__ import annotations

import pytest

from uffd import FaultFlag, Feature, FeatureUnsupported, Ioctls
from uffd.opening import select_features

FUTURE = Feature(1 << 40)


def test_unknown_feature_bits_are_kept_and_shown() -> None:
    reported = Feature((1 << 40) | Feature.MOVE)
    assert int(reported) == (1 << 40) | (1 << 16)
    assert reported.unknown == FUTURE
    assert str(1 << 40) in repr(reported)
    assert Feature.MOVE in reported


def test_unknown_features_may_be_asked_for_like_known_ones() -> None:
    reported = Feature.MOVE | FUTURE
    assert select_features(reported, Feature.NONE, FUTURE | Feature.POISON) == FUTURE
    assert select_features(reported, FUTURE, Feature.NONE) == FUTURE


def test_a_missing_required_feature_is_named() -> None:
    with pytest.raises(FeatureUnsupported, match="RWP") as caught:
        select_features(Feature.MOVE, Feature.RWP, Feature.MOVE)
    assert caught.value.missing == Feature.RWP


@pytest.mark.parametrize("flags", [Ioctls, FaultFlag])
def test_other_sets_keep_unknown_bits_too(flags: type[Ioctls] | type[FaultFlag]) -> None:
    assert int(flags((1 << 50) | 1)) == (1 << 50) | 1
