"""experiments/replay.py. Truth: curves made up here."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))     # at the end: tokenizers.py has a package's name

import replay

from core.errors import UserError


@pytest.mark.parametrize(("B", "alpha"), [(105.0, 0.70), (4400.0, 0.30), (37.0, 0.84), (0.5, 3.0)])
def test_the_law_is_found_from_two_of_its_points(B, alpha):
    """The first three were fitted to published tables of forgetting."""
    def left(share):
        return (1 + B * share) ** -alpha
    assert replay.fit_law((0.05, 0.3), (left(0.05), left(0.3))) == pytest.approx((B, alpha), rel=1e-6)
    laws = replay.judge_law({share: 1.2 * left(share) if share else 1.2 for share in (0, 0.01, 0.05, 0.3)})
    assert [(law["fitted_on"], law["share"]) for law in laws] == \
        [((0.01, 0.05), 0.3), ((0.01, 0.3), 0.05), ((0.05, 0.3), 0.01)]
    assert [law["measured"] for law in laws] == pytest.approx([1.2 * left(share) for share in (0.3, 0.05, 0.01)])
    assert [law["error"] for law in laws] == pytest.approx([0] * 3, abs=1e-6)


def test_what_a_law_misses_is_its_error():
    """Through 1/2 at 0.1 and 1/3 at 0.2, B 10 and alpha 1, so 1/4 at 0.3; where 1/5 was measured it is 1/4 high."""
    law = replay.judge_law({0: 1.0, 0.1: 1 / 2, 0.2: 1 / 3, 0.3: 1 / 5})[0]
    assert (law["B"], law["alpha"], law["predicted"], law["error"]) == pytest.approx((10, 1, 1 / 4, 1 / 4))


@pytest.mark.parametrize("left", [(0.8, 0.9), (0.5, 0.5), (0.9, 0.1)])
def test_points_that_no_law_passes_through_are_named(left):
    """Forgetting that rises or stays with more replay, or falls ever faster."""
    with pytest.raises(UserError, match="no law"):
        replay.fit_law((0.1, 0.2), left)
