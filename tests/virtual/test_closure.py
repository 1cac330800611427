from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from cases import ASINH, SECOND, TALL, attack, convs, open_problem, randn, sequential
from torch import nn

import rgap
from rgap.virtual.closure import solve_virtual
from rgap.virtual.inference import assemble, update
from rgap.virtual.linearisation import fit

EXACT_DB = {torch.float32: 90, torch.float64: 200}


def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_deficient_second_convolution_is_recovered_through_the_first(dtype, bias, seed):
    network = convs(*SECOND, seed=seed, bias=bias)
    image, result, psnr, reports = attack(network, seed, dtype=dtype)
    assert result.verdict == "exact" and psnr >= EXACT_DB[dtype] and result.labels.tolist() == [seed]
    second = reports["2"]
    signs = rgap.prepare(network, (3, 12, 12)).layer_inputs(image)["2"][0].flatten(1) > 0
    constant = int((signs.all(1) | ~signs.any(1)).sum())  # pairs of such channels are redundant too
    known = 0 if bias else 12 + constant * (constant - 1)
    assert second.deficit == 60 and second.virtual_constraints == 588 - known
    assert 1 <= second.iterations <= 10 and second.condition < 1e3 and second.residual < 1e-5
    assert not result.candidates[0].open_layers
    assert result.candidates[0].beliefs["2"].shape == (second.iterations, 588)
    assert "layers short of full rank, closed by virtual constraints: '2' by 60" in result.notes


@pytest.mark.parametrize("activation", [partial(nn.LeakyReLU, 0.2), nn.Sigmoid, nn.Tanh])
def test_a_narrow_layer_behind_an_ill_conditioned_one_is_recovered(activation):
    """LeNet's first layer is square; of the second's 1,200 unknowns 48 are open, and the gradient adds 900."""
    convolutions = [nn.Conv2d(3, 12, 5, 2, 2), activation(), nn.Conv2d(12, 4, 5, 2, 2), activation()]
    _, result, psnr, reports = attack(sequential(*convolutions, nn.Flatten(), nn.Linear(100, 1)), 0, 20)
    assert reports["2"].deficit == 48 and result.verdict == "exact" and psnr > 70


def test_the_error_of_a_closed_layer_is_predicted():
    ratios = []
    for seed in range(4):
        network = convs(*SECOND, seed=seed)
        image, result, _, reports = attack(network, seed)
        truth = rgap.prepare(network.double(), (3, 12, 12)).layer_inputs(image)
        for name in ("0", "2"):
            error = (result.candidates[0].layer_inputs[name] - truth[name]).square().mean().sqrt().item()
            ratios.append(reports[name].predicted_error / error)
    assert all(1 / 5 < ratio < 5 for ratio in ratios), ratios
    problem, x = open_problem(60)
    noisy = replace(problem, G=problem.G * (1 + 1e-6 * randn(*problem.G.shape).numpy()), noise=1e-6)
    found = solve_virtual(noisy)
    assert found.certified and 1 / 3 < np.linalg.norm(found.draw) / np.linalg.norm(found.x - x) < 3


def test_without_virtual_constraints_it_stays_open():
    _, result, psnr, reports = attack(convs(*SECOND), virtual_constraints=False)
    assert result.verdict == "rank-deficient" and psnr < 30
    assert reports["2"].deficit == 60 and reports["2"].virtual_constraints is None
    assert result.candidates[0].open_layers == ("2",) and not result.candidates[0].beliefs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("specs", "deficits"),
    [
        pytest.param([(8, 4, 2, 2), (12, 3, 1, 1), (6, 3, 2, 1)], {"4": 60}, id="the third"),
        pytest.param([TALL, (6, 3, 2, 1), (24, 3, 1, 1), (2, 3, 2, 1)], {"6": 44, "2": 60}, id="second and fourth"),
    ],
)
def test_layers_further_up_are_recovered_too(dtype, specs, deficits):
    _, result, psnr, reports = attack(convs(*specs, seed=3), 1, dtype=dtype)
    assert {name: report.deficit for name, report in reports.items() if report.deficit} == deficits
    assert all(reports[name].virtual_constraints > deficit for name, deficit in deficits.items())
    assert result.verdict == "exact" and psnr >= EXACT_DB[dtype]


def test_layers_without_activations_are_closed_by_linear_algebra():
    _, result, psnr, reports = attack(convs(*SECOND, slope=1))
    assert result.verdict == "exact" and psnr >= 90 and reports["2"].deficit == 60


@pytest.mark.slow
def test_a_system_with_little_surplus_starts_from_the_prior_on_photographs():
    """16 pixels a side: the image that comes back is noise, so that the start can mislead but not decide."""
    _, result, psnr, reports = attack(convs(TALL, (6, 3, 2, 1), (16, 3, 1, 1), size=16), size=16)
    assert reports["2"].deficit == 306
    assert result.verdict == "exact" and psnr >= 90


