"""How far an image's gradient misses the shared one, tensor by tensor, and whether noise explains it (ours).

What a misfit does to the image depends on its structure: white noise of one size hardly moves a least-squares solution,
the same norm in one direction does. So misfits are measured by their spectral norm, against that of one draw of the
noise and of what this draw makes of the image. A tensor that misses by a few times as much is no evidence against the
image, but enlarges its predicted error; beyond that nothing is certified. Noise that was not declared but inferred must
also look like white noise: of the same size in at least two tensors, along the directions that nothing else explains.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from rgap.head.hypothesis import Start, least_squares_input, rank_one
from rgap.linalg import distance, largest_eigenvalue, largest_entry, norm, rms
from rgap.network.layer import Chain
from rgap.shared_gradient import SharedGradient

NOISE_RESIDUAL_FACTOR = 5.0  # multiple of its prediction up to which a tensor's misfit is attributed to noise
CHANCE_RATIO = 1.5  # the same that is usual by chance for the largest of all tensors, and enlarges no predicted error
SECOND_IMAGE_FACTOR = 2.5  # times the noise by which a dense layer's gradient may miss a single image's rank one
MIN_SURPLUS_SIDE = 3  # rows and columns from which such a gradient shows its rank
PLAIN_ROUNDINGS = 10.0  # errors of the head's δz, in roundings of the gradient, up to which they are those of entries
MAX_ALLOWED_RESIDUAL = 0.1  # residual from which a gradient is not reproduced, however large the noise is
WHITE_RATIO = 1.5  # ratio, either way, of a misfit's smaller singular values to those of the noise that was inferred
MIN_SURPLUS_ENTRIES = 30  # entries beside a tensor's larger singular values from which these tell whether it is noise
MIN_WHITE_TENSORS = 2  # tensors that must show noise of the same size before it counts as confirmed
SMALL_SIDE = 256  # rows or columns up to which singular values are computed from the smaller Gram matrix


@dataclass(frozen=True)
class NoiseProbe:
    """One draw of the noise, and how it changes a layer's output."""

    x: Tensor  # change of the output, (B, …)
    dx: Tensor  # change of the gradient by it, (B, …)
    generator: torch.Generator  # source of the random numbers drawn on the way

    @property
    def error(self) -> float:
        """Root mean square of the change of x."""
        return rms(self.x).item()


@dataclass(frozen=True)
class Misfit:
    """How the gradient of images compares with the shared one."""

    residual: float  # the largest relative residual of a parameter's gradient
    # the residual up to which the images are consistent: that at which, with all misfits scaled alike, the first tensor
    # would miss by more than noise explains
    allowed: float
    # the largest ratio of a tensor's misfit to its prediction, in units of `CHANCE_RATIO`, at least 1; the median of
    # all tensors where noise does not explain the largest
    excess: float = 1.0
    # predicted root-mean-square error of the image, of a batch that of every image, in order; empty without
    errors: tuple[float, ...] = ()
    largest_errors: tuple[float, ...] = ()  # predicted largest error of a pixel, likewise
    doubt: str = ""  # why noise that was inferred is no explanation; empty where it is


def drawn_head(chain: Chain, received: SharedGradient) -> tuple[Tensor, Tensor]:
    """Directions of the last layer's input and of the gradient by it, after a draw of the noise on its gradient."""
    head, bias = chain.layers[-1], chain.layers[-1].bias_name
    G = (head.gradient(received.gradients) + head.gradient(received.noise)).flatten(1)
    if bias is not None and received.gradients[bias].any():
        dz = received.gradients[bias] + received.noise[bias]
        x = least_squares_input(G, dz)
    else:
        factors = rank_one(G)
        x, dz = factors.v, factors.u
    return x, head.adjoint(dz[None, :, None, None]).flatten(1)


def start_probe(start: Start, drawn: tuple[Tensor, Tensor]) -> NoiseProbe:
    """A single image's start with a draw of the noise on the last layer's gradient, from `drawn_head`.

    The draw turns x and δz. Their lengths are one number, of which a draw could be any small one: it has its standard
    deviation, except where nothing determines it.
    """
    (error,), (x, dx) = start.length_errors, drawn
    error = error if math.isfinite(error) else 0.0
    x, dx = _turned(x, start.x, error), _turned(dx, start.dx, -error)
    return NoiseProbe(x, dx, torch.Generator().manual_seed(1))


def _turned(drawn: Tensor, values: Tensor, error: float) -> Tensor:
    """The change of `values` (1, n) that turns them into the direction drawn, and lengthens them by `error`."""
    drawn = drawn.reshape(values.shape) / drawn.abs().max()
    return (1 + error) * norm(values) / norm(drawn) * (drawn * values).sum().sign() * drawn - values


