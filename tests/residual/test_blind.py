"""The blind layer: input and output gradient from a convolution's own gradient, against the values that made it."""

import pytest
import torch

from rgap.residual.blind import solve_blind


def convolution(filters, channels, image, kernel=3, padding=1, stride=1, images=1, seed=0):
    """(G, Σ_p δz, x, δz) of a convolution with the zeros of ReLU on both sides, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, *image, generator=generator, dtype=torch.float64).relu()
    weight = torch.zeros(filters, channels, kernel, kernel, dtype=torch.float64, requires_grad=True)
    z = torch.nn.functional.conv2d(x, weight, None, stride, padding)
    dz = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    dz = dz * (torch.rand(z.shape, generator=generator) > 0.5)
    (G,) = torch.autograd.grad(z, weight, dz)
    return G, dz.sum((0, 2, 3)), x, dz


def error(found, true):
    return ((found - true[0]).norm() / true.norm()).item()


SHAPES = {
    "more filters": (40, 12, (4, 4)),
    "more channels": (12, 40, (4, 4)),
    "few of both": (10, 10, (4, 4)),
    "5×5": (20, 20, (5, 4), 5, 2),
    "stride 2": (40, 40, (8, 8), 5, 2, 2),
    "no padding": (24, 24, (5, 6), 3, 0),
    "one pixel": (6, 5, (1, 1)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_gradient_gives_both_sides_of_its_convolution(shape, dtype, limit):
    G, sums, x, dz = convolution(*shape)
    geometry = {"padding": (*shape[3:], 3, 1)[1] if len(shape) > 4 else 1, "stride": shape[5] if len(shape) > 5 else 1}
    solution = solve_blind(G.to(dtype), shape[2], sum_dz=sums.to(dtype), **geometry)
    assert solution.certified, solution.reason
    assert error(solution.x, x) < limit and error(solution.dz, dz) < limit
    assert error(solution.x, x) < 10 * solution.predicted_error + 1e-15


@pytest.mark.parametrize(("padding", "unique"), [((1, 1, 1, 2), True), ((1, 1, 0, 2), False)])
def test_padding_that_differs_between_the_sides(padding, unique):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, 4, generator=generator, dtype=torch.float64)
    weight = torch.zeros(20, 20, 3, 3, dtype=torch.float64, requires_grad=True)
    z = torch.nn.functional.conv2d(torch.nn.functional.pad(x, padding)[None], weight)
    dz = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (G,) = torch.autograd.grad(z, weight, dz)
    solution = solve_blind(G, (4, 4), padding=padding, sum_dz=dz.sum((0, 2, 3)))
    assert solution.certified == unique
    assert not unique or error(solution.x, x[None]) < 1e-12


def test_without_a_sum_the_solution_stands_up_to_a_scalar():
    G, _, x, _ = convolution(20, 20, (4, 4))
    solution = solve_blind(G, (4, 4), padding=1)
    scale = (solution.x * x[0]).sum() / solution.x.square().sum()
    assert solution.certified and error(scale * solution.x, x) < 1e-12


def test_noise_is_predicted():
    G, sums, x, _ = convolution(40, 40, (4, 4))
    noise = 1e-4 * G.square().mean().sqrt().item()
    noisy = G + noise * torch.randn(G.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    solution = solve_blind(noisy, (4, 4), padding=1, sum_dz=sums, noise_std=noise)
    assert solution.certified and 0.2 < error(solution.x, x) / solution.predicted_error < 5
    undeclared = solve_blind(noisy, (4, 4), padding=1, sum_dz=sums)
    assert not undeclared.certified and "own equations are missed" in undeclared.reason


def refusals():
    G, sums, *_ = convolution(20, 20, (4, 4))
    batch, batch_sums, *_ = convolution(40, 40, (4, 4), images=2)
    narrow, narrow_sums, *_ = convolution(6, 6, (4, 4))
    tampered = G.clone()
    tampered[3, 4, 1, 1] += 0.01 * G.abs().max()
    silent = torch.cat([G[:8], torch.zeros_like(G[:12])])
    one_row = convolution(40, 1, (4, 4))
    return {
        "batch": (batch, batch_sums, "has more"),
        "narrow": (narrow, narrow_sums, "by its shapes"),
        "tampered": (tampered, sums, "more"),
        "bias of another layer": (G, sums.flip(0), "the gradient of its bias differs"),
        "no bias": (G, torch.zeros(20), "the gradient of its bias differs"),
        "silent": (silent[:, :4], sums, "only"),
        "one channel": (one_row[0], one_row[1], "by its shapes"),
        "zero": (torch.zeros_like(G), sums, "the gradient is zero"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_does_not_hold_is_not_certified(name):
    G, sums, reason = refusals()[name]
    solution = solve_blind(G, (4, 4), padding=1, sum_dz=sums)
    assert not solution.certified and reason in solution.reason, solution.reason


def test_wrong_arguments_are_named():
    G, sums, *_ = convolution(20, 20, (4, 4))
    with pytest.raises(ValueError, match=r"gradient of a convolution, \(O, C, kh, kw\), not \(20, 20\)"):
        solve_blind(G[:, :, 0, 0], (4, 4))
    with pytest.raises(ValueError, match=r"sum_dz has shape \(3,\); it must be \(20,\)"):
        solve_blind(G, (4, 4), sum_dz=sums[:3])
    with pytest.raises(ValueError, match="3 taps with dilation 1 do not fit 2 pixels"):
        solve_blind(G, (2, 4))
