import math

import pytest
import torch
from cases import conv_layer, conv_layers, drawn, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations import solve
from rgap.equations.blocks import split_groups, weight_matrix
from rgap.equations.solve import solve_layer


def constraints(layer, dz):
    """W and K of an ungrouped layer, dense; K by autograd from the unit vectors."""
    W = torch.from_numpy(weight_matrix(layer).toarray())
    weight = layer.weight.clone().requires_grad_()
    left, right, top, bottom = layer.padding
    units = torch.eye(layer.unknowns, dtype=dz.dtype).reshape(-1, *layer.input_shape)
    columns = []
    for unit in nn.functional.pad(units, (left, right, top, bottom)):
        z = nn.functional.conv2d(unit[None], weight, None, layer.stride, 0, layer.dilation)
        columns.append(torch.autograd.grad((z[0] * dz).sum(), weight)[0].flatten())
    return W, torch.stack(columns, 1)


def sample(layer, seed=0):
    """x, G, δz and z that belong together."""
    x, dz = randn(*layer.input_shape, seed=seed), randn(*layer.output_shape, seed=seed + 1)
    weight = layer.weight.clone().requires_grad_()
    padded = nn.functional.pad(x[None], layer.padding)
    z = nn.functional.conv2d(padded, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)[0]
    (G,) = torch.autograd.grad((z * dz).sum(), weight)
    return x, G, dz, z.detach()


@settings(drawn, max_examples=80)
@given(conv_layers(), st.integers(0, 1000), st.sampled_from([1.0, 1e-6]))
def test_rank_and_solution_are_those_of_the_dense_system(layer, seed, size):
    """The solution equals x on everything that the dense [W; K] sees, and the null basis spans what it does not."""
    x, G, dz, z = sample(layer, seed)
    found = solve_layer(layer, size * G, size * dz, z, rcond=1e-9)
    parts = split_groups(layer)
    systems = [torch.cat(constraints(part, part_dz)) for part, part_dz in zip(parts, dz.chunk(len(parts)), strict=True)]
    expected = sum(torch.linalg.matrix_rank(A, rtol=1e-9).item() for A in systems)
    assert found.report.unknowns == layer.unknowns
    assert (found.report.rank, found.report.deficit) == (expected, layer.unknowns - expected)
    if found.null_basis is None:
        assert found.report.deficit == 0
        assert_close(found.x, x, rtol=0, atol=1e-6)
    else:
        N, A = found.null_basis, torch.block_diag(*systems)
        assert N.shape == (layer.unknowns, found.report.deficit)
        assert_close(N.T @ N, torch.eye(N.shape[1]).double(), rtol=0, atol=1e-9)
        assert_close(A @ N, torch.zeros(len(A), N.shape[1]).double(), rtol=0, atol=1e-7)
        assert_close(found.x.flatten(), x.flatten() - N @ (N.T @ x.flatten()), rtol=0, atol=1e-5)


def test_taps_that_read_only_padding_are_no_equations():
    layer = conv_layer(nn.Conv2d(2, 4, 3, 2, 1), 1, 1)
    x, G, dz, z = sample(layer)
    assert_close(solve_layer(layer, G, dz, z, rcond=1e-9).x, x)


def test_a_linear_layer_is_solved_by_its_gradient_alone():
    layer = rgap.prepare(nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 1)).double(), (1, 2, 3)).layers[0]
    x, G, dz, z = sample(layer)
    found = solve_layer(layer, G, dz, z + 100, rcond=1e-5)
    assert_close(found.x, x)
    assert_close(found.x.flatten(), G.flatten(1).T @ dz.flatten() / dz.square().sum())
    assert (found.report.rank_gradients, found.report.deficit) == (6, 0)


def test_the_report_of_a_layer_that_gradients_determine_has_the_condition_of_m():
    layer = conv_layer(nn.Conv2d(2, 8, 3, 1, 1, bias=False), 5, 5)
    _, G, dz, z = sample(layer)
    report = solve_layer(layer, G, dz, z, rcond=1e-5).report
    K = constraints(layer, dz)[1]
    assert report.condition == pytest.approx(torch.linalg.cond(K).item(), rel=1e-6)
    assert report.sigma_above_cut == pytest.approx(1 / report.condition)
    assert report.sigma_below_cut is None and report.rank_weights is None
    assert report.residual < 1e-7 and report.seconds > 0 and report.name == layer.name


def test_values_around_the_cut_and_the_misfit_of_a_deficient_layer_are_reported():
    layer = conv_layer(nn.Conv2d(4, 2, 3, 2, 1, bias=False), 6, 6)
    _, G, dz, z = sample(layer)
    report = solve_layer(layer, G, dz, z, rcond=1e-6).report
    assert report.deficit > 0 and report.sigma_below_cut < 1e-6 < report.sigma_above_cut
    assert report.residual < 1e-10 and report.rank_gradients < layer.unknowns
    wrong = solve_layer(layer, G, dz, z + randn(*z.shape, seed=5), rcond=1e-6).report
    assert wrong.residual > 0.1


def test_gradients_of_zero_leave_everything_to_the_weights():
    layer = conv_layer(nn.Conv2d(2, 12, 3, 1, 1), 5, 5)
    x, G, dz, z = sample(layer)
    found = solve_layer(layer, 0 * G, 0 * dz, z, rcond=1e-6)
    assert found.report.rank_gradients == 0 and found.report.deficit == 0
    assert_close(found.x, x)


