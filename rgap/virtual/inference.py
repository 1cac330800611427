"""One step of the fixed point on a rank-deficient layer's input: rows, their noise, generalised least squares.

With σ⁻¹ and σ′ replaced by their fits the rows are linear in the unknowns (t, y); the fits' residuals ε and η enter as
noise of known covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from rgap.network.activations import Activation
from rgap.virtual.linearisation import Fit, slope
from rgap.virtual.previous import PreviousLayer

MIN_ROW_NORM_RATIO = 1e-12  # norm of a gradient row, over the largest, up to which it is zero and not scaled
DEFINITE = {"float64": 1e-12, "float32": 1e-5}  # relative increase of a covariance's diagonal that keeps it definite


@dataclass(frozen=True)
class DeficientLayer:
    """The deficient layer's input and what is known about it."""

    x: NDArray  # the solution nearest to σ(0), (n,)
    N: NDArray  # basis of the undetermined directions, (n, d): the null space, then ill-conditioned directions
    known: NDArray  # standard deviation of the layer's own values, which are 0, for the last w coefficients, (w,)
    activation: Activation  # σ between the layer before and this one, on vectors (n,)
    previous: PreviousLayer  # factors of the layer before
    G: NDArray | None  # that layer's gradient, (O, C, kh, kw); None where it is absent
    dx: NDArray  # gradient of the loss by x, in the shape of that layer's output, (O, H′, W′)
    noise: float  # relative noise of the data

    @property
    def unknowns(self) -> int:
        """Entries of t and y."""
        return self.N.shape[1] + self.previous.null.shape[1]

    @property
    def spread(self) -> float:
        """Root mean square of x about σ(0)."""
        middle = self.activation.forward(torch.zeros(len(self.x), dtype=torch.float64)).numpy()
        return float(np.sqrt(np.mean((self.x - middle) ** 2)))

    @property
    def homogeneous(self) -> bool:
        """Whether scaling x scales z′: then one equation of each channel's gradient is redundant."""
        layer = self.previous.layer
        return self.activation.homogeneous and layer.bias is None and layer.shift is None

    @cached_property
    def range_rows(self) -> RangeRows:
        """What the range of the layer before says of t, kept from step to step."""
        return RangeRows(self.previous.left, self.N)

    @cached_property
    def rough_rows(self) -> RangeRows:
        """The same in float32."""
        return RangeRows(self.previous.rough_left, self.rough)

    @cached_property
    def rough(self) -> NDArray:
        """N in float32: enough for variances, and for beliefs that are wide."""
        return self.N.astype(np.float32)


@dataclass
class RangeRows:
    """leftᵀ diag(β) N for one β after the other: between beliefs the slope of few entries changes."""

    left: NDArray
    N: NDArray
    beta: NDArray | None = None
    rows: NDArray | None = None

    def at(self, beta: NDArray) -> NDArray:
        """The rows, (q, d); what has moved is added to those of the β before."""
        moved = np.arange(0) if self.beta is None else np.flatnonzero(beta != self.beta)
        if self.beta is None or 4 * len(moved) > 3 * len(beta):
            self.rows = self.left.T @ (beta.astype(self.N.dtype)[:, None] * self.N)
        elif len(moved):
            change = (beta - self.beta)[moved, None].astype(self.N.dtype)
            self.rows = self.rows + self.left[moved].T @ (change * self.N[moved])
        self.beta = beta
        return self.rows


@dataclass(frozen=True)
class Rows:
    """One linearised step: A (t, y) = b, with the parts of its noise covariance."""

    A: NDArray
    b: NDArray
    floor: NDArray  # standard deviation from the data
    known: NDArray  # standard deviation of what the deficient layer knows of its unknowns, all 0, (unknowns,)
    eps: NDArray  # response of the rows to ε, (n, rows)
    eta: list[tuple[slice, slice, NDArray]]  # for each output channel: rows, entries, response of the rows to η


