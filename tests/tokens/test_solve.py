"""The linear system of the patches against dense linear algebra, its rank law, its errors, and priors."""

import pytest
import torch
from vits import SHAPE, small

from rgap.results import PixelRange
from rgap.tokens import recognise
from rgap.tokens.solve import PatchSystem, regularised_patches, ridge_prior, smooth_prior, solve_patches


def draw(tokens, width, entries=6, noise=0.0, seed=0, orthogonal=True):
    """A system whose Δ has rows orthogonal to the ones and of very different lengths; and its patches."""
    generator = torch.Generator().manual_seed(seed)
    delta, patches, error, other = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, width), (tokens, entries), (width, entries), (tokens, width))
    )
    delta = delta - orthogonal * delta.mean(1, keepdim=True)
    delta = delta * torch.logspace(-3, 0, tokens, dtype=torch.float64)[:, None]
    stds = (torch.full_like(t, max(noise, 1e-17)) for t in (delta, error))
    return PatchSystem(delta + noise * other, delta.T @ patches + noise * error, *stds), patches


@pytest.mark.parametrize(("tokens", "width", "rank"), [(8, 9, 8), (8, 20, 8), (8, 8, 7), (8, 5, 4)])
def test_rank_law(tokens, width, rank):
    system, patches = draw(tokens, width)
    found = solve_patches(system, 2.2e-16)
    assert found.rank == rank == min(tokens, width - 1)
    assert found.null.shape == (tokens, tokens - rank)
    assert torch.allclose(
        system.delta.T @ found.null, torch.zeros(width, tokens - rank, dtype=torch.float64), atol=1e-12
    )
    if rank == tokens:
        assert torch.allclose(found.patches, patches, rtol=1e-8, atol=1e-9)


def test_it_is_the_least_squares_solution():
    system, _ = draw(7, 12, noise=1e-6)
    dense = torch.linalg.lstsq(system.delta.T, system.G, driver="gelsd").solution
    assert torch.allclose(solve_patches(system, 1e-9).patches, dense, rtol=1e-6, atol=1e-6)


def test_a_wide_layer_without_norm_has_one_rank_more():
    assert solve_patches(draw(8, 8, orthogonal=False)[0], 2.2e-16).rank == 8


@pytest.mark.parametrize("noise", [1e-8, 1e-7])
def test_predicted_errors_are_those_found(noise):
    found, true = [], []
    for seed in range(20):
        system, patches = draw(8, 24, noise=noise, seed=seed)
        solution = solve_patches(system, noise)
        found.append(solution.std.square().mean())
        true.append((solution.patches - patches).square().mean())
    assert 0.7 < (torch.stack(true).mean() / torch.stack(found).mean()).sqrt() < 1.4


def test_surplus_equations_measure_undeclared_noise():
    system, _ = draw(8, 64, noise=1e-6)
    quiet = PatchSystem(system.delta, system.G, system.delta_std / 100, system.G_std / 100)
    assert solve_patches(quiet, 1e-9).excess == pytest.approx(100, rel=0.2)


def noisy_transformer(noise):
    """A smooth image, the system of its noisy gradient, and where its patches lie."""
    model = small(width=64).double()
    embedding = recognise(model, SHAPE)
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 16), indexing="ij")
    image = (0.5 + 0.3 * torch.sin(x) * torch.cos(y)).expand(1, 3, -1, -1).double()
    loss = torch.nn.functional.cross_entropy(model(image), torch.tensor([1]))
    E, q = torch.autograd.grad(loss, [model.get_parameter(embedding.weight_name), model.pos_embed])
    generator = torch.Generator().manual_seed(0)
    stds = [noise * g.square().mean().sqrt() for g in (q, E)]
    q, E = (g + s * torch.randn(g.shape, generator=generator, dtype=g.dtype) for g, s in zip((q, E), stds, strict=True))
    delta, G = q.flatten()[embedding.position_entries], E.flatten(1)
    return image, embedding, PatchSystem(delta, G, stds[0].expand_as(delta), stds[1].expand_as(G))


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_ridge_beats_least_squares_and_the_smooth_prior_both(noise):
    image, embedding, system = noisy_transformer(noise)

    def error(patches):
        return (embedding.image(patches) - image).square().mean().sqrt().item()

    plain = error(solve_patches(system, noise, rcond=0.0).patches)
    ridge, _ = regularised_patches(system, ridge_prior(embedding, PixelRange()))
    smooth, predicted = regularised_patches(system, smooth_prior(embedding, PixelRange()))
    assert error(smooth) < error(ridge) < plain
    assert error(smooth) < 2 * predicted


def test_without_noise_a_prior_changes_nothing():
    image, embedding, system = noisy_transformer(1e-12)
    for prior in (ridge_prior, smooth_prior):
        patches, predicted = regularised_patches(system, prior(embedding, PixelRange()))
        assert (embedding.image(patches) - image).abs().max() < 1e-6
        assert predicted < 1e-6
