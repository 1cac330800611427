"""W x = b where W has full column rank: by a banded factor that is kept between attacks, or by iterations.

All functions take layers without groups (`Layer.split_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as sla
import torch
from torch import Tensor

from rgap.equations.banded import band_by_taps, band_of
from rgap.equations.limits import DEFAULT_LIMITS
from rgap.linalg import Iterated, conjugate_gradients, largest_eigenvalue, norm
from rgap.network.layer import Layer

MAX_REFINEMENTS = 5  # of a solution by sparse factors
REFINED_SHARE = 1e-4  # share of a residual that a refinement leaves
FULL_RANK_RTOL = 1e-4  # largest relative error with which a system of full column rank gives a random vector back
MIN_RATIO = 1e-7  # smallest σ_min / σ_max at which W still counts as of full column rank where WᵀW is factored
SINGLE_TOLERANCE = 1e-6  # relative residual of the normal equations down to which iterations in float32 are led
MIN_SINGLE_UNKNOWNS = 10_000  # unknowns from which float32 saves time
MAX_ROUND_RATIO = 0.1  # largest part of that residual, in float64, that a round of iterations in float32 leaves
MIN_RATIO_SQUARE = 1e-11  # the same where W itself is


def weight_matrix(layer: Layer) -> sp.csr_array:
    """W as a sparse matrix, (O·H′·W′, C·H·W); made once."""
    return layer.cached("weight_matrix", lambda: _weight_matrix(layer))


def _weight_matrix(layer: Layer) -> sp.csr_array:
    pixels, size = layer.tap_pixels().numpy(), math.prod(layer.pixels_in)
    (outputs, channels), positions = layer.weight.shape[:2], pixels.shape[1]
    taps, places = np.nonzero(pixels >= 0)
    o, c = np.arange(outputs)[:, None, None], np.arange(channels)[:, None]
    values = layer.weight.flatten(2).numpy()[:, :, taps]
    rows, columns = np.broadcast_arrays(o * positions + places, c * size + pixels[taps, places], values)[:2]
    shape = (outputs * positions, channels * size)
    W = sp.csr_array((values.ravel(), (rows.ravel(), columns.ravel())), shape=shape)
    if layer.before is not None:
        W = sp.csr_array(W @ sp.kron(sp.eye_array(channels), layer.before.matrix()))
    return W if layer.after is None else sp.csr_array(sp.kron(sp.eye_array(outputs), layer.after.matrix()) @ W)


@dataclass(frozen=True)
class SparseFactor:
    """W⁺ by factors of WᵀW, or of W itself where it is square."""

    layer: Layer
    # W⁺ of z (O, H′, W′), not refined, by z and Wᵀ z: (C·H·W,); None where the factors do not exist
    invert: Callable[[Tensor, Tensor], Tensor] | None
    condition: float  # σ_max / σ_min of W, a close lower bound; infinite without factors
    full_rank: bool  # of W's columns
    known: Tensor | None = None  # mask of the outputs whose rows are used, (O, H′, W′), None for all

    def solve(self, z: Tensor) -> tuple[Tensor, float, int]:
        """Least-squares solution with refinement for z (O, H′, W′): x (C·H·W,), ‖W x − z‖ / ‖z‖, refinement steps."""
        right = _used(z, self.known)
        x, last, steps = self.sensitivity(right), math.inf, 0
        while True:
            rest = right - _used(self.layer.apply(x.view(self.layer.input_shape)), self.known)
            seen = self.layer.adjoint(rest)
            left = norm(seen)
            if steps == MAX_REFINEMENTS or not left < 0.5 * last:
                break
            last, x, steps = left, x + self.invert(rest, seen), steps + 1
        size = norm(right)
        return x, norm(rest) / size if size > 0 else 0.0, steps

    def sensitivity(self, z: Tensor) -> Tensor:
        """The solution without refinement: enough for the effect of an error."""
        z = _used(z, self.known)
        return self.invert(z, self.layer.adjoint(z))


def _used(z: Tensor, known: Tensor | None) -> Tensor:
    """z, with 0 where a row is not used."""
    return z if known is None else z.where(known, 0.0)


@dataclass
class ConjugateGradients:
    """Solves W x = z, or [W; K] x = [z; vec(G)] of one image, by conjugate gradients; no matrix is held.

    Each kind of equations costs a convolution, whatever the size of the image; the condition number of the system
    decides how many iterations are needed, and grows as the equations become scarce.
    """

    layer: Layer
    known: Tensor | None = None  # mask of the outputs whose rows of W are used, (O, H′, W′), None for all
    dz: Tensor | None = None  # (O, H′, W′), where K belongs to the system; δz and G are scaled for rows as large as W's
    condition: float = float("nan")  # of the system, as estimated by the last solve

    @cached_property
    def missing(self) -> int:
        """Estimate of the unknowns that the system does not determine: what it loses of a random vector."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.layer.input_shape, generator=generator, dtype=torch.float64)
        G = None if self.dz is None else self.layer.weight_gradient(x, self.dz)
        found = self.solve(self.layer.apply(x), G, tolerance=1e-10, truth=x)[0]
        share = ((found - x.flatten()).norm() / x.norm()).item() ** 2
        return max(1, round(share * self.layer.unknowns)) if share > FULL_RANK_RTOL**2 else 0

    @property
    def full_rank(self) -> bool:
        """Whether the system has full column rank."""
        return self.missing == 0

    def solve(
        self, z: Tensor, G: Tensor | None = None, truth: Tensor | None = None, **limits
    ) -> tuple[Tensor, float, int]:
        """Least-squares solution of minimum norm: x (C·H·W,), ‖residual‖ / ‖right-hand side‖, iterations.

        For z (O, H′, W′) and, where K belongs to the system, G shaped as the weight; the limits are those of
        `rgap.linalg.conjugate_gradients`. Ends early where x is as close to `truth` as `FULL_RANK_RTOL`.
        """

        def done(x: Tensor) -> bool:
            return truth is not None and bool((x - truth).norm() < FULL_RANK_RTOL * truth.norm())

        right = [_used(z, self.known)] + ([] if self.dz is None else [G])
        found = self._in_single_precision(right, **limits) if truth is None else None
        if found is None:
            found = conjugate_gradients(self._apply, self._adjoint, right, done=done, **limits)
        self.condition = found.condition
        return found.x.flatten(), found.residual, found.iterations

    @cached_property
    def _single(self) -> ConjugateGradients:
        """The same system in float32."""
        layer = replace(self.layer, weight=self.layer.weight.float(), cache={})
        return ConjugateGradients(layer, self.known, None if self.dz is None else self.dz.float())

    def _in_single_precision(
        self, right: list[Tensor], tolerance: float = 1e-12, max_iterations: int = 20_000
    ) -> Iterated | None:
        """By iterations in float32, at half the time, on residuals in float64; None where these do not fall with them.

        Corrections lie in the row space, too: the solution is that of minimum norm.
        """
        layer = self.layer
        if (
            layer.unknowns < MIN_SINGLE_UNKNOWNS
            or layer.before is not None
            or layer.after is not None
            or layer.is_fixed
        ):
            return None  # maps of pixels are held in float64
        x, rest, done, rounds = 0.0, right, 0, []
        s = self._adjoint(rest)
        size, nothing = norm(s), [torch.zeros_like(r, dtype=torch.float32) for r in right]
        target = tolerance * size
        while size > target and done < max_iterations:
            limits = {"tolerance": max(target / size, SINGLE_TOLERANCE), "max_iterations": max_iterations - done}
            single = self._single
            found = conjugate_gradients(single._apply, single._adjoint, nothing, normal=(s / size).float(), **limits)
            rounds.append(found)
            x, done, last = x + size * found.x.double(), done + found.iterations, size
            rest = [r - seen for r, seen in zip(right, self._apply(x), strict=True)]
            s = self._adjoint(rest)
            size = norm(s)
            if not size < max(MAX_ROUND_RATIO * last, target) and done < max_iterations:
                return None
        if not rounds:
            return None
        residual = math.hypot(*map(norm, rest)) / math.hypot(*map(norm, right))
        return Iterated(x, residual, done, max(found.condition for found in rounds))

    def refine(self, x: Tensor, z: Tensor, G: Tensor) -> tuple[Tensor, float, int]:
        """A solution x (C·H·W,) and what it leaves of the right-hand side solved for once more, as by `solve`."""
        shaped = x.reshape(self.layer.input_shape)
        further, left, iterations = self.solve(
            z - self.layer.apply(shaped), G - self.layer.weight_gradient(shaped, self.dz), tolerance=REFINED_SHARE
        )
        return x + further, left, iterations

    def sensitivity(self, z: Tensor, G: Tensor | None = None) -> Tensor:
        """The solution to a few digits: enough for the effect of an error."""
        return self.solve(z, G, tolerance=1e-3)[0]

    def _apply(self, x: Tensor) -> list[Tensor]:
        z = _used(self.layer.apply(x), self.known)
        return [z] if self.dz is None else [z, self.layer.weight_gradient(x, self.dz)]

    def _adjoint(self, rest: list[Tensor]) -> Tensor:
        x = self.layer.adjoint(rest[0])
        if self.dz is not None:  # K takes δz to the pixels as Wᵀ does, with G in the place of the weight
            x = x + replace(self.layer, weight=rest[1], cache={}).adjoint(self.dz)
        return x


