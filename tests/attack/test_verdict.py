import math
from dataclasses import replace

import pytest
import torch

from rgap.attack.problem import Weighed
from rgap.attack.verdict import judge
from rgap.head.hypothesis import Start, Twin
from rgap.results import Candidate, PixelRange

LABEL = torch.tensor([1])


def candidate(residual, size=1.0):
    return Candidate(
        torch.full((1, 1, 2, 2), size).double(),
        LABEL,
        residual,
        0 <= size <= 1,
        residual_allowed=1e-3,
        predicted_error=1e-6,
    )


def start():
    """A start of its own, whose image has no twin."""
    return Start(0, LABEL, torch.zeros(1, 4), torch.zeros(1, 4), ((Twin(1),),), ())


@pytest.mark.parametrize(
    ("residuals", "verdict", "kept"),
    [
        ([1e-2, 1.001e-2], "inconsistent", 2),
        ([1e-2, 2e-2], "inconsistent", 1),
        ([math.inf, math.inf], "inconsistent", 1),
        ([1e-4, 1e-2], "exact", 1),
        ([1e-4, 2e-4], "ambiguous", 2),
    ],
)
def test_hypotheses_that_miss_the_gradient_alike_stay_together(residuals, verdict, kept):
    weighed = [Weighed(start(), candidate(residual, 0.9)) for residual in residuals]
    result = judge(weighed, [], PixelRange())
    assert result.verdict == verdict and len(result.candidates) == kept


def test_twins_are_consistent_together_whatever_each_misses():
    together = start()
    weighed = [Weighed(together, candidate(residual, size)) for residual, size in ((1e-4, 0.3), (0.2, 0.9))]
    result = judge(weighed, [], PixelRange())
    assert result.verdict == "ambiguous" and all(c.consistent for c in result.candidates)
    assert [c.certified_psnr_db for c in result.candidates] == [pytest.approx(120)] * 2
    assert result.certified_psnr_db is None and "twin data" in result.notes[-1]
    outside = replace(weighed[0], joint=replace(weighed[0].joint, in_pixel_range=False))
    chosen = judge([outside, weighed[1]], [], PixelRange())
    assert chosen.verdict == "exact" and chosen.images.max() == pytest.approx(
        0.9
    )  # the misfit decides nothing between twins
    assert "the pixel range chose between 2 hypotheses" in chosen.notes[-2]


@pytest.mark.parametrize(("error", "verdict", "psnr"), [(1e-5, "exact", 100), (9e-3, "exact", 41), (0.011, None, 39)])
def test_a_certificate_says_its_accuracy_and_ends_at_a_hundredth_of_the_range(error, verdict, psnr):
    joint = replace(candidate(1e-4, 0.5), predicted_error=2 * error, images=torch.ones(1, 1, 2, 2).double())
    result = judge([Weighed(start(), joint)], [], PixelRange(-1.0, 1.0))
    assert result.verdict == (verdict or "inconsistent")
    if verdict:
        assert result.certified_psnr_db == result.candidates[0].certified_psnr_db == pytest.approx(psnr, abs=0.5)
        assert f"the image is certified to {psnr} dB, by a predicted error of" in result.notes[-1]
    else:
        assert result.certified_psnr_db is None and result.candidates[0].certified_psnr_db is None
        assert f"the gradient's noise limits the accuracy to {psnr} dB" in result.notes[-1]


def test_without_a_predicted_error_nothing_is_certified():
    result = judge([Weighed(start(), replace(candidate(1e-4, 0.5), predicted_error=None))], [], PixelRange())
    assert result.verdict == "inconsistent" and "could not be predicted" in result.notes[-1]
