import math

import pytest
import torch
from cases import conv_layer, conv_layers, drawn, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations import joint, joint_weights
from rgap.equations.blocks import split_groups, weight_matrix
from rgap.equations.joint import solve_joint
from rgap.equations.joint_dense import Normal, solve_normal
from rgap.equations.joint_system import weights_first
from rgap.equations.joint_weights import weak_subspace
from rgap.equations.solve import solve_layer


def sample(layer, count, seed=0):
    """x, G, δz and z of several images that belong together; G by autograd."""
    x, dz = randn(count, *layer.input_shape, seed=seed), randn(count, *layer.output_shape, seed=seed + 1)
    weight = layer.weight.clone().requires_grad_()
    padded = nn.functional.pad(x, layer.padding)
    z = nn.functional.conv2d(padded, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    (G,) = torch.autograd.grad((z * dz).sum(), weight)
    return x, G, dz, z.detach()


def dense_system(layer, dz):
    """[W; K] of an ungrouped layer over all images, dense; K by autograd from the unit vectors."""
    W = torch.block_diag(*[torch.from_numpy(weight_matrix(layer).toarray())] * len(dz))
    weight, columns = layer.weight.clone().requires_grad_(), []
    for image in dz:
        for unit in torch.eye(layer.unknowns, dtype=dz.dtype).reshape(-1, *layer.input_shape):
            padded = nn.functional.pad(unit, layer.padding)[None]
            z = nn.functional.conv2d(padded, weight, None, layer.stride, 0, layer.dilation)
            columns.append(torch.autograd.grad((z[0] * image).sum(), weight)[0].flatten())
    return torch.cat([W, torch.stack(columns, 1)])


def by_group(layer, *tensors):
    parts = split_groups(layer)
    return zip(parts, *(t.chunk(len(parts), 1) for t in tensors), strict=True)


def check(layer, count, seed, size):
    """The solution is x on all that the dense [W; K] sees, and the null basis spans what it does not."""
    x, G, dz, z = sample(layer, count, seed)
    found = solve_joint(layer, size * G, size * dz, z, rcond=1e-6)
    systems = [dense_system(part, part_dz) for part, part_dz in by_group(layer, dz)]
    rank = sum(torch.linalg.matrix_rank(A, rtol=1e-7).item() for A in systems)
    unknowns = count * layer.unknowns
    assert (found.report.unknowns, found.report.rank, found.report.deficit) == (unknowns, rank, unknowns - rank)
    if found.null_basis() is None:
        assert rank == unknowns
        return assert_close(found.x, x, rtol=0, atol=1e-5)
    N = found.null_basis()
    assert N.shape == (unknowns, unknowns - rank)
    assert_close(N.T @ N, torch.eye(N.shape[1]).double(), rtol=0, atol=1e-8)
    by_image = N.reshape(*x.shape, -1)
    for A, (_, part) in zip(systems, by_group(layer, by_image), strict=True):
        assert (A @ part.flatten(0, 3)).abs().max() < 1e-5
    assert_close(found.x.flatten(), x.flatten() - N @ (N.T @ x.flatten()), rtol=0, atol=1e-4)


@settings(drawn, max_examples=25)
@given(conv_layers(), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([1.0, 1e-6]))
def test_rank_and_solution_are_those_of_the_dense_system(layer, count, seed, size):
    check(layer, count, seed, size)


WIDE = {"stride 2": (4, 3, 3, 2, 1), "groups": (4, 4, 3, 2, 1, 1, 2), "dilation": (3, 2, 2, 1, 0, 2)}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_w_may_go_first(monkeypatch, name, count):
    monkeypatch.setattr(joint, "WORTH", 1e9)
    check(conv_layer(nn.Conv2d(*WIDE[name]), 6, 5), count, 0, 1e-3)


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(2, 8, 3, 1, 1, bias=False), nn.Conv2d(4, 2, 3, 2, 1), nn.Conv2d(3, 12, 4, 2, 2, bias=False)]
)
def test_one_image_is_solved_as_by_itself(conv):
    layer = conv_layer(conv, 6, 6)
    _, G, dz, z = sample(layer, 1)
    alone, together = solve_layer(layer, G, dz[0], z[0], rcond=1e-6), solve_joint(layer, G, dz, z, rcond=1e-6)
    assert (alone.report.rank, alone.report.deficit) == (together.report.rank, together.report.deficit)
    assert_close(alone.x, together.x[0], rtol=0, atol=1e-7)


def test_linear_layers_are_told_apart_by_their_gradient_up_to_their_width():
    layer = rgap.prepare(nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Linear(4, 1)).double(), (1, 3, 3)).layers[0]
    for count, deficit in ((1, 0), (4, 0), (6, 2 * 9 - 2 * 4)):
        x, G, dz, z = sample(layer, count)
        found = solve_joint(layer, G, dz, z, rcond=1e-7)
        assert found.report.deficit == deficit
        if not deficit:
            assert_close(found.x, x)