def misfit(
    received: SharedGradient, mine: Mapping[str, Tensor], moved: Mapping[str, Tensor], *, single: bool = True,
    inferred: bool = False,
) -> Misfit:  # fmt: skip
    """Compares the gradient of images with the shared one, without errors of the images themselves.

    `mine` is their gradient by parameter name, float64, `moved` the same as one draw of the noise changes the images. A
    `single` image's gradient has rank one in every fully connected layer; `inferred` noise is from surplus equations.
    """
    shared = received.usable
    mine, moved = ({name: gradients[name].cpu() for name in shared} for gradients in (mine, moved))
    unit = max(map(largest_entry, shared.values()))
    rounding = received.rounding * received.client_rounding
    rounding = rounding if rounding > PLAIN_ROUNDINGS * received.precision else 0.0  # else the noise contains it
    worst, residuals, ratios = 0.0, [], [1.0]
    for name, g in shared.items():
        size, missed = norm(g), distance(mine[name], g)
        floor = received.arithmetic * (size or unit)
        residuals.append(missed / (size or unit))
        # Where arithmetic alone explains a misfit its structure does not matter, and norms are cheaper.
        structured, noise = not missed <= floor, received.noise[name]
        if structured:
            missed, by_draw = spectral_norm(mine[name] - g), spectral_norm(moved[name] - mine[name])
        else:
            by_draw = distance(moved[name], mine[name])
        by_noise = spectral_norm(noise) if structured else norm(noise)
        expected = math.hypot(by_draw, by_noise, rounding * size)
        if missed == 0:
            continue
        worst = max(worst, missed / max(NOISE_RESIDUAL_FACTOR * expected, floor))
        ratios += [missed / expected / CHANCE_RATIO] if expected > 0 else []
        if single and structured and g.ndim == 2 and min(g.shape) >= MIN_SURPLUS_SIDE and size > 0:
            beside = spectral_norm(_beside(mine[name], mine[name] - g)) if math.isfinite(missed) else math.inf
            noisy = math.hypot(by_noise, by_draw * (by_draw / size))
            worst = max(worst, beside / max(SECOND_IMAGE_FACTOR * noisy, floor))
    residual = max(residuals)
    allowed = min(residual / worst, MAX_ALLOWED_RESIDUAL) if worst > 0 else received.arithmetic
    excess = max(ratios) if worst <= 1 else max(1.0, median(ratios))  # no noise: what it would have to be
    doubt = _doubt(received, mine, moved) if inferred else ""
    return Misfit(residual, received.arithmetic if doubt else allowed, excess, doubt=doubt)


def _beside(one: Tensor, miss: Tensor) -> Tensor:
    """A misfit of a fully connected layer beside the row and the column of the gradient δz xᵀ of one image.

    Errors of x and of δz change that gradient in its row and its column; what lies beside them is no error of the image
    but noise on the entries, or another image.
    """
    x = one[one.abs().amax(1).argmax()]
    dz = one @ (x / x.norm())
    x, dz = x / x.norm(), dz / dz.norm()
    miss = miss - torch.outer(dz, dz @ miss)
    return miss - torch.outer(miss @ x, x)


def spectral_norm(g: Tensor) -> float:
    """The largest singular value of a tensor, as a matrix with a row an output; of a vector its norm."""
    unit = largest_entry(g)
    if unit == 0 or not math.isfinite(unit):
        return unit
    A = (g if g.ndim < 2 else g.flatten(1)) / unit  # squares of the smallest gradients underflow
    if A.ndim < 2 or min(A.shape) == 1:
        return unit * A.norm().item()
    if min(A.shape) > SMALL_SIDE:
        return unit * largest_eigenvalue(lambda v: A.T @ (A @ v), A.shape[1]) ** 0.5
    return unit * _singular_values(A)[-1].item()


def _singular_values(A: Tensor) -> Tensor:
    """Singular values of a matrix, the smallest first."""
    gram = A @ A.T if len(A) <= A.shape[1] else A.T @ A
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()


def _doubt(received: SharedGradient, mine: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> str:
    """Why a misfit does not look like the white noise that was inferred from it; empty where it does.

    A draw of that noise, with what it makes of the image, leaves a misfit with the same directions explained. The
    smaller half of its singular values is noise alone: those of the true misfit must be as large, in every tensor.
    """
    alike, unlike = [], []
    for name, g in received.usable.items():
        if g.ndim < 2:
            continue
        found, drawn = (mine[name] - g).flatten(1), (moved[name] - mine[name] - received.noise[name]).flatten(1)
        few, many = sorted(found.shape)
        if few // 2 * (few // 2 + many - few) < MIN_SURPLUS_ENTRIES:
            continue
        sizes = (_singular_values(M)[: few // 2].norm().item() for M in (found, drawn))
        ratio = operator.truediv(*(max(size, torch.finfo(g.dtype).tiny) for size in sizes))
        (alike if 1 / WHITE_RATIO < ratio < WHITE_RATIO else unlike).append((name, ratio))
    size = f"noise of standard deviation {received.white_noise:.2g}, estimated from surplus equations, is not confirmed"
    if unlike:
        name, ratio = max(unlike, key=lambda pair: abs(math.log(pair[1])))
        return f"{size}: the misfit of {name!r} is {ratio:.2g} times what white noise would leave beside its structure"
    if len(alike) < MIN_WHITE_TENSORS:
        return f"{size}: {len(alike)} tensors have surplus equations that show it; it takes {MIN_WHITE_TENSORS}"
    return ""
