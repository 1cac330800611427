import pytest
import torch
from cases import conv_layer, randn
from test_solve import constraints, sample
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations import iterated
from rgap.equations.iterated import solve_jointly
from rgap.equations.solve import solve_layer


def layer(outputs=6, bias=True):
    """Neither W nor K determines the input; together they do, from five outputs on."""
    return conv_layer(nn.Conv2d(4, outputs, 3, 2, 1, bias=bias), 9, 9)


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_both_kinds_of_constraints_together_give_the_input(monkeypatch, size):
    part = layer(8)
    x, G, dz, z = sample(part)
    dense = solve_layer(part, size * G, size * dz, z, rcond=1e-9)
    monkeypatch.setattr("rgap.equations.solve.ITERATED", 10)
    found = solve_layer(part, size * G, size * dz, z, rcond=1e-9)
    assert_close(found.x, x, rtol=0, atol=1e-7)
    assert found.report.deficit == dense.report.deficit == 0 and found.report.rank == part.unknowns
    assert found.report.iterations > 10 and found.report.condition > 1 and found.report.residual < 1e-10
    assert found.null_basis is None


def test_the_answer_to_a_change_is_that_of_the_dense_system(monkeypatch):
    part = layer(8)
    _, G, dz, z = sample(part)
    monkeypatch.setattr("rgap.equations.solve.ITERATED", 10)
    found = solve_layer(part, G, dz, z, rcond=1e-9)
    change = randn(*part.input_shape, seed=7)
    K = constraints(part, dz)[1]
    answer = found.sensitivity((K @ change.flatten()).reshape(G.shape), part.apply(change))
    assert (answer - change).norm() < 0.15 * change.norm()


def test_unknown_outputs_are_left_out(monkeypatch):
    part = layer(10)
    x, _, dz, z = sample(part)
    known = randn(*part.output_shape, seed=9) < 1.5
    dz = dz.where(known, 0.0)
    G = part.weight_gradient(x, dz)
    monkeypatch.setattr("rgap.equations.solve.ITERATED", 10)
    found = solve_layer(part, G, dz, z.where(known, 100.0), rcond=1e-9, known=known)
    assert not known.all() and found.report.iterations
    assert_close(found.x, x, rtol=0, atol=1e-6)


def test_what_the_rank_law_leaves_open_goes_to_the_dense_system_while_that_can_be_held(monkeypatch):
    part = layer(3, bias=False)
    _, G, dz, z = sample(part)
    rank = torch.linalg.matrix_rank(torch.cat(constraints(part, dz)), rtol=1e-9).item()
    assert solve_jointly(part, G, dz, z.flatten(), None, 100) is None
    monkeypatch.setattr(iterated, "DENSE_MOST", 50)
    found = solve_jointly(part, G, dz, z.flatten(), None, 100)
    assert found.report.rank == rank < part.unknowns and found.report.deficit == part.unknowns - rank
    assert found.null_basis is None and found.report.residual < 1e-2


def test_a_deficit_that_no_law_knows_is_found_by_a_random_vector(monkeypatch):
    part = layer(8, bias=False)
    part.weight[:, 1] = part.weight[:, 0]
    _, G, dz, z = sample(part)
    dz[1:] = dz[:1]
    G = part.weight_gradient(randn(*part.input_shape), dz)
    assert solve_jointly(part, G, dz, z.flatten(), None, 100) is None
    monkeypatch.setattr(iterated, "DENSE_MOST", 50)
    assert solve_jointly(part, G, dz, z.flatten(), None, 100).report.deficit > 0


def test_layers_between_maps_of_pixels_have_no_law():
    body = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 12, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(300, 1))
    part = rgap.prepare(body.double(), (2, 5, 5)).layers[0]
    x, dz = randn(2, 5, 5), randn(*part.output_shape, seed=1)
    z = part.apply(x)
    found = solve_jointly(part, part.weight_gradient(x, dz), dz, z.flatten(), None, 100)
    assert_close(found.x, x, rtol=0, atol=1e-6)
