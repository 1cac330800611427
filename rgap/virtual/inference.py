"""One step of the fixed point on a rank-deficient layer's input: rows, their noise, generalised least squares.

With σ⁻¹ and σ′ replaced by their fits the rows are linear in the unknowns (t, y); the fits' residuals ε and η enter as
noise of known covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from rgap.network.activations import Activation
from rgap.virtual.linearisation import Fit, slope
from rgap.virtual.previous import PreviousLayer

MIN_ROW_NORM_RATIO = 1e-12
"""Norm of a gradient row, relative to the largest, up to which it counts as zero and is not scaled."""


@dataclass(frozen=True)
class DeficientLayer:
    """The deficient layer's input and what is known about it.

    Attributes:
        x: Minimum-norm solution, (n,).
        N: Basis of the undetermined directions, (n, d): the null space, then ill-conditioned directions.
        known: Standard deviation of the layer's own values, which are 0, for the last w coefficients, (w,).
        activation: σ between the layer before and this one, on vectors (n,).
        previous: Factors of the layer before.
        G: That layer's gradient, (O, C, kh, kw); None where it is absent.
        dx: Gradient of the loss by x, in the shape of that layer's output, (O, H′, W′).
        noise: Relative noise of the data.
    """

    x: NDArray
    N: NDArray
    known: NDArray
    activation: Activation
    previous: PreviousLayer
    G: NDArray | None
    dx: NDArray
    noise: float

    @property
    def unknowns(self) -> int:
        """Entries of t and y."""
        return self.N.shape[1] + self.previous.null.shape[1]

    @property
    def homogeneous(self) -> bool:
        """Whether scaling x scales z′: then one equation of each channel's gradient is redundant."""
        layer = self.previous.layer
        return self.activation.homogeneous and layer.bias is None and layer.shift is None


@dataclass(frozen=True)
class Rows:
    """One linearised step: A (t, y) = b, with the parts of its noise covariance."""

    A: NDArray
    b: NDArray
    floor: NDArray  # standard deviation from the data
    eps: NDArray  # response of the rows to ε
    eta: list[tuple[slice, slice, NDArray]]  # for each output channel: rows, entries, response of the rows to η


def assemble(
    problem: DeficientLayer, fitted: Fit, m: NDArray, image: NDArray, channels: NDArray, prior, noise: float
) -> Rows:
    """The rows of one step: range of W, gradient of the layer before in unit rows, prior, and what the layer knows.

    `fitted` are the fits to σ⁻¹ and σ′ under the present belief with means m (n,), `image` (n_x,) is the present input
    of the layer before, `channels` are the output channels whose gradient is used, and `prior` gives the rows of
    `smooth_image_rows` or is None. Raises LinAlgError if the belief is so far off that the equations overflow.
    """
    previous, N = problem.previous, problem.N
    q = previous.left.shape[1]
    z = fitted.alpha + fitted.beta * problem.x - previous.bias
    scale = np.sqrt(np.mean((fitted.alpha + fitted.beta * m) ** 2))
    eps, null, b = [previous.left.T], [np.zeros((q, previous.null.shape[1]))], [np.zeros(q)]
    floor, eta = [np.full(q, noise * scale)], []
    if channels.size:
        dz = (fitted.pi.reshape(problem.dx.shape) * problem.dx)[channels]
        X = np.hstack([previous.pinv, previous.null]) if previous.null.size else previous.pinv
        K = previous.gradient_rows(dz, X)
        size = np.linalg.norm(K, axis=1)
        nonzero = size > MIN_ROW_NORM_RATIO * size.max()
        weight = np.where(nonzero, 1 / np.where(nonzero, size, 1.0), 0.0)
        K *= weight[:, None]
        g = problem.G[channels].ravel() * weight
        eps, null, b = [*eps, K[:, : len(m)]], [*null, K[:, len(m) :]], [*b, g]
        floor.append(noise * np.maximum(scale, np.abs(g)))
        eta = _responses(problem, image, channels, weight, q)
    if prior is not None:
        F, target, FP = prior
        eps, null, b = [*eps, FP], [*null, F @ previous.null], [*b, target]
        floor.append(np.ones(len(target)))
    E, count, d = np.vstack(eps), problem.known.size, N.shape[1]
    A, right = np.hstack([E @ (fitted.beta[:, None] * N), np.vstack(null)]), np.concatenate(b) - E @ z
    if not (np.isfinite(A).all() and np.isfinite(right).all()):
        raise np.linalg.LinAlgError("the equations of this belief overflow")
    for rows, entries, R in eta:
        A[rows, :d] += R @ (fitted.rho[entries, None] * N[entries])
        right[rows] -= R @ (fitted.rho * (problem.x - m))[entries]
    if count:  # the deficient layer's own values of its ill-conditioned directions
        A, right = np.vstack([A, np.eye(count, A.shape[1], d - count)]), np.concatenate([right, np.zeros(count)])
        E, floor = np.vstack([E, np.zeros((count, len(m)))]), [*floor, problem.known]
    return Rows(A, right, np.concatenate(floor), E, eta)


