import numpy as np
import pytest
import torch
from cases import matrix, randn
from torch.testing import assert_close

from rgap.linalg import conjugate_gradients, largest_eigenvalue


def test_the_largest_eigenvalue_is_found_from_below():
    A = matrix(30, 30, np.geomspace(1, 1e-3, 30))
    assert 0.98 < largest_eigenvalue(lambda v: A.T @ (A @ v), 30) <= 1 + 1e-12


def test_conjugate_gradients_give_the_minimum_norm_solution_and_the_condition():
    A, b = matrix(9, 12, np.geomspace(1, 0.1, 9)), randn(9)
    options = {"tolerance": 1e-12, "max_iterations": 100}
    found = conjugate_gradients(lambda x: [A @ x], lambda r: A.T @ r[0], [b], **options)
    assert_close(found.x, torch.linalg.pinv(A) @ b, rtol=0, atol=1e-9)
    assert found.residual < 1e-10 and found.condition == pytest.approx(10, rel=1e-6)


def test_a_normal_right_side_stands_for_the_residual_and_stays_as_it_was():
    A, b = matrix(12, 9, np.geomspace(1, 0.1, 9)), randn(12)
    normal = A.T @ b
    before, nothing = normal.clone(), [torch.zeros(12).double()]
    found = conjugate_gradients(lambda x: [A @ x], lambda r: A.T @ r[0], nothing, normal=normal)
    assert_close(found.x, torch.linalg.pinv(A) @ b, rtol=0, atol=1e-9)
    assert normal.equal(before) and found.residual == 0.0 and found.iterations >= 9
