import torch
from cases import randn
from torch.testing import assert_close

from rgap.separation import angles
from rgap.separation.angles import smallest_principal_angles


def test_two_subspaces_meet_in_the_vector_that_they_share():
    A, V = randn(20, 4), torch.linalg.qr(randn(20, 3, seed=1))[0]
    A[:, 2] = A[:, 0] + V @ torch.tensor([1.0, -2.0, 0.5], dtype=A.dtype)
    a, sine, following = smallest_principal_angle(A, V)
    assert sine < 1e-14 < 0.1 < following
    assert_close((A @ a).norm().item(), 1.0)
    assert (A @ a - V @ (V.T @ (A @ a))).norm() < 1e-13
    angles = torch.linalg.svdvals(torch.linalg.qr(A)[0].T @ V)
    assert_close(following, (1 - angles[1] ** 2).sqrt().item(), rtol=1e-8, atol=0)
    assert smallest_principal_angle(A[:, :1], V)[2] == 1.0


def test_gram_matrices_and_orthonormal_bases_find_the_same_direction():
    A, V = randn(200, 12) * torch.logspace(0, -3, 12).double(), torch.linalg.qr(randn(200, 9, seed=1))[0]
    A[:, 0] = V[:, 0] + 1e-7 * A[:, 0]
    for ours, oracle in zip(smallest_principal_angle(A, V), by_bases(A, V), strict=True):
        ours, oracle = (one if isinstance(one, float) else one * one[0].sign() for one in (ours, oracle))
        assert_close(ours, oracle, rtol=1e-9, atol=1e-13)
    A[:, 1] = V[:, 1] + 1e-9 * A[:, 1]  # a second small angle, which squares do not resolve
    assert_close(smallest_principal_angle(A, V)[2], by_bases(A, V)[2], rtol=1e-6, atol=0)


def smallest_principal_angle(A, V):
    a, sine, following = smallest_principal_angles(A.new_ones(1, len(A)), A, V)
    return a[0], sine.item(), following.item()


def by_bases(A, V):
    Q, R = torch.linalg.qr(A)
    _, sines, directions = torch.linalg.svd(Q - V @ (V.T @ Q), full_matrices=False)
    return torch.linalg.solve(R, directions[-1]), sines[-1].item(), sines[-2].item()


def test_starts_settle_on_one_pattern_each_and_go_on_alone_where_they_meet():
    X, W = randn(3, 40), randn(300, 40, seed=1)
    up, down = torch.ones(300).double(), torch.full((300,), 0.2).double()
    hidden = torch.where(X @ W.T > 0, 1.0, 0.2) * (X @ W.T)
    Z, H = (torch.linalg.qr(M)[0] for M in (W @ X.T, hidden.T))
    starts = torch.cat([X @ W.T + 0.1 * randn(3, 300, seed=seed) for seed in (2, 3)]) > 0
    signs, sines, _ = angles.settled_patterns(Z, H, (up, down), starts, 20)
    assert (sines[:3] < 1e-6).all() and (sines[3:] == 1).all()
    assert torch.equal(signs[:3], X @ W.T > 0)
    assert len(angles.different_patterns(torch.cat([signs[:3], signs[:3]]))) == 3
