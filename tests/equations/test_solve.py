import math

import pytest
import torch
from cases import conv_layer, conv_layers, dense_system, drawn, layer_sample, randn, sequential
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations import SolverLimits, solve_layer

WEIGHTS_FIRST = SolverLimits(weights_first_ratio=1e9)
WEIGHTS_ALONE = SolverLimits(dense_unknowns=10, dense_unknowns_batch=10)
ITERATIVE = SolverLimits(iterative_unknowns=10)


def rank_of(layer, dz, rtol=1e-9):
    """Rank of [W; K] over all images and groups, by the dense system."""
    return sum(torch.linalg.matrix_rank(torch.cat(s), rtol=rtol).item() for s in systems(layer, dz))


def systems(layer, dz):
    parts = layer.split_groups()
    return [dense_system(*part) for part in zip(parts, dz.chunk(len(parts), 1), strict=True)]


def sample(conv, height, width, count=1):
    """A layer, x, G, δz and z of images that belong together."""
    layer = conv_layer(conv, height, width)
    return layer, *layer_sample(layer, count)


def check(layer, count, seed, size, limits):
    """The solution is x on all that the dense [W; K] sees, and the null basis spans what it does not."""
    x, G, dz, z = layer_sample(layer, count, seed)
    found = solve_layer(layer, size * G, size * dz, z, rcond=1e-9 if count == 1 else 1e-6, limits=limits)
    rank, unknowns = rank_of(layer, dz, 1e-9 if count == 1 else 1e-7), count * layer.unknowns
    assert (found.report.unknowns, found.report.rank, found.report.deficit) == (unknowns, rank, unknowns - rank)
    assert found.x.shape == x.shape
    if found.null_basis is None:
        assert rank == unknowns
        return assert_close(found.x, x, rtol=0, atol=1e-6 if count == 1 else 1e-5)
    N = found.null_basis
    assert N.shape == (unknowns, unknowns - rank)
    assert_close(N.T @ N, torch.eye(N.shape[1]).double(), rtol=0, atol=1e-9 if count == 1 else 1e-8)
    by_image = N.reshape(*x.shape, -1).chunk(layer.groups, 1)
    for equations, part in zip(systems(layer, dz), by_image, strict=True):
        assert (torch.cat(equations) @ part.flatten(0, 3)).abs().max() < (1e-7 if count == 1 else 1e-5)
    assert_close(found.x.flatten(), x.flatten() - N @ (N.T @ x.flatten()), rtol=0, atol=1e-5 if count == 1 else 1e-4)


@pytest.mark.slow
@settings(drawn, max_examples=80)
@given(conv_layers(), st.integers(1, 3), st.integers(0, 1000), st.sampled_from([1.0, 1e-6]))
def test_rank_and_solution_are_those_of_the_dense_system(layer, count, seed, size):
    check(layer, count, seed, size, SolverLimits())


WIDE = {"stride 2": (4, 3, 3, 2, 1), "groups": (4, 4, 3, 2, 1, 1, 2), "dilation": (3, 2, 2, 1, 0, 2)}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("count", [2, 3])
def test_w_may_go_first(name, count):
    check(conv_layer(nn.Conv2d(*WIDE[name]), 6, 5), count, 0, 1e-3, WEIGHTS_FIRST)


def test_dependent_weights_are_not_inverted_first():
    layer = conv_layer(nn.Conv2d(4, 3, 3, 2, 1, bias=False), 6, 6)
    layer.weight[1] = layer.weight[0]
    check(layer, 2, 0, 1.0, WEIGHTS_FIRST)


def test_a_square_w_that_sees_everything_needs_no_gradient():
    layer, x, G, dz, z = sample(nn.Conv2d(3, 3, 1, bias=False), 4, 4, 4)
    found = solve_layer(layer, 0 * G, 0 * dz, z, rcond=1e-6, limits=WEIGHTS_FIRST)
    assert_close(found.x, x)
    assert found.report.rank_weights == 4 * layer.unknowns


