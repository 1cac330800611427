import pytest
import torch
from cases import easy_to_match, rand

import rgap
from rgap.baselines.matching import gradient_objective

IMAGE, LABEL = rand(1, 3, 8, 8, seed=11), torch.tensor([1])


def test_the_distance_is_that_of_dense_algebra_and_its_slope_that_of_differences():
    model = easy_to_match().double()
    shared = rgap.client_gradients(model, IMAGE, LABEL, "cross_entropy")
    problem = gradient_objective(model, shared, (3, 8, 8), "cross_entropy", 1, (0.0, 1.0), None, torch.float64, None)
    x = rand(1, 3, 8, 8, seed=5).requires_grad_()
    found = problem.distances(x, LABEL)
    mine = torch.cat([g.flatten() for g in rgap.client_gradients(model, x.detach(), LABEL, "cross_entropy")])
    target = torch.cat([g.flatten() for g in problem.targets.values()])
    assert found.squared.item() == pytest.approx(((mine - target).norm() / target.norm()).item() ** 2)
    assert found.cosine.item() == pytest.approx(1 - torch.cosine_similarity(mine, target, dim=0).item())
    assert torch.autograd.gradcheck(lambda x: problem.distances(x, LABEL).squared, x, fast_mode=True)
    assert problem.distances(IMAGE, LABEL).residual < 1e-12