def assemble(
    problem: DeficientLayer, fitted: Fit, m: NDArray, image: NDArray, channels: NDArray, prior, noise: float,
    wide: bool = False,
) -> Rows:  # fmt: skip
    """The rows of one step: range of W, gradient of the layer before, and a prior.

    `fitted` are the fits to σ⁻¹ and σ′ under the present belief with means m (n,), `image` (n_x,) is the present input
    of the layer before, `channels` are the output channels whose gradient is used, and `prior` gives the rows of
    `smooth_image_rows` or is None. For a `wide` belief the range's rows are made in float32. Raises LinAlgError if the
    belief is so far off that the equations overflow.
    """
    previous, N, d = problem.previous, problem.N, problem.N.shape[1]
    q = previous.left.shape[1]
    z = fitted.alpha + fitted.beta * problem.x - previous.bias
    scale = np.sqrt(np.mean((fitted.alpha + fitted.beta * m) ** 2))
    by_range = problem.rough_rows if wide else problem.range_rows
    parts, right = [np.hstack([by_range.at(fitted.beta), -previous.gains])], [-(z @ previous.left)]
    eps, floor, eta = [by_range.left], [np.full(q, noise * scale)], []
    if channels.size:
        own = gradient_rows(problem, fitted, m, image, channels, N)
        parts, right = [*parts, np.hstack([own.A, own.null])], [*right, own.rest(problem.x)]
        floor.append(noise * np.maximum(scale, own.size))
        eps.append((previous.gradient_rows(own.dz, previous.pinv) * own.weight[:, None]).T)
        eta = [(slice(q + at.start, q + at.stop), entries, R) for at, entries, R in own.eta]
    if prior is not None:
        F, target, FP = prior
        eps, parts = [*eps, FP.T], [*parts, np.hstack([FP @ (fitted.beta[:, None] * N), F @ previous.null])]
        right, floor = [*right, target - FP @ z], [*floor, np.ones(len(target))]
    A, b = np.vstack(parts), np.concatenate(right)
    if not (np.isfinite(A).all() and np.isfinite(b).all()):
        raise np.linalg.LinAlgError("the equations of this belief overflow")
    known = np.full(A.shape[1], np.inf)
    known[d - problem.known.size : d] = problem.known
    return Rows(A, b, np.concatenate(floor), known, np.hstack(eps) if len(eps) > 1 else eps[0], eta)


@dataclass(frozen=True)
class GradientRows:
    """Equations of the layer before's own gradient for x + N t and y, in rows of about unit norm."""

    A: NDArray  # A t + null y = rest(x)
    null: NDArray
    rest: Callable[[NDArray], NDArray]  # what an x leaves unexplained
    size: NDArray  # of the gradient itself, in each row
    weight: NDArray  # what the rows were multiplied with
    dz: NDArray  # of the channels used, (channels, H′, W′)
    eta: list[tuple[slice, slice, NDArray]]  # as `Rows` has it


def gradient_rows(
    problem: DeficientLayer, fitted: Fit, m: NDArray, image: NDArray, channels: NDArray, N: NDArray,
    *, rough: bool = False,
) -> GradientRows:  # fmt: skip
    """The gradient's equations, linearised as `assemble` does it, along the columns of N (n, k); `rough` in float32."""
    previous, k = problem.previous, N.shape[1]
    dz = (fitted.pi.reshape(problem.dx.shape) * problem.dx)[channels]
    columns = previous.invert(fitted.beta[:, None] * N, rough)
    K = previous.gradient_rows(dz, np.hstack([columns, previous.sketch]))
    size = np.linalg.norm(K[:, k:], axis=1)
    nonzero = size > MIN_ROW_NORM_RATIO * size.max()
    weight = np.where(nonzero, 1 / np.where(nonzero, size, 1.0), 0.0)
    K *= weight[:, None]
    A, g, eta = K[:, :k], problem.G[channels].ravel() * weight, []
    if fitted.rho.any() or fitted.var_eta.any():
        eta = _responses(problem, image, channels, weight)
    for rows, entries, R in eta:
        A[rows] += R @ (fitted.rho[entries, None] * N[entries])

    def rest(x: NDArray) -> NDArray:
        z = fitted.alpha + fitted.beta * x - previous.bias
        missed = g - weight * previous.gradient_rows(dz, previous.invert(z[:, None]))[:, 0]
        for rows, entries, R in eta:
            missed[rows] -= R @ (fitted.rho * (x - m))[entries]
        return missed

    return GradientRows(A, K[:, K.shape[1] - previous.null.shape[1] :], rest, np.abs(g), weight, dz, eta)


def _responses(problem: DeficientLayer, image: NDArray, channels: NDArray, weight: NDArray) -> list:
    """Derivatives of a channel's gradient rows by σ′ at each of its entries: δx times the patch that it reads."""
    patches = problem.previous.patches(image)
    taps, pixels = patches.shape
    result = []
    for i, channel in enumerate(channels):
        rows, entries = slice(i * taps, (i + 1) * taps), slice(channel * pixels, (channel + 1) * pixels)
        result.append((rows, entries, patches * weight[rows, None] * problem.dx[channel].ravel()))
    return result


