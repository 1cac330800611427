import math

import torch

from rgap.baselines.optimisers import Record, lbfgs


def test_lbfgs_stops_at_what_is_not_finite_and_at_what_is_far():
    def wild(x):
        return (x**4).sum() * torch.where(x.abs().max() > 2, math.nan, -1.0), 0.0

    found = lbfgs(wild, torch.ones(3, dtype=torch.float64), 50, Record(), "")
    assert found.diverged is not None and found.best.isfinite().all()
    far = lbfgs(
        lambda x: (-x.square().sum(), 0.0), torch.ones(3), 50, Record(), "", diverged=lambda x: bool((x > 5).any())
    )
    assert far.diverged is not None


def test_lbfgs_finds_the_minimum_of_a_badly_scaled_bowl():
    weights = torch.logspace(-6, 0, 10, dtype=torch.float64)
    found = lbfgs(lambda x: ((x - 3).square() @ weights, 0.0), torch.zeros(10, dtype=torch.float64), 100, Record(), "")
    torch.testing.assert_close(found.best, torch.full((10,), 3.0, dtype=torch.float64), atol=1e-4, rtol=0)