def test_where_a_square_w_sees_badly_the_gradients_decide():
    layer = conv_layer(nn.Conv2d(4, 4, 3, 1, 1), 6, 6)
    check(layer, 3, 0, 1.0, SolverLimits(weak_ratio=0.2, weights_first_ratio=1e9))
    x, G, dz, z = layer_sample(layer, 3)
    z = z + 1e-6 * randn(*z.shape, seed=5)  # which W⁻¹ would pass on enlarged
    joined, alone = (
        solve_layer(layer, G, dz, z, rcond=1e-6, limits=SolverLimits(weak_ratio=ratio, weights_first_ratio=1e9)).x
        for ratio in (0.2, 0.0)
    )
    assert (joined - x).norm() < 0.5 * (alone - x).norm()


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(2, 8, 3, 1, 1, bias=False), nn.Conv2d(4, 2, 3, 2, 1), nn.Conv2d(3, 12, 4, 2, 2, bias=False)]
)
def test_images_that_share_no_gradient_are_solved_as_each_by_itself(conv):
    layer, x, G, dz, z = sample(conv, 6, 6, 2)
    dz[1] = 0
    G = layer.weight_gradient(x[0], dz[0])
    one, other = (solve_layer(layer, g, dz[b, None], z[b, None], rcond=1e-6) for b, g in ((0, G), (1, 0 * G)))
    both = solve_layer(layer, G, dz, z, rcond=1e-6)
    assert both.report.rank == one.report.rank + other.report.rank
    assert_close(both.x, torch.cat([one.x, other.x]), rtol=0, atol=1e-7)


def test_taps_that_read_only_padding_are_no_equations():
    layer, x, G, dz, z = sample(nn.Conv2d(2, 4, 3, 2, 1), 1, 1)
    assert_close(solve_layer(layer, G, dz, z, rcond=1e-9).x, x)


def linear(inputs, outputs):
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs), nn.Linear(outputs, 1)).double()
    return rgap.prepare(network, (1, 1, inputs)).layers[0]


def test_a_linear_layer_is_solved_by_its_gradient_alone():
    layer = linear(6, 4)
    x, G, dz, z = layer_sample(layer)
    found = solve_layer(layer, G, dz, z + 100, rcond=1e-5)
    assert_close(found.x, x)
    assert_close(found.x.flatten(), G.flatten(1).T @ dz.flatten() / dz.square().sum())
    assert (found.report.rank_gradients, found.report.deficit) == (6, 0)


@pytest.mark.parametrize(("count", "deficit"), [(1, 0), (4, 0), (6, 2 * 9 - 2 * 4)])
def test_linear_layers_are_told_apart_by_their_gradient_up_to_their_width(count, deficit):
    layer = linear(9, 4)
    x, G, dz, z = layer_sample(layer, count)
    found = solve_layer(layer, G, dz, z, rcond=1e-7)
    assert found.report.deficit == deficit
    if not deficit:
        assert_close(found.x, x)


def test_the_report_of_a_layer_that_gradients_determine_has_the_condition_of_m():
    layer, _, G, dz, z = sample(nn.Conv2d(2, 8, 3, 1, 1, bias=False), 5, 5)
    report = solve_layer(layer, G, dz, z, rcond=1e-5).report
    K = dense_system(layer, dz)[1]
    assert report.condition == pytest.approx(torch.linalg.cond(K).item(), rel=1e-6)
    assert report.sigma_above_cut == pytest.approx(1 / report.condition)
    assert report.sigma_below_cut is None and report.rank_weights is None
    assert report.residual < 1e-7 and report.seconds > 0 and report.name == layer.name


