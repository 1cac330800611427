import math

import pytest
import torch

from rgap.attack.problem import Weighed
from rgap.attack.verdict import judge
from rgap.head.hypothesis import Start
from rgap.results import Candidate, PixelRange

LABEL = torch.tensor([1])


def candidate(residual, size=1.0):
    return Candidate(torch.full((1, 1, 2, 2), size).double(), LABEL, residual, 0 <= size <= 1, residual_allowed=1e-3)


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
def test_twins_that_miss_the_gradient_alike_stay_together(residuals, verdict, kept):
    none = Start(0, LABEL, torch.zeros(1, 4), torch.zeros(1, 4), ((),), ())
    result = judge([Weighed(none, candidate(residual, 0.9)) for residual in residuals], [], PixelRange())
    assert result.verdict == verdict and len(result.candidates) == kept
