"""The blind layer: a convolution's own gradient determines its input and its output gradient, up to one scalar (ours).

Nothing above the layer is needed: no head, no loss, no label. A split of the taps between δz and x makes the gradient a
matrix whose row space holds the shifts of x and nothing else that is shifts of one another (`equations.tap_splits`);
the scalar comes from the gradient of the bias, Σ_p δz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.equations.tap_splits import TapSplit, tap_splits
from rgap.linalg import svd
from rgap.residual.factors import Factors, ShiftSpace
from rgap.shared_gradient import entry_noise

SKETCH_SURPLUS = 32  # singular values computed beyond those that a split has: they show the noise
MIN_RANK_GAP = 10.0  # the last singular value of a split over the first that is noise
RANK_FLOOR = 1e-13  # singular value, relative to the largest, that float64 arithmetic alone leaves
MIN_GAP_OVER_MISSED = 30.0  # eigenvalue gap over what the largest eigenvalue lacks; below it several solutions fit
GAP_FLOOR = 1e-10  # smallest eigenvalue gap that float64 arithmetic resolves
RESIDUAL_FACTOR = 6.0  # residual, over that of the noise expected, up to which the layer's own equations hold
RESIDUAL_FLOOR = 1e-14  # residual of float64 arithmetic
EXACT_ERROR = 1e-12  # predicted relative error up to which a solution is certified whatever the noise
MAX_AMPLIFICATION = 100.0  # predicted relative error over the gradient's own, up to which a solution is certified
MAX_CERTIFIED_ERROR = 1e-2  # predicted relative error above which nothing is certified: the regime is not linear
MAX_SPLITS = 3  # splits whose eigenvectors are computed before a layer is given up


@dataclass(frozen=True)
class BlindSolution:
    """Input and output gradient of a convolution from its own gradient."""

    x: Tensor | None  # input, (C, H, W), float64; None where no split of the taps has full rank
    dz: Tensor | None  # gradient of the loss by the convolution's output, (O, H′, W′); None with x
    taps: tuple[int, int] | None  # taps (vertical, horizontal) that the split used puts on the side of δz; None with x
    sigma_above_cut: float  # last singular value of the split's rank, relative to the largest
    sigma_below_cut: float | None  # the next one; None where the matrix has no more
    gap: float  # 1 less the second eigenvalue: how far any other matrix of shifts is from the row space
    residual: float  # ‖G − δz [shifts of x]‖ / ‖G‖, over all taps
    predicted_error: float  # predicted relative error of x, from the noise of the gradient's entries
    certified: bool  # whether x and δz are the only ones that fit, fit, and are precise
    reason: str  # why not, in words; empty where certified


def solve_blind(
    G: Tensor, image: tuple[int, int], *, padding: int | tuple[int, int, int, int] = 0,
    stride: int | tuple[int, int] = 1, dilation: int | tuple[int, int] = 1, sum_dz: Tensor | None = None,
    noise_std: Tensor | float | None = None, sum_noise_std: Tensor | float | None = None,
) -> BlindSolution:  # fmt: skip
    """Recovers the input and the output gradient of a convolution from its weight's gradient alone.

    For one image: behind a batch the matrices have a multiple of the rank, which is found and refused.

    `G` is the gradient of the weight, (O, C, kh, kw), of one group where there are several, `image` the size (H, W)
    of the input; padding is on every side or (left, right, top, bottom) as `F.pad` takes it, stride and dilation are
    one number or (vertical, horizontal). `sum_dz` is Σ_p δz, (O,): the gradient of the bias, or that of the batch
    norm's behind it times γ / √(var + ε). `noise_std` and `sum_noise_std` are the standard deviations of the errors of
    both; None reads them from their rounding. Raises a ValueError if G or sum_dz has the wrong shape, or the kernel
    does not fit the padded image.
    """
    stride, dilation = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, dilation))
    padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    geometry = _checked(G, image, padding, stride, dilation, sum_dz)
    G, size = G.detach().double(), G.double().norm()
    if size == 0:
        return _nothing("the gradient is zero")
    found = _best_split(G / size, geometry)
    if isinstance(found, str):
        return _nothing(found)
    factors = Factors(tuple(image), tuple(G.shape[2:]), stride, padding, dilation)
    noise = _noise(G, noise_std) / size
    problem = _Equations((G / size).flatten(1), noise.expand(G.shape).flatten(1), factors)
    sums = None if sum_dz is None else sum_dz.detach().double() / size
    sum_noise = None if sums is None else _noise(sum_dz.detach().double(), sum_noise_std).expand(sums.shape) / size
    return problem.solve(found, sums, sum_noise, size)


@dataclass(frozen=True)
class _Found:
    """A solution of one split: one of both sides, up to its scalar."""

    split: TapSplit
    side: Tensor  # (C, pixels) or (O, outputs)
    sigmas: tuple[float, float | None]
    gap: float


def _checked(G: Tensor, image, padding, stride, dilation, sum_dz) -> tuple:
    if G.ndim != 4:
        raise ValueError(f"a blind layer needs the gradient of a convolution, (O, C, kh, kw), not {tuple(G.shape)}")
    if sum_dz is not None and sum_dz.shape != G.shape[:1]:
        raise ValueError(f"sum_dz has shape {tuple(sum_dz.shape)}; it must be ({len(G)},), one number a filter")
    left, right, top, bottom = padding
    geometry = tuple(zip(image, G.shape[2:], stride, ((top, bottom), (left, right)), dilation, strict=True))
    for pixels, taps, _, pads, step in geometry:
        if step * (taps - 1) >= pixels + sum(pads):
            raise ValueError(f"{taps} taps with dilation {step} do not fit {pixels} pixels with padding {pads}")
    return geometry


def _nothing(reason: str) -> BlindSolution:
    return BlindSolution(None, None, None, 0.0, None, 0.0, math.inf, math.inf, False, reason)


def _noise(values: Tensor, std: Tensor | float | None) -> Tensor:
    return entry_noise({"": values})[""] if std is None else torch.as_tensor(std, dtype=torch.float64)


def _best_split(G: Tensor, geometry) -> _Found | str:
    """The first split whose rank and eigenvalue both stand out; else the reason why none does."""
    splits = tap_splits(G.shape[0], G.shape[1], geometry)
    reason, tried = "no split of its taps has the rank by its shapes", 0
    for split in splits:
        M = split.matrix(G)
        V, sigmas, why = _row_space(M if split.of_input else M.T, split.positions)
        reason = reason if V is None and tried else why
        if V is None:
            continue
        units, table = (G.shape[1], split.pixels) if split.of_input else (G.shape[0], split.outputs)
        found = ShiftSpace(V.reshape(split.positions, -1, units), table, int(table.max()) + 1).solve()
        tried += 1
        if found is not None and found.gap > max(GAP_FLOOR, MIN_GAP_OVER_MISSED * found.missed):
            return _Found(split, found.pixels, sigmas, found.gap)
        reason = "its equations have more than one solution"
        if tried == MAX_SPLITS:
            break
    return reason


def _row_space(M: Tensor, rank: int) -> tuple[Tensor | None, tuple[float, float | None], str]:
    """An orthonormal basis (rank, columns) of the rows, if the rank stands out, by a sketch of the columns."""
    width = min(rank + SKETCH_SURPLUS, *M.shape)
    generator = torch.Generator().manual_seed(0)
    Y = M @ torch.randn(M.shape[1], width, generator=generator, dtype=M.dtype) if width < min(M.shape) else M
    Q = torch.linalg.qr(Y)[0] if width < min(M.shape) else None
    _, S, Vh = svd(M if Q is None else Q.T @ M)
    sigmas = (S / S[0]).tolist()
    above, below = sigmas[rank - 1], sigmas[rank] if len(sigmas) > rank else None
    if above <= RANK_FLOOR or (below is not None and above < MIN_RANK_GAP * below):
        held = sum(s > max(RANK_FLOOR, sigmas[-1] * MIN_RANK_GAP) for s in sigmas)
        kind = "more: a batch, noise or another network" if below is not None and held > rank else f"only {held}"
        return None, (above, below), f"its gradient should have the rank {rank} of its positions and has {kind}"
    return Vh[:rank], (above, below), ""


@dataclass(frozen=True)
class _Equations:
    """The layer's equations at unit norm: G (O, C·k²), the standard deviation of its entries' noise, its factors."""

    G: Tensor
    noise: Tensor
    factors: Factors

    def solve(self, found: _Found, sums: Tensor | None, sum_noise: Tensor | None, size: Tensor) -> BlindSolution:
        """Both factors from one of them, polished, scaled and judged."""
        if found.split.of_input:
            x = found.side.reshape(-1, *self.factors.image)
            dz = self.factors.solve_dz(self.G, x)
        else:
            x, dz = self.factors.solve_x(self.G, found.side), found.side
        polished = self.factors.polish(self.G, x, dz)
        generator = torch.Generator().manual_seed(0)
        draw = self.noise * torch.randn(self.G.shape, generator=generator, dtype=torch.float64)
        change = self.factors.step(draw, *polished) if polished else None
        x, dz = polished or (x, dz)
        residual = self.factors.misfit(self.G, x, dz).norm().item()
        scalar, wrong, probe = 1.0, None, 1.0
        if sums is not None:
            scalar, wrong = _scalar(dz, sums)
            noisy = sums + sum_noise * torch.randn(sums.shape, generator=generator, dtype=torch.float64)
            probe = _scalar(dz + change[1], noisy)[0] / scalar if change and scalar else 1.0
        error = ((x + change[0]) / probe - x).norm().item() / x.norm().item() if change and probe else math.inf
        reason = self._doubt(residual, wrong, sums, sum_noise, error)
        return BlindSolution(
            x / scalar if scalar else None,
            (dz * scalar * size).reshape(len(dz), *self.factors.outputs) if scalar else None,
            found.split.taps, *found.sigmas, found.gap, residual, error, not reason, reason,
        )  # fmt: skip

    def _doubt(self, residual: float, wrong: float | None, sums, sum_noise, error: float) -> str:
        """What speaks against the solution; empty if nothing does."""
        expected = self.noise.norm().item()
        if residual > RESIDUAL_FACTOR * expected + RESIDUAL_FLOOR:
            return f"its own equations are missed by {residual:.1g}, more than the gradient's rounding {expected:.1g}"
        if wrong is not None:
            allowed = RESIDUAL_FACTOR * (sum_noise.norm() / sums.norm()).item() if sums.any() else 0.0
            if not wrong <= allowed + MAX_AMPLIFICATION * expected + EXACT_ERROR:
                return f"the gradient of its bias differs from the sum of δz by {wrong:.1g}"
        if not error <= min(max(EXACT_ERROR, MAX_AMPLIFICATION * expected), MAX_CERTIFIED_ERROR):
            return f"the predicted error of its input is {error:.1g}"
        return ""


def _scalar(dz: Tensor, sums: Tensor) -> tuple[float, float]:
    """The factor that brings Σ_p δz nearest to the sums, and what it misses; 0 where there is none."""
    total = dz.sum(1)
    scalar = (total @ sums / total.square().sum()).item() if total.any() else 0.0
    return scalar, (scalar * total - sums).norm().item() / sums.norm().item() if sums.any() else math.inf