def _covariance(rows: Rows, fitted: Fit) -> NDArray:
    """Noise covariance of the rows: from the fits' residuals and from the data."""
    uncertain = np.flatnonzero(fitted.var_eps > 1e-6 * rows.floor.min() ** 2)
    root = rows.eps[uncertain] * np.sqrt(fitted.var_eps[uncertain])[:, None].astype(rows.eps.dtype)
    S = (root.T @ root).astype(float)
    for at, entries, R in rows.eta:
        on = np.flatnonzero(fitted.var_eta[entries] > 1e-12)
        if on.size:
            R, places = R[:, on], entries.start + on
            S[at, at] += (R * fitted.var_eta[places]) @ R.T
            cross = (rows.eps[places] * fitted.cov[places, None]).T @ R.T
            S[:, at] += cross
            S[at] += cross.T
    diagonal = np.diag_indices_from(S)
    S[diagonal] = S[diagonal] * (1 + DEFINITE[rows.eps.dtype.name]) + rows.floor**2
    return S


def update(rows: Rows, fitted: Fit, N: NDArray, scales: NDArray) -> tuple[NDArray, NDArray, float, NDArray]:
    """One step of generalised least squares, with the prior standard deviations `scales` of (t, y).

    Gives (t, y), the variances of x (n,), χ² per surplus row, and the best-fitting ε (n,), 0 where there are rows of
    the range alone. N (n, d) may be float32, for the variances. Raises LinAlgError if the belief is so far off that the
    equations overflow.
    """
    lower = linalg.cholesky(_covariance(rows, fitted), lower=True, overwrite_a=True, check_finite=False)
    whitened = linalg.solve_triangular(lower, np.column_stack([rows.A, rows.b]), lower=True, check_finite=False)
    A, b, precision = whitened[:, :-1], whitened[:, -1], rows.known**-2
    information, moment = A.T @ A, A.T @ b
    if not (np.isfinite(information).all() and np.isfinite(moment).all() and scales.all()):
        raise np.linalg.LinAlgError("the equations of this belief overflow")
    information[np.diag_indices_from(information)] += scales**-2 + precision
    (n, d), theta = N.shape, np.empty(len(moment))
    order = np.roll(np.arange(len(theta)), -d)  # y first: the factor's last block is that of t alone
    factor = linalg.cholesky(information[np.ix_(order, order)], lower=True, check_finite=False)
    theta[order] = linalg.cho_solve((factor, True), moment[order])
    rest = b - A @ theta
    surplus = len(b) + np.count_nonzero(precision) - len(theta)
    chi2 = float(rest @ rest + precision @ theta**2) / max(surplus, 1)
    root = linalg.lapack.dtrtri(factor[-d:, -d:], lower=1)[0].astype(N.dtype)
    spread = linalg.get_blas_funcs("trmm", (root,))(1.0, root, N.T, lower=1)
    variance = np.einsum("ij,ij->i", spread.T, spread.T)
    eps = np.zeros(n)
    if rows.eta:
        dual = linalg.solve_triangular(lower, rest, lower=True, trans=1, check_finite=False)
        eps = fitted.var_eps * (rows.eps @ dual)
        for at, entries, R in rows.eta:
            eps[entries] += fitted.cov[entries] * (R.T @ dual[at])
    return theta, variance.astype(float), chi2, eps


def independent_gradients(problem: DeficientLayer, m: NDArray, channels: NDArray) -> int:
    """Number of gradient equations that do not follow from the deficient layer's own constraints.

    ⟨G′[o], W′[o′]⟩ = ⟨δz′[o], z′[o′]⟩ = ⟨δx[o], x[o′]⟩ holds for o = o′ where σ is homogeneous and there is no bias,
    and for o ≠ o′ where each of the two channels has one sign throughout: these equations are redundant.
    """
    if not channels.size:
        return 0
    slopes = slope(problem.activation, m).reshape(problem.dx.shape)
    rank = problem.previous.gradient_rank((slopes * problem.dx)[channels])
    if not problem.homogeneous:
        return rank
    constant = np.ptp(slopes.reshape(len(slopes), -1), axis=1) == 0
    return rank - len(channels) - int(constant[channels].sum()) * (int(constant.sum()) - 1)