def weight_factor(
    layer: Layer, known: Tensor | None = None, max_unknowns: int = DEFAULT_LIMITS.max_factor_unknowns
) -> SparseFactor | ConjugateGradients:
    """The solver for W x = z; made once, unless only some outputs (O, H′, W′) are known.

    Beyond `max_unknowns`, or where the factor's band would be too large, it is conjugate gradients.
    """
    small = layer.unknowns <= max_unknowns
    if known is not None:
        return (_factor(layer, known) if small else None) or ConjugateGradients(layer, known)
    factor = layer.cached("weight_factor", lambda: _factor(layer)) if small else None
    return factor or layer.cached("weight_solver", lambda: ConjugateGradients(layer))


def _factor(layer: Layer, known: Tensor | None = None) -> SparseFactor | None:
    """None where the factor's band would be too large."""
    rows = slice(None) if known is None else known.flatten().numpy()
    square = layer.unknowns == (math.prod(layer.output_shape) if known is None else int(known.sum()))
    factor = None
    if square:
        with suppress(RuntimeError):  # SuperLU met an exactly singular matrix
            factor = sla.splu(weight_matrix(layer)[rows].tocsc())
    else:
        W = None if layer.before is layer.after is None else weight_matrix(layer)[rows]
        gram = band_by_taps(layer, known) if W is None else band_of((W.T @ W).tocsr())
        if gram is None:
            return None
        factor = gram.factored()
    if factor is None:
        return SparseFactor(layer, None, math.inf, False, known)

    def invert(z: Tensor, seen: Tensor) -> Tensor:
        right = z.flatten()[rows] if square else seen.flatten()
        return torch.from_numpy(factor.solve(right.numpy()))

    def square_of(v: Tensor) -> Tensor:
        return layer.adjoint(_used(layer.apply(v.view(layer.input_shape)), known)).reshape(-1, 1)

    def inverse_of(v: Tensor) -> Tensor:
        return torch.from_numpy(factor.solve(factor.solve(v.numpy(), "T") if square else v.numpy()))

    condition = math.sqrt(math.prod(largest_eigenvalue(matrix, layer.unknowns) for matrix in (square_of, inverse_of)))
    full_rank = condition < 1 / (MIN_RATIO_SQUARE if square else MIN_RATIO)
    return SparseFactor(layer, invert, condition if math.isfinite(condition) else math.inf, full_rank, known)