def test_values_around_the_cut_and_the_misfit_of_a_deficient_layer_are_reported():
    layer, _, G, dz, z = sample(nn.Conv2d(4, 2, 3, 2, 1, bias=False), 6, 6)
    report = solve_layer(layer, G, dz, z, rcond=1e-6).report
    assert report.deficit > 0 and report.sigma_below_cut < 1e-6 < report.sigma_above_cut
    assert report.residual < 1e-10 and report.rank_gradients < layer.unknowns
    wrong = solve_layer(layer, G, dz, z + randn(*z.shape, seed=5), rcond=1e-6).report
    assert wrong.residual > 0.1


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_zero_leave_everything_to_the_weights(count):
    layer, x, G, dz, z = sample(nn.Conv2d(2, 12, 3, 1, 1), 5, 5, count)
    found = solve_layer(layer, 0 * G, 0 * dz, z, rcond=1e-6)
    assert found.report.rank_gradients == 0 and found.report.deficit == 0
    assert_close(found.x, x)


def test_weights_of_zero_and_gradients_of_zero_leave_everything_open():
    layer = conv_layer(nn.Conv2d(2, 2, 3, bias=False), 4, 4)
    layer.weight.zero_()
    nothing = layer.weight.new_zeros(1, *layer.output_shape)
    found = solve_layer(layer, 0 * layer.weight, nothing, nothing, rcond=1e-6)
    assert found.report.deficit == 32 and found.report.condition == math.inf
    assert not found.x.any() and found.null_basis.shape == (32, 32)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_weights_alone_solve_what_gradients_leave_open(groups, count):
    """The same layer by the sparse factor, which needs no gradient, and by the dense way."""
    layer, x, G, dz, z = sample(nn.Conv2d(2, 12, 4, 2, 2, groups=groups), 16, 16, count)
    dense = solve_layer(layer, G, dz, z, rcond=1e-9)
    found = solve_layer(layer, 0 * G, 0 * dz, z, rcond=1e-9, limits=WEIGHTS_ALONE)
    assert_close(found.x, x, rtol=0, atol=1e-9)
    assert_close(dense.x, x, rtol=0, atol=1e-8)
    assert found.report.rank_weights == found.report.rank == count * layer.unknowns
    assert found.report.condition > 1 and found.report.iterations >= 1 and found.report.residual < 1e-12


@pytest.mark.parametrize("max_factor_unknowns", [40_000, 10])
def test_weights_short_of_full_rank_are_joined_by_the_gradients(max_factor_unknowns):
    layer = conv_layer(nn.Conv2d(2, 12, 4, 2, 2, bias=False), 16, 16)
    layer.weight[:, 1] = layer.weight[:, 0]
    _, G, dz, z = layer_sample(layer)
    limits = SolverLimits(dense_unknowns=10, max_factor_unknowns=max_factor_unknowns)
    found = solve_layer(layer, G, dz, z, rcond=1e-9, limits=limits)
    assert found.report.rank_gradients > 0 and found.report.rank_weights is None
    assert found.report.rank == rank_of(layer, dz) < layer.unknowns


@pytest.mark.parametrize(("name", "gradients", "deficit"), [("cnn6", 2928, 0), ("cnn6_d", 1968, 280)])
def test_the_second_convolution_has_the_deficit_of_the_table(name, gradients, deficit):
    layer = rgap.prepare(getattr(rgap.models, name)(), (3, 32, 32)).layers[1]
    _, G, dz, z = layer_sample(layer)
    report = solve_layer(layer, G, dz, z, rcond=1e-6).report
    assert (report.rank_gradients, report.deficit, report.rank) == (gradients, deficit, 3468 - deficit)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_rows_of_unknown_outputs_are_not_used(dense, factored):
    layer, x, G, dz, z = sample(nn.Conv2d(2, 16, 4, 2, 2), 10, 10)
    known = randn(*z.shape, seed=9) < 1
    limits = SolverLimits(dense_unknowns=1600 if dense else 10, max_factor_unknowns=40_000 if factored else 10)
    found = solve_layer(layer, 0 * G, 0 * dz, z.where(known, 100.0), rcond=1e-9, known=known, limits=limits)
    assert found.report.deficit == 0 and not known.all()
    assert_close(found.x, x, rtol=0, atol=1e-8)


