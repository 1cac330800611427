"""The patches from the gradients of patch and position embedding: ∂ℓ/∂E = Δᵀ P with ∂ℓ/∂q_t = δ_t, the rows of Δ.

Where the width does not exceed the number of patches, P = P₀ + N C is open with few unknowns C: Gauss–Newton on the
rest of the gradient closes it (ours). The gradients of attention, layer norms and the layers behind them are smooth
functions of E C, and have many more entries. What E maps to nothing, or to a multiple of the ones, which layer norm
takes away, stays open: a patch must have fewer entries than a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.linalg import svd
from rgap.results import PixelRange
from rgap.tokens.embedding import PatchEmbedding

MIN_SURPLUS_EQUATIONS = 30  # surplus equations from which the noise is measured by what they miss
RCOND_ROUNDINGS = 2.0  # roundings of the gradient below which, times √(T + D), a singular value of Δ counts as zero
PIXEL_STD_SHARE = 0.25  # standard deviation of a pixel before anything is known of it, as a share of the pixel range
CHANNEL_CORRELATION = 0.9  # correlation of the channels of one pixel in photographs
CORRELATION_LENGTH_SHARE = 0.5  # distance over which pixels' correlation falls to 1 / e, as a share of the image's side
MAX_UNKNOWNS = 256  # most entries of C that are looked for: every step takes as many gradients
EQUATIONS_PER_UNKNOWN = 16  # entries of the gradient that are drawn for each unknown
MAX_STEPS = 20  # steps of Gauss–Newton; near the solution the digits double with each
MAX_HALVINGS = 4  # times a step is halved that would make the residual larger
MIN_GAIN = 0.95  # ratio of residuals, after and before a step, from which no further one is made
DIFFERENCE_STEP = 1e-6  # step of the difference quotients, in pixel units
MIN_SIGMA_RATIO = 1e-5  # smallest over largest singular value of the Jacobian from which no entry of C is mere rounding


@dataclass(frozen=True)
class PatchSystem:
    """ΔᵀP = G, with the errors of both sides."""

    delta: Tensor  # gradients of the tokens, (T, D)
    G: Tensor  # gradient of the patch embedding's weight, (D, n)
    delta_std: Tensor  # standard deviation of the error of every entry of `delta`
    G_std: Tensor  # the same for `G`

    def equation_variance(self, patches: Tensor) -> Tensor:
        """Variance of the error of every equation, (D, n), with the errors of Δ as the patches magnify them."""
        return self.G_std.square() + self.delta_std.square().T @ patches.square()


@dataclass(frozen=True)
class PatchSolution:
    """The patches and how well they are determined."""

    patches: Tensor  # (T, n)
    rank: int  # singular values of Δ kept, at most min(T, D − 1) behind layer norms
    null: Tensor  # orthonormal basis of the combinations of tokens that the equations leave open, (T, T − rank)
    condition: float  # largest over smallest singular value kept
    above: float  # smallest singular value kept, relative to the largest
    below: float | None  # largest dropped, relative to the largest; None where none was
    residual: float  # ‖ΔᵀP − G‖ / ‖G‖
    std: Tensor  # predicted standard deviation of every entry of `patches`
    excess: float | None  # times the known noise that the surplus equations show; None where there are too few


def patch_system(embedding: PatchEmbedding, gradients: dict[str, Tensor], stds: dict[str, Tensor]) -> PatchSystem:
    """Gathers the equations from named gradients and the standard deviations of their entries."""

    def rows(tensors: dict[str, Tensor]) -> Tensor:
        return tensors[embedding.position_name].flatten()[embedding.position_entries]

    G, G_std = (tensors[embedding.weight_name].flatten(1) for tensors in (gradients, stds))
    return PatchSystem(rows(gradients), G, rows(stds), G_std)


def solve_patches(system: PatchSystem, precision: float, rcond: float | None = None) -> PatchSolution:
    """Solves ΔᵀP = G by least squares, with the tokens' gradients scaled to unit norm (ours).

    Every path from a token to the loss passes a layer norm, whose adjoint is orthogonal to the ones: Δ has rank
    min(T, D − 1) at most, and the patches are determined where the width exceeds their number.
    Singular values below rcond times the largest count as zero, by default matched to the precision of the gradients.
    """
    norms = system.delta.norm(dim=1, keepdim=True)
    scales = torch.where(norms > 0, norms, 1.0)
    U, S, Vh = svd((system.delta / scales).T)
    count, width = system.delta.shape
    if rcond is None:
        rcond = min(max(RCOND_ROUNDINGS * precision * (count + width) ** 0.5, 1e-12), 0.1)
    rank = int((S > rcond * S[0]).sum())
    pseudo_inverse = (Vh[:rank].T / S[:rank]) @ U[:, :rank].T / scales
    patches = pseudo_inverse @ system.G
    patches = patches + pseudo_inverse @ (system.G - system.delta.T @ patches)
    miss = system.delta.T @ patches - system.G
    variance = system.equation_variance(patches)
    surplus = (min(width, system.G.shape[0]) - rank) * system.G.shape[1]
    expected = variance.sum().item() * (1 - rank / width)
    measured = surplus >= MIN_SURPLUS_EQUATIONS and rank < width and expected > 0
    excess = (miss.square().sum().item() / expected) ** 0.5 if measured else None
    ratios = (S / S[0]).tolist()
    null = torch.linalg.qr(torch.cat([Vh[:rank].T * scales, torch.eye(count, dtype=S.dtype)], 1))[0][:, rank:count]
    below = ratios[rank] if rank < len(ratios) else (0.0 if rank < count else None)
    residual = (miss.norm() / system.G.norm()).item()
    std = (pseudo_inverse.square() @ variance).sqrt() * (1.0 if excess is None else excess)
    return PatchSolution(patches, rank, null, 1 / ratios[rank - 1], ratios[rank - 1], below, residual, std, excess)


@dataclass(frozen=True)
class PatchPrior:
    """What is known of patches beforehand: P = mean + scale ∘ Q with Q normal of mean 0 and variance 1.

    The means of patches are correlated from patch to patch, what is left of them within a patch alone.
    """

    mean: Tensor  # (T, n), the patches of a grey image
    scale: Tensor  # (T, n), the standard deviation of their entries
    tokens: Tensor  # correlation of the patches' means, (T, T)
    entries: Tensor  # correlation of the entries of one patch, (n, n)
    channels: Tensor  # orthonormal indicators of the entries of each channel, (n, C)


def ridge_prior(embedding: PatchEmbedding, pixels: PixelRange) -> PatchPrior:
    """Pixels that are independent of each other: ridge regression."""
    low, high = (pixels.low, pixels.high) if math.isfinite(pixels.high - pixels.low) else (0.0, 1.0)
    (T, n), dtype = embedding.scale.shape, embedding.scale.dtype
    mean = embedding.shift + embedding.scale * (low + high) / 2
    std = PIXEL_STD_SHARE * (high - low) * embedding.scale.abs()
    channels = torch.nn.functional.one_hot(_coordinates(embedding)[0][_whole(embedding)].long()).to(dtype)
    channels = channels / channels.norm(dim=0).clamp(min=1.0)
    return PatchPrior(mean, std, torch.eye(T, dtype=dtype), torch.eye(n, dtype=dtype), channels)


def smooth_prior(embedding: PatchEmbedding, pixels: PixelRange) -> PatchPrior:
    """Pixels whose correlation falls exponentially with their distance, within a patch and from patch to patch."""
    prior = ridge_prior(embedding, pixels)
    places = torch.stack(_coordinates(embedding)[1:], -1)  # (T, n, 2)
    length = CORRELATION_LENGTH_SHARE * max(embedding.image_shape[1:])
    tokens, entries = (
        torch.exp(-torch.cdist(points, points) / length) for points in (places.mean(1), places[_whole(embedding)])
    )
    same = prior.channels @ prior.channels.T > 0
    return replace(prior, tokens=tokens, entries=entries * torch.where(same, 1.0, CHANNEL_CORRELATION))


def _coordinates(embedding: PatchEmbedding) -> tuple[Tensor, ...]:
    """Channel, row and column of the pixel that every entry reads, (T, n) each; those of padding are 0."""
    _, height, width = embedding.image_shape
    pixels = embedding.pixels
    return tuple(axis.double() for axis in (pixels // (height * width), pixels // width % height, pixels % width))


def _whole(embedding: PatchEmbedding) -> int:
    """A patch that reads as little padding as any."""
    return int((embedding.scale != 0).sum(1).argmax())


def regularised_patches(system: PatchSystem, prior: PatchPrior, excess: float = 1.0) -> tuple[Tensor, float]:
    """The patches' posterior mean under a prior, and the root mean square of its standard deviation.

    Noise in Δ makes least squares shrink what it multiplies (errors in variables); each token's gradient is therefore
    shrunk beforehand by the share of it that is no noise (regression calibration). In the eigenvectors of the entries'
    correlation the columns then decouple: each is a ridge regression with the tokens' correlation.
    `excess` is the multiple of the known noise to be reckoned with.
    """
    delta_variance = excess**2 * system.delta_std.square().mean(1, keepdim=True)  # (T, 1)
    power = system.delta.square().mean(1, keepdim=True).clamp(min=1e-300)
    kept = (1 - delta_variance / power).clamp(min=0)
    delta = kept * system.delta
    size = prior.scale.mean()
    unit = prior.scale.mean(0) / size  # (n,)
    kappa, basis = torch.linalg.eigh(prior.entries)
    kappa = kappa.clamp(min=1e-12)
    Y = ((system.G - delta.T @ prior.mean) / unit) @ basis
    squares = ((prior.mean / unit) @ basis).square() + size**2 * kappa
    noise = excess**2 * (system.G_std / unit).square().mean() + (kept * delta_variance * squares).sum(0)
    noise = noise.clamp(min=1e-300)
    Q, variance = torch.empty_like(prior.mean), 0.0
    means = (basis.T @ prior.channels).square().sum(1) > 0.5  # columns that are a patch's mean in its channels
    for columns, correlation in ((means, prior.tokens), (~means, torch.eye(len(delta), dtype=kappa.dtype))):
        root = torch.linalg.cholesky(correlation + 1e-10 * torch.eye(len(delta), dtype=kappa.dtype)) * size
        W, s, Vh = svd(delta.T @ root)
        gain = kappa[columns] / (s.square()[:, None] * kappa[columns] + noise[columns])  # (k, columns)
        right = root @ Vh.T
        Q[:, columns] = right @ (s[:, None] * gain * (W.T @ Y[:, columns]))
        unseen = (root.square().sum() - right.square().sum()).clamp(min=0)
        variance += (right.square().sum(0)[:, None] * gain * noise[columns]).sum() + unseen * kappa[columns].sum()
    return prior.mean + Q @ basis.T * unit, (variance / Q.numel()).sqrt().item()


@dataclass(frozen=True)
class Closed:
    """Patches with their open part determined."""

    patches: Tensor  # (T, n)
    error: float  # predicted root-mean-square error of their entries, by the residual of the worst tensor
    equations: int  # entries of the gradient that were used
    steps: int  # steps of Gauss–Newton


def close_by_gradient(
    gradients: Callable[[Tensor], Mapping[str, Tensor]], shared: Mapping[str, Tensor], patches: Tensor, null: Tensor
) -> Closed | None:
    """Determines C of P = P₀ + N C, with P₀ (T, n) the patches and N (T, d) orthonormal, from the whole gradient.

    `gradients` gives the gradient of the image of patches (T, n) by parameter name, `shared` has those that are more
    than rounding. None where there are too many unknowns, or some have no effect.
    """
    unknowns = null.shape[1] * patches.shape[1]
    if unknowns > MAX_UNKNOWNS:
        return None
    generator = torch.Generator().manual_seed(0)
    each = -(-EQUATIONS_PER_UNKNOWN * unknowns // len(shared))
    drawn = {name: torch.randperm(g.numel(), generator=generator)[:each] for name, g in shared.items()}
    sizes = {name: g.square().mean().sqrt() for name, g in shared.items()}

    def miss(P: Tensor) -> list[Tensor]:
        mine = gradients(P)
        return [((mine[n] - shared[n]) / sizes[n]).flatten()[entries] for n, entries in drawn.items()]

    steps_of_C = DIFFERENCE_STEP * torch.eye(unknowns, dtype=null.dtype).reshape(-1, null.shape[1], patches.shape[1])
    now, steps, spread = miss(patches), 0, torch.inf
    while steps < MAX_STEPS:
        base = torch.cat(now)
        J = torch.stack([(torch.cat(miss(patches + null @ C)) - base) / DIFFERENCE_STEP for C in steps_of_C], 1)
        sigmas = torch.linalg.svdvals(J)
        if not sigmas[-1] > MIN_SIGMA_RATIO * sigmas[0]:
            return None
        move = null @ torch.linalg.lstsq(J, -base).solution.reshape(null.shape[1], -1)
        for _ in range(MAX_HALVINGS + 1):
            after = miss(patches + move)
            gain = (torch.cat(after).norm() / base.norm()).item()
            if gain < 1:
                break
            move = move / 2
        if not gain < 1:
            break
        patches, now, steps = patches + move, after, steps + 1
        spread = sigmas.pow(-2).sum().item()
        if gain > MIN_GAIN:
            break
    worst = max(part.square().mean().sqrt().item() for part in now)
    return Closed(patches, worst * (spread / patches.numel()) ** 0.5, len(torch.cat(now)), steps)