@pytest.mark.slow
@pytest.mark.parametrize(
    "specs",
    [
        pytest.param([(2, 4, 2, 2), (16, 3, 1, 1)], id="the first, which has none before it"),
        pytest.param([(3, 4, 2, 2), (1, 3, 2, 1), (9, 3, 1, 1)], id="the first and the second"),
        pytest.param([TALL, (6, 3, 2, 1), (1, 3, 1, 1)], id="two neighbours"),
        pytest.param([(12, 4, 2, 2, 3), (6, 3, 2, 1), (16, 3, 1, 1)], id="groups in the layer before"),
        pytest.param([TALL, (6, 3, 2, 1, 3), (16, 3, 1, 1)], id="more than the layer before supplies"),
    ],
)
def test_what_the_layer_before_cannot_close_is_called_rank_deficient(specs):
    _, result, psnr, reports = attack(convs(*specs, seed=1))
    assert result.verdict == "rank-deficient" and psnr < 40
    assert any(report.deficit for report in reports.values())
    assert any("what they leave open was not determined" in note for note in result.notes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_over_widths_and_seeds_exact_means_the_image(seed):
    """From full rank to far beyond the limit; the layer before supplies 3 to 5 equations an output position."""
    verdicts = {}
    for width in (2, 4, 5, 6, 8):
        dtype = (torch.float32, torch.float64)[(seed + width) % 2]
        network = convs((5 + seed % 3, 4, 2, 2), (width, 3, 2, 1), (16, 3, 1, 1), seed=20 * seed)
        _, result, psnr, reports = attack(network, seed, dtype=dtype)
        verdicts[width] = result.verdict
        assert result.verdict == ("exact" if psnr >= 70 else "rank-deficient"), (width, psnr)
        assert reports["2"].deficit or result.verdict == "exact"
    assert verdicts[2] == "rank-deficient" and verdicts[8] == "exact"


@pytest.mark.slow
def test_cnn6_d_gives_a_face_back():
    images, labels = rgap.data.load_images("embedded", index=0, classes=2)
    model = rgap.models.cnn6_d()
    result = rgap.reconstruct(model, rgap.client_gradients(model, images, labels), (3, 32, 32), gradient_scale=1.0)
    assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, images).item() >= 85
    report = result.to_frame().set_index("name").loc["2"]
    assert report.deficit == 280 and report.virtual_constraints > 396
    assert report.iterations <= 10 and report.condition < 100


@pytest.mark.parametrize("count", [30, 60])
def test_the_problem_alone_is_solved_and_certified(count):
    problem, x = open_problem(count)
    found = solve_virtual(problem)
    assert found.certified and relative(found.x, x) < 1e-12
    assert found.beliefs.shape == (found.iterations, len(x)) and relative(found.beliefs[-1], x) < 1e-4
    assert found.residual < 1e-12 and found.condition < 100
    assert problem.homogeneous and problem.unknowns == count


def test_every_gradient_equation_counts_where_a_bias_breaks_the_scale():
    problem, x = open_problem(60, conv=nn.Conv2d(3, 12, 4, 2, 2))
    found = solve_virtual(problem)
    assert found.certified and relative(found.x, x) < 1e-12
    assert not problem.homogeneous and found.equations == open_problem(60)[0].previous.left.shape[1] + 192


def test_an_input_of_zeros_or_a_prior_without_width_is_refused():
    problem, x = open_problem(4)
    with pytest.raises(np.linalg.LinAlgError):
        solve_virtual(replace(problem, x=0 * problem.x))
    fitted = fit(problem.activation, problem.x, np.ones(len(x)))
    image, channels = np.zeros(len(problem.previous.pinv)), np.arange(len(problem.G))
    rows = assemble(problem, fitted, problem.x, image, channels, None, 1e-7)
    with pytest.raises(np.linalg.LinAlgError, match="overflow"):
        update(rows, fitted, problem.N, np.zeros(rows.A.shape[1]))


def test_too_few_equations_end_the_attempt_early():
    problem, x = open_problem(290)
    G, previous = problem.G[:, :, :1, :1], problem.previous
    hopeless = replace(problem, previous=replace(previous, left=previous.left[:, :4], gains=previous.gains[:4]))
    assert G.size < 290 and not solve_virtual(hopeless).certified
    assert len(x) == 300


@pytest.mark.parametrize("accuracy", [1e-6, 1e-3])
def test_ill_conditioned_directions_are_corrected(accuracy):
    """The layer itself is off by its accuracy along directions that the layer before sees well."""
    problem, x = open_problem(40)
    weak = problem.N[:, 30:]
    error = accuracy * randn(10, seed=5).numpy()
    off = replace(
        problem, x=x - problem.N[:, :30] @ (problem.N[:, :30].T @ x) + weak @ error, known=np.full(10, accuracy)
    )
    found = solve_virtual(off)
    assert off.unknowns == 40 and found.certified
    assert relative(found.x, x) < 1e-10 < relative(off.x + off.N[:, :30] @ (off.N[:, :30].T @ x), x)


@pytest.mark.parametrize("count", [20, 60])
def test_smooth_activations_are_solved_too(count):
    problem, x = open_problem(count, ASINH, noise=1e-9)
    found = solve_virtual(problem)
    assert not problem.homogeneous and found.certified and relative(found.x, x) < 1e-6