def _responses(problem: DeficientLayer, image: NDArray, channels: NDArray, weight: NDArray, first: int) -> list:
    """Derivatives of a channel's gradient rows by σ′ at each of its entries: δx times the patch that it reads."""
    patches = problem.previous.patches(image)
    taps, pixels = patches.shape
    result = []
    for i, channel in enumerate(channels):
        rows, entries = slice(first + i * taps, first + (i + 1) * taps), slice(channel * pixels, (channel + 1) * pixels)
        result.append((rows, entries, patches * weight[i * taps : (i + 1) * taps, None] * problem.dx[channel].ravel()))
    return result


def _covariance(rows: Rows, fitted: Fit) -> NDArray:
    """Noise covariance of the rows: from the fits' residuals and from the data."""
    uncertain = fitted.var_eps > 1e-6 * rows.floor.min() ** 2
    root = rows.eps[:, uncertain] * np.sqrt(fitted.var_eps[uncertain])
    S = root @ root.T
    for at, entries, R in rows.eta:
        on = np.flatnonzero(fitted.var_eta[entries] > 1e-12)
        if on.size:
            R, places = R[:, on], entries.start + on
            S[at, at] += (R * fitted.var_eta[places]) @ R.T
            cross = (rows.eps[:, places] * fitted.cov[places]) @ R.T
            S[:, at] += cross
            S[at] += cross.T
    diagonal = np.diag_indices_from(S)
    S[diagonal] = S[diagonal] * (1 + 1e-12) + rows.floor**2  # 1e-12 keeps S positive definite
    return S


def update(rows: Rows, fitted: Fit, N: NDArray, scales: NDArray) -> tuple[NDArray, NDArray, float, NDArray]:
    """One step of generalised least squares, with the prior standard deviations `scales` of (t, y).

    Gives (t, y), the variances of x (n,), χ² per surplus row, and the best-fitting ε (n,). Raises LinAlgError if the
    belief is so far off that the equations overflow.
    """
    lower = linalg.cholesky(_covariance(rows, fitted), lower=True, overwrite_a=True, check_finite=False)
    whitened = linalg.solve_triangular(lower, np.column_stack([rows.A, rows.b]), lower=True, check_finite=False)
    A, b = whitened[:, :-1], whitened[:, -1]
    information, moment = A.T @ A, A.T @ b
    if not (np.isfinite(information).all() and np.isfinite(moment).all() and scales.all()):
        raise np.linalg.LinAlgError("the equations of this belief overflow")
    information[np.diag_indices_from(information)] += scales**-2
    factor = linalg.cholesky(information, lower=True, check_finite=False)
    theta = linalg.cho_solve((factor, True), moment)
    rest = b - A @ theta
    chi2 = float(rest @ rest) / max(len(b) - len(theta), 1)
    root = linalg.solve_triangular(factor, np.eye(len(theta), N.shape[1]), lower=True, check_finite=False)
    variance = np.einsum("ij,ij->i", N @ (root.T @ root), N)
    dual = linalg.solve_triangular(lower, rest, lower=True, trans=1, check_finite=False)
    eps = fitted.var_eps * (rows.eps.T @ dual)
    for at, entries, R in rows.eta:
        eps[entries] += fitted.cov[entries] * (R.T @ dual[at])
    return theta, np.maximum(variance, 0), chi2, eps


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
