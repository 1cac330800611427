from dataclasses import replace

import numpy as np
import pytest
from cases import ASINH, open_problem, randn
from torch import nn

from rgap.virtual.newton import settled_on_range


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [30, 80])
def test_the_range_alone_leads_to_the_signs(count, bias):
    problem, x = open_problem(count, conv=nn.Conv2d(3, 12, 4, 2, 2, bias=bias))
    found = [problem.x + problem.N @ t for t in settled_on_range(problem)]
    assert 2 <= len(found) <= 10 and ((found[0] > 0) != (x > 0)).any()
    assert ((found[-1] > 0) == (x > 0)).all()
    assert np.linalg.norm(found[-1] - x) < 1e-4 * np.linalg.norm(x)


def test_directions_that_the_layer_knows_stay_as_they_are():
    problem, x = open_problem(40)
    weak = problem.N[:, 30:]
    problem = replace(problem, x=problem.x + weak @ (weak.T @ x + 1e-6 * randn(10).numpy()), known=np.full(10, 1e-6))
    t = settled_on_range(problem)[-1]
    assert not t[30:].any() and np.linalg.norm(problem.x + problem.N @ t - x) < 1e-4 * np.linalg.norm(x)


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(open_problem(82)[0], id="more open than a share of the range's equations"),
        pytest.param(open_problem(30, ASINH)[0], id="no pieces"),
        pytest.param(open_problem(30, noise=2e-4)[0], id="noise"),
        pytest.param(replace(open_problem(30)[0], x=np.full(300, 1e300)), id="overflow"),
        pytest.param(replace(open_problem(30)[0], N=np.zeros((300, 30))), id="directions that the range does not see"),
        pytest.param(replace(open_problem(75)[0], x=randn(300, seed=9).numpy()), id="no solution"),
    ],
)
def test_elsewhere_it_says_nothing(problem):
    assert settled_on_range(problem) == []