def test_an_ill_conditioned_weight_system_is_trusted_as_far_as_the_gradient_is_precise():
    layer, x, G, dz, z = sample(nn.Conv2d(2, 8, 4, 2, 1), 16, 16)
    limits = SolverLimits(dense_unknowns=10, well_conditioned=1.0)
    alone = solve_layer(layer, G, dz, z, rcond=1e-9, limits=limits)
    assert alone.report.rank_weights == 512 and alone.report.rank_gradients is None
    joined = solve_layer(layer, G, dz, z, rcond=1e-9, precision=1e-2, limits=limits)
    assert joined.report.rank_gradients > 0 and joined.report.condition < alone.report.condition
    assert_close(joined.x, x, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("count", "known_all"), [(1, True), (1, False), (3, True)])
def test_a_fixed_layer_is_solved_by_its_map_of_pixels(count, known_all):
    network = nn.Sequential(nn.Tanh(), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 1)).double()
    layer = rgap.prepare(network, (2, 6, 6)).layers[1]
    z = layer.apply(randn(count, 2, 6, 6))
    known = None if known_all else torch.ones_like(z, dtype=torch.bool)
    found = solve_layer(layer, 0 * layer.weight, 0 * z, z, rcond=1e-9, known=known)
    assert (found.report.rank, found.report.deficit) == (count * 18, count * 54)
    assert_close(layer.apply(found.x), z)
    N = found.null_basis
    assert_close(N.T @ N, torch.eye(count * 54).double(), rtol=0, atol=1e-10)
    assert layer.apply(N.T.reshape(-1, 2, 6, 6)).abs().max() < 1e-10 and (N.T @ found.x.flatten()).abs().max() < 1e-10
    limits = SolverLimits(max_null_entries=10)
    large = solve_layer(layer, 0 * layer.weight, 0 * z, z, rcond=1e-9, limits=limits)
    assert not known_all or large.null_basis is None


def test_a_batch_too_large_to_hold_leaves_the_minimum_norm_solution_of_w():
    layer, _, G, dz, z = sample(nn.Conv2d(4, 2, 3, 2, 1, bias=False), 6, 6, 2)
    found = solve_layer(layer, G, dz, z, rcond=1e-6, limits=SolverLimits(max_dense_unknowns_batch=10))
    assert found.report.deficit > 0 and found.null_basis is None
    assert_close(layer.apply(found.x), z, rtol=0, atol=1e-9)


def both_kinds(outputs=8, bias=True, count=1):
    """Neither W nor K determines the input; together they do, from five outputs on."""
    return sample(nn.Conv2d(4, outputs, 3, 2, 1, bias=bias), 9, 9, count)


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_both_kinds_of_equations_together_are_iterated_where_they_are_many(size):
    layer, x, G, dz, z = both_kinds()
    dense = solve_layer(layer, size * G, size * dz, z, rcond=1e-9)
    found = solve_layer(layer, size * G, size * dz, z, rcond=1e-9, limits=ITERATIVE)
    assert_close(found.x, x, rtol=0, atol=1e-11)
    assert found.report.deficit == dense.report.deficit == 0 and found.report.rank == layer.unknowns
    assert found.report.iterations > 10 and found.report.condition > 1 and found.report.residual < 1e-14
    assert found.null_basis is None
    coarse = solve_layer(layer, size * G, size * dz, z, rcond=1e-9, limits=ITERATIVE, precision=1e-7)
    assert coarse.report.residual > 1e-14 and coarse.report.iterations < found.report.iterations