def test_weights_of_zero_and_gradients_of_zero_leave_everything_open():
    layer = conv_layer(nn.Conv2d(2, 2, 3, bias=False), 4, 4)
    layer.weight.zero_()
    nothing = layer.weight.new_zeros(layer.output_shape)
    found = solve_layer(layer, 0 * layer.weight, nothing, nothing, rcond=1e-6)
    assert found.report.deficit == 32 and found.report.condition == math.inf
    assert not found.x.any() and found.null_basis.shape == (32, 32)


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_alone_solve_what_gradients_leave_open(monkeypatch, groups):
    """The same layer by the sparse factor, which needs no gradient, and by the dense way."""
    layer = conv_layer(nn.Conv2d(2, 12, 4, 2, 2, groups=groups), 16, 16)
    x, G, dz, z = sample(layer)
    dense = solve_layer(layer, G, dz, z, rcond=1e-9)
    monkeypatch.setattr(solve, "DENSE_UNKNOWNS", 10)
    found = solve_layer(layer, 0 * G, 0 * dz, z, rcond=1e-9)
    assert_close(found.x, x, rtol=0, atol=1e-9)
    assert_close(dense.x, x, rtol=0, atol=1e-9)
    assert found.report.rank_weights == found.report.rank == layer.unknowns
    assert found.report.condition > 1 and found.report.iterations >= 1 and found.report.residual < 1e-12


def test_weights_short_of_full_rank_are_joined_by_the_gradients(monkeypatch):
    layer = conv_layer(nn.Conv2d(2, 12, 4, 2, 2, bias=False), 16, 16)
    layer.weight[:, 1] = layer.weight[:, 0]
    monkeypatch.setattr(solve, "DENSE_UNKNOWNS", 10)
    _, G, dz, z = sample(layer)
    found = solve_layer(layer, G, dz, z, rcond=1e-9)
    assert found.report.rank_gradients > 0 and found.report.rank_weights is None
    expected = torch.linalg.matrix_rank(torch.cat(constraints(layer, dz)), rtol=1e-9).item()
    assert found.report.rank == expected


def test_a_deficit_is_seen_at_sizes_without_a_factor_too(monkeypatch):
    layer = conv_layer(nn.Conv2d(2, 12, 4, 2, 2, bias=False), 16, 16)
    layer.weight[:, 1] = layer.weight[:, 0]
    monkeypatch.setattr(solve, "DENSE_UNKNOWNS", 10)
    monkeypatch.setattr("rgap.equations.weights.FACTOR_UNKNOWNS", 10)
    _, G, dz, z = sample(layer)
    expected = torch.linalg.matrix_rank(torch.cat(constraints(layer, dz)), rtol=1e-9).item()
    assert solve_layer(layer, G, dz, z, rcond=1e-9).report.rank == expected < layer.unknowns


@pytest.mark.parametrize(("name", "gradients", "deficit"), [("cnn6", 2928, 0), ("cnn6_d", 1968, 280)])
def test_the_second_convolution_has_the_deficit_of_the_table(name, gradients, deficit):
    layer = rgap.prepare(getattr(rgap.models, name)(), (3, 32, 32)).layers[1]
    _, G, dz, z = sample(layer)
    report = solve_layer(layer, G, dz, z, rcond=1e-6).report
    assert (report.rank_gradients, report.deficit, report.rank) == (gradients, deficit, 3468 - deficit)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_rows_of_unknown_outputs_are_not_used(monkeypatch, dense, factored):
    layer = conv_layer(nn.Conv2d(2, 16, 4, 2, 2), 10, 10)
    x, G, dz, z = sample(layer)
    known = randn(*layer.output_shape, seed=9) < 1
    if not dense:
        monkeypatch.setattr(solve, "DENSE_UNKNOWNS", 10)
    if not factored:
        monkeypatch.setattr("rgap.equations.weights.FACTOR_UNKNOWNS", 10)
    found = solve_layer(layer, 0 * G, 0 * dz, z.where(known, 100.0), rcond=1e-9, known=known)
    assert found.report.deficit == 0 and not known.all()
    assert_close(found.x, x, rtol=0, atol=1e-8)


def test_an_ill_conditioned_weight_system_is_trusted_as_far_as_the_gradient_is_precise(monkeypatch):
    layer = conv_layer(nn.Conv2d(2, 8, 4, 2, 1), 16, 16)
    x, G, dz, z = sample(layer)
    monkeypatch.setattr(solve, "DENSE_UNKNOWNS", 10)
    monkeypatch.setattr(solve, "WELL_CONDITIONED", 1.0)
    alone = solve_layer(layer, G, dz, z, rcond=1e-9)
    assert alone.report.rank_weights == 512 and alone.report.rank_gradients is None
    joined = solve_layer(layer, G, dz, z, rcond=1e-9, precision=1e-2)
    assert joined.report.rank_gradients > 0 and joined.report.condition < alone.report.condition
    assert_close(joined.x, x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("known_all", [True, False])
def test_a_fixed_layer_is_solved_by_its_map_of_pixels(known_all, monkeypatch):
    network = nn.Sequential(nn.Tanh(), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1)).double()
    layer = rgap.prepare(network, (2, 6, 6)).layers[1]
    x = randn(2, 6, 6)
    z = layer.apply(x)
    known = None if known_all else torch.ones_like(z, dtype=torch.bool)
    found = solve_layer(layer, 0 * layer.weight, 0 * z, z, rcond=1e-9, known=known)
    assert (found.report.rank, found.report.deficit) == (18, 54)
    assert_close(layer.apply(found.x), z)
    N = found.null_basis
    assert_close(N.T @ N, torch.eye(54).double(), rtol=0, atol=1e-10)
    assert layer.apply(N.T.reshape(54, 2, 6, 6)).abs().max() < 1e-10 and (N.T @ found.x.flatten()).abs().max() < 1e-10
    monkeypatch.setattr(solve, "NULL_ENTRIES", 10)
    assert not known_all or solve_layer(layer, 0 * layer.weight, 0 * z, z, rcond=1e-9).null_basis is None
