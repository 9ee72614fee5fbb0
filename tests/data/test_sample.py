"""Without this, training validated on the first sources of a manifest alone, and an image could be followed twice."""

import numpy as np
import pytest

from lab.data.sample import evenly


@pytest.mark.parametrize(("count", "expected"), [(0, 7), (3, 3), (5, 5), (7, 7), (9, 7)])
def test_records_are_evenly_spread_and_none_comes_twice(count, expected):
    picked = list(evenly(range(7), count))
    assert len(set(picked)) == len(picked) == expected and picked == sorted(picked)
    gaps = np.diff([*picked, 7])
    assert gaps.max() - gaps.min() <= 1  # the end of the manifest too