def test_the_iterations_leave_out_unknown_outputs():
    layer, x, _, dz, z = both_kinds(10)
    known = randn(*z.shape, seed=9) < 1.5
    dz = dz.where(known, 0.0)
    G = layer.weight_gradient(x[0], dz[0])
    found = solve_layer(layer, G, dz, z.where(known, 100.0), rcond=1e-9, known=known, limits=ITERATIVE)
    assert not known.all() and found.report.iterations
    assert_close(found.x, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", [True, False])
def test_what_is_left_open_goes_to_the_dense_system_while_that_can_be_held(law):
    layer, x, G, dz, z = both_kinds(3 if law else 8, bias=False)
    if not law:  # a deficit that the law does not know of is found by a random vector
        layer.weight[:, 1] = layer.weight[:, 0]
        dz[:, 1:] = dz[:, :1]
        z, G = layer.apply(x), layer.weight_gradient(x[0], dz[0])
    rank = rank_of(layer, dz)
    dense = solve_layer(layer, G, dz, z, rcond=1e-9, limits=ITERATIVE)
    assert dense.report.rank == rank < layer.unknowns and dense.report.iterations is None
    limits = SolverLimits(iterative_unknowns=10, max_dense_unknowns=50)
    found = solve_layer(layer, G, dz, z, rcond=1e-9, limits=limits)
    assert found.report.deficit > 0 and found.report.iterations and found.null_basis is None
    assert found.report.residual < 1e-2 and (found.report.rank == rank or not law)


def test_layers_between_maps_of_pixels_have_no_law():
    body = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2, 12, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(300, 1))
    layer = rgap.prepare(body.double(), (2, 5, 5)).layers[0]
    x, dz = randn(1, 2, 5, 5), randn(1, *layer.output_shape, seed=1)
    G = layer.weight_gradient(x[0], dz[0])
    limits = SolverLimits(iterative_unknowns=-1)
    found = solve_layer(layer, G, dz, layer.apply(x) + layer.pre_bias(), rcond=1e-9, limits=limits)
    assert_close(found.x, x, rtol=0, atol=1e-6)
    assert found.report.iterations


WAYS = {
    "gradients alone": ((2, 8, 3, 1, 1), SolverLimits()),
    "gradients first": ((4, 8, 3, 2, 1), SolverLimits()),
    "weights first": ((6, 5, 3, 1, 1), WEIGHTS_FIRST),
    "weights alone": ((1, 8, 3, 1, 1), WEIGHTS_ALONE),
    "iterative": ((4, 8, 3, 2, 1), ITERATIVE),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_answer_to_a_change_is_that_of_the_dense_system(way, count):
    shape, limits = WAYS[way]
    layer, _, G, dz, z = sample(nn.Conv2d(*shape), 7, 7, count)
    found = solve_layer(layer, G, dz, z, rcond=1e-9, limits=limits)
    change = randn(count, *layer.input_shape, seed=7)
    dG = sum(layer.weight_gradient(*image) for image in zip(change, dz, strict=True))
    answer = found.sensitivity(dG, layer.apply(change))
    assert found.report.deficit == 0 and (answer - change).norm() < 0.15 * change.norm()
    if way != "iterative":
        assert_close(answer, change, rtol=0, atol=1e-6)


def test_shapes_are_checked_and_a_mask_is_for_a_single_image():
    layer, _, G, dz, z = both_kinds(count=2)
    with pytest.raises(ValueError, match=r"dz is \(8, 5, 5\), but must be \(2, 8, 5, 5\)"):
        solve_layer(layer, G, dz[0], z, rcond=1e-6)
    with pytest.raises(ValueError, match="needs a single image, not 2"):
        solve_layer(layer, G, dz, z, rcond=1e-6, known=z > 0)


def test_a_weight_system_that_only_repeats_the_gradients_adds_no_rank():
    """Pooling of z over all windows leaves W in the span of K: rounding must not pass for rank."""
    network = sequential(nn.Conv1d(1, 3, 3, 2), nn.AvgPool1d(3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1))
    layer = rgap.prepare(network, (1, 21)).layers[0]
    x, dz = randn(*layer.input_shape), randn(*layer.output_shape)
    weight = layer.weight.clone().requires_grad_()
    z = layer.after.apply(nn.functional.conv2d(x[None], weight, layer.bias, layer.stride))[0]
    (G,) = torch.autograd.grad((z * dz).sum(), weight)
    report = solve_layer(layer, G, dz[None], z.detach()[None], rcond=1e-5).report
    assert report.rank == 17 and report.deficit == 4