def test_weights_alone_solve_what_gradients_leave_open(monkeypatch):
    layer = conv_layer(nn.Conv2d(2, 12, 4, 2, 2), 12, 12)
    x, G, dz, z = sample(layer, 3)
    monkeypatch.setattr(joint, "FEW", 10)
    found = solve_joint(layer, 0 * G, 0 * dz, z, rcond=1e-6)
    assert_close(found.x, x, rtol=0, atol=1e-9)
    assert found.report.rank == found.report.rank_weights == 3 * layer.unknowns and found.report.iterations >= 1


def test_a_system_too_large_to_hold_leaves_the_minimum_norm_solution_of_w(monkeypatch):
    layer = conv_layer(nn.Conv2d(4, 2, 3, 2, 1, bias=False), 6, 6)
    _, G, dz, z = sample(layer, 2)
    monkeypatch.setattr(joint, "MOST", 10)
    found = solve_joint(layer, G, dz, z, rcond=1e-6)
    assert found.report.deficit > 0 and found.null_basis() is None
    assert_close(layer.apply(found.x), z, rtol=0, atol=1e-9)


def test_gradients_of_zero_leave_everything_to_the_weights():
    layer = conv_layer(nn.Conv2d(2, 12, 3, 1, 1), 5, 5)
    x, G, dz, z = sample(layer, 2)
    found = solve_joint(layer, 0 * G, 0 * dz, z, rcond=1e-6)
    assert found.report.rank_gradients == 0 and found.report.deficit == 0
    assert_close(found.x, x)


def test_dependent_weights_are_not_inverted_first(monkeypatch):
    monkeypatch.setattr(joint, "WORTH", 1e9)
    layer = conv_layer(nn.Conv2d(4, 3, 3, 2, 1, bias=False), 6, 6)
    layer.weight[1] = layer.weight[0]
    check(layer, 2, 0, 1.0)


@pytest.mark.parametrize("count", [1, 3])
def test_where_a_square_w_sees_dimly_the_gradients_decide(monkeypatch, count):
    monkeypatch.setattr(joint_weights, "DIM", 0.2)
    layer = conv_layer(nn.Conv2d(4, 4, 3, 1, 1), 6, 6)
    dim = weak_subspace(layer)
    W = torch.from_numpy(weight_matrix(layer).toarray())
    values = torch.linalg.svdvals(W)
    assert 0 < len(dim.sigmas) < 72 and abs(len(dim.sigmas) - (values < 0.2 * values[0]).sum()) <= 6
    assert_close(dim.sigmas.min(), values[-1], rtol=1e-3, atol=0)
    assert_close(dim.basis.T @ dim.basis, torch.eye(len(dim.sigmas)).double(), rtol=0, atol=1e-12)
    x, G, dz, z = sample(layer, count)
    z = z + 1e-4 * values[-1] * randn(*z.shape, seed=5)  # which W⁻¹ would pass on enlarged
    system = weights_first(layer, G, dz, z - layer.pre_bias(), dim)
    found = solve_normal(system.normal, system.b, 1e-6)
    mine = system.x0 + system.spread(found.y)
    assert (mine - x.flatten(1)).norm() < 0.5 * (system.x0 - x.flatten(1)).norm()
    check(layer, count, 0, 1.0)


def test_a_square_w_that_sees_everything_needs_no_gradient(monkeypatch):
    monkeypatch.setattr(joint, "WORTH", 1e9)
    layer = conv_layer(nn.Conv2d(3, 3, 1, bias=False), 4, 4)
    x, G, dz, z = sample(layer, 4)
    found = solve_joint(layer, 0 * G, 0 * dz, z, rcond=1e-6)
    assert_close(found.x, x) and found.report.rank_weights == 4 * layer.unknowns


@pytest.mark.parametrize("rank", [12, 7])
@pytest.mark.parametrize("gap", [1.0, 1e-3])
def test_normal_equations_tell_the_rank_with_and_without_a_gap(rank, gap):
    A = randn(20, 12) @ torch.diag(torch.logspace(0, math.log10(gap), 12, dtype=torch.float64))
    A = A[:, :rank] @ randn(rank, 12, seed=1) if rank < 12 else A
    b = A @ randn(12, seed=2)
    problem = Normal(A.T @ A, lambda y: A @ y, lambda r: A.T @ r, A.new_zeros(12))
    found = solve_normal(problem, b, 1e-5)
    assert found.rank == rank and (found.null is None) == (rank == 12)
    assert_close(
        found.y, torch.linalg.lstsq(A, b[:, None], driver="gelsd", rcond=1e-9).solution[:, 0], rtol=0, atol=1e-5
    )
    if found.null is not None:
        assert (A @ found.null).abs().max() < 1e-7 and found.above > 1e-5 > found.below
