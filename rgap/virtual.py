"""Virtual constraints, solved: the layer before a rank-deficient one supplies the equations that are missing.

A deficient layer leaves x = x_mn + N t open. The layer before demands that σ⁻¹(x) lies in the range of its W, and that
its own gradient is K(δz′) x′ with δz′ = σ′(z′) ∘ δx. For LeakyReLU both are linear in t once the signs of x are known,
and exact once they are right. The paper counts such equations; here they are solved (ours).

The signs are not guessed but believed: every entry of x has a Gaussian belief N(m, v), σ⁻¹ and σ′ are replaced by their
best linear fits under it (`rgap.linearise`), what the fits leave over is noise of known covariance, and one step of
generalised least squares gives the next belief. It is widened by the step's own χ², so that it never grows surer than
the equations allow. As v falls the step becomes the linear system on one piece of σ, which is solved last, alone, and
certified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from rgap.activations import Activation
from rgap.linearise import Fit, fit, slope
from rgap.previous import PreviousLayer

SURPLUS = 8
"""Independent equations beyond the unknowns that a certificate needs."""

RESIDUAL = 20.0
"""Largest certified residual, in units of the data's noise; a wrong sign gives thousands."""

CONDITION = 1e5
"""Largest certified condition number of the final system."""

STEPS = 40
"""Most steps of one attempt."""


@dataclass(frozen=True)
class Open:
    """The deficient layer's input and what is known about it.

    Attributes:
        x: Minimum-norm solution, (n,).
        N: Basis of what is open, (n, d): the null space, then directions that the layer determines only badly.
        known: Standard deviation with which the layer itself determines the last of these, (w,), w ≤ d; about 0.
        activation: σ between the layer before and this one.
        previous: Factors of the layer before.
        G: That layer's gradient, (O, C, kh, kw).
        dx: Gradient of the loss by x, in the shape of that layer's output, (O, H′, W′).
        noise: Relative noise of the data.
    """

    x: NDArray
    N: NDArray
    known: NDArray
    activation: Activation
    previous: PreviousLayer
    G: NDArray
    dx: NDArray
    noise: float

    @property
    def unknowns(self) -> int:
        """Entries of t and y."""
        return self.N.shape[1] + self.previous.null.shape[1]

    @property
    def homogeneous(self) -> bool:
        """Whether scaling x scales z′: then each channel's gradient repeats one equation."""
        return self.activation.homogeneous and self.previous.layer.bias is None


@dataclass(frozen=True)
class VirtualSolution:
    """Outcome of `solve_virtual`.

    Attributes:
        x: The deficient layer's input, (n,); the best belief where it is not certified.
        certified: Residual at noise level, more equations than unknowns, full column rank, every sign kept.
        equations: Independent equations that were used.
        iterations: Steps over all attempts.
        residual: Root-mean-square residual of the final system relative to the size of z′.
        condition: Condition number of the final system, columns scaled.
        beliefs: The mean of the belief on x after each step, (iterations, n), for those who want to watch.
    """

    x: NDArray
    certified: bool
    equations: int
    iterations: int
    residual: float
    condition: float
    beliefs: NDArray = field(repr=False)


@dataclass(frozen=True)
class _Rows:
    """One linearised step: A (t, y) = b, with the parts of its noise covariance."""

    A: NDArray
    b: NDArray
    floor: NDArray
    eps: NDArray  # response of the rows to ε
    eta: list[tuple[slice, slice, NDArray]]  # for each output channel: rows, entries, response of the rows to η


def solve_virtual(
    problem: Open, prior: Callable[[], tuple[NDArray, NDArray, NDArray]] | None = None
) -> VirtualSolution:
    """Recovers a rank-deficient layer's input from its affine solution set and the layer before it.

    Args:
        problem: What is open.
        prior: Gives `smooth_image_rows`, where the layer before reads the image; a start for tight systems.

    Returns:
        A `VirtualSolution`.
    """
    beliefs: list = []
    for channels, rows in _plan(problem, prior):
        room = problem.previous.left.shape[1] + channels.size * problem.G[0].size - problem.homogeneous * channels.size
        hopeless = room + problem.known.size - problem.unknowns < SURPLUS
        t, image = _attempt(problem, channels, rows, hopeless, beliefs)
        solution = _certify(problem, t, image, _channels(problem), beliefs)
        if solution.certified or hopeless:
            break
    return solution


def _plan(problem: Open, prior) -> list[tuple[NDArray, tuple | None]]:
    """Attempts in order of cost: the range of W while it leaves room, then the gradient, from a prior if it is tight."""
    supplied = problem.previous.left.shape[1]
    none, channels = np.arange(0), _channels(problem)
    deficit = problem.N.shape[1] - problem.known.size
    plan = [(none, None)] if deficit <= 0.75 * supplied else []
    tight = deficit + problem.previous.null.shape[1] > 0.7 * (supplied + problem.G.size)
    if prior is not None and tight:
        plan.append((channels, prior()))
    return [*plan, (channels, None)]


def _channels(problem: Open, most: int = 4000) -> NDArray:
    """Output channels whose gradient is used: all, or in large layers enough for three equations an unknown."""
    outputs, taps = problem.G.shape[0], problem.G[0].size
    enough = outputs if outputs * taps <= 1000 else max(1, min(outputs, -(-3 * problem.unknowns // taps), most // taps))
    return np.linspace(0, outputs - 1, enough).round().astype(int)


def _attempt(problem: Open, channels: NDArray, prior, hopeless: bool, beliefs: list):
    """Steps until the belief is as sharp as the noise, or stalls; the prior leads the first ones."""
    previous, N = problem.previous, problem.N
    rms, noise = (
        np.sqrt(np.mean(problem.x**2)),
        max(problem.noise, 1e-7),
    )  # a sharper floor collapses the belief too soon
    t, y = np.zeros(N.shape[1]), np.zeros(previous.null.shape[1])
    v = rms**2 * np.einsum("ij,ij->i", N, N)
    scales = np.concatenate([np.full(t.size, rms), np.full(y.size, 3 * rms)])
    first = fit(problem.activation, problem.x, v)
    image = (
        previous.lift(first.alpha + first.beta * problem.x, y) if prior is None else np.full(len(previous.pinv), 0.5)
    )
    spread, best, waited = rms, np.inf, 0
    for step in range(STEPS):
        if prior is not None and not hopeless and (step >= 10 or (step >= 4 and spread < 0.02 * rms)):
            prior = None
        m = problem.x + N @ t
        fitted = fit(problem.activation, m, v)
        rows = _assemble(problem, fitted, m, image, channels, prior, noise)
        theta, v, chi2, eps = _update(rows, fitted, N, scales)
        move, t, y = np.linalg.norm(theta[: t.size] - t), theta[: t.size], theta[t.size :]
        v = v * max(1.0, chi2)
        spread = float(np.sqrt(v.mean()))
        image = previous.lift(fitted.alpha + fitted.beta * (problem.x + N @ t) + eps, y)
        beliefs.append(problem.x + N @ t)
        sharp, still = spread < 100 * noise * rms and chi2 < 100, move < 0.1 * spread * np.sqrt(len(m))
        waited = 0 if spread < 0.9 * best else waited + 1
        best = min(best, spread)
        if (prior is None and (sharp or still)) or (hopeless and step >= 4 and still) or waited > 8:
            break
    return t, image


def _assemble(problem: Open, fitted: Fit, m: NDArray, image: NDArray, channels: NDArray, prior, noise: float) -> _Rows:
    """The rows of one step: range of W, the earlier layer's gradient scaled to unit rows, the prior."""
    previous, N = problem.previous, problem.N
    q = previous.left.shape[1]
    z = fitted.alpha + fitted.beta * problem.x - previous.bias
    scale = np.sqrt(np.mean((fitted.alpha + fitted.beta * m) ** 2))
    eps, null, b = [previous.left.T], [np.zeros((q, previous.null.shape[1]))], [np.zeros(q)]
    floor, eta = [np.full(q, noise * scale)], []
    if channels.size:
        dz = (fitted.pi.reshape(problem.dx.shape) * problem.dx)[channels]
        K = previous.gradient_rows(dz, np.hstack([previous.pinv, previous.null]))
        weight = 1 / np.maximum(np.linalg.norm(K, axis=1), np.finfo(float).tiny)
        K *= weight[:, None]
        g = problem.G[channels].ravel() * weight
        eps, null, b = [*eps, K[:, : len(m)]], [*null, K[:, len(m) :]], [*b, g]
        floor.append(noise * np.maximum(scale, np.abs(g)))
        eta = _responses(problem, image, channels, weight, q)
    if prior is not None:
        F, target, FP = prior
        eps, null, b = [*eps, FP], [*null, F @ previous.null], [*b, target]
        floor.append(np.ones(len(target)))
    E = np.vstack(eps)
    A, right = np.hstack([E @ (fitted.beta[:, None] * N), np.vstack(null)]), np.concatenate(b) - E @ z
    for rows, entries, R in eta:
        A[rows, : N.shape[1]] += R @ (fitted.rho[entries, None] * N[entries])
        right[rows] -= R @ (fitted.rho * (problem.x - m))[entries]
    return _with_known(problem, _Rows(A, right, np.concatenate(floor), E, eta))


def _with_known(problem: Open, rows: _Rows) -> _Rows:
    """Adds the deficient layer's own word on its weak directions: their coefficients are 0, to a known accuracy."""
    count, d = problem.known.size, problem.N.shape[1]
    if not count:
        return rows
    own = np.zeros((count, rows.A.shape[1]))
    own[:, d - count : d] = np.eye(count)
    A, b = np.vstack([rows.A, own]), np.concatenate([rows.b, np.zeros(count)])
    eps = np.vstack([rows.eps, np.zeros((count, rows.eps.shape[1]))])
    return _Rows(A, b, np.concatenate([rows.floor, problem.known]), eps, rows.eta)


def _responses(problem: Open, image: NDArray, channels: NDArray, weight: NDArray, first: int) -> list:
    """How a change of σ′ at each entry moves the gradient rows of its channel: δx times what that position reads."""
    patches = problem.previous.patches(image)
    taps, pixels = patches.shape
    result = []
    for i, channel in enumerate(channels):
        rows, entries = slice(first + i * taps, first + (i + 1) * taps), slice(channel * pixels, (channel + 1) * pixels)
        result.append((rows, entries, patches * weight[i * taps : (i + 1) * taps, None] * problem.dx[channel].ravel()))
    return result


def _covariance(rows: _Rows, fitted: Fit) -> NDArray:
    """Noise covariance of the rows: what the fits leave over, and the floor of the data."""
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
    S[diagonal] = S[diagonal] * (1 + 1e-12) + rows.floor**2  # the factor keeps S positive definite
    return S


def _update(rows: _Rows, fitted: Fit, N: NDArray, scales: NDArray) -> tuple[NDArray, NDArray, float, NDArray]:
    """One step of generalised least squares: (t, y), variances of x, χ² per row, and the ε that fits best."""
    lower = linalg.cholesky(_covariance(rows, fitted), lower=True, overwrite_a=True, check_finite=False)
    whitened = linalg.solve_triangular(lower, np.column_stack([rows.A, rows.b]), lower=True, check_finite=False)
    A, b = whitened[:, :-1], whitened[:, -1]
    information = A.T @ A
    information[np.diag_indices_from(information)] += scales**-2
    factor = linalg.cholesky(information, lower=True, check_finite=False)
    theta = linalg.cho_solve((factor, True), A.T @ b)
    rest = b - A @ theta
    chi2 = float(rest @ rest) / max(len(b) - len(theta), 1)
    root = linalg.solve_triangular(factor, np.eye(len(theta), N.shape[1]), lower=True, check_finite=False)
    variance = np.einsum("ij,ij->i", N @ (root.T @ root), N)
    dual = linalg.solve_triangular(lower, rest, lower=True, trans=1, check_finite=False)
    eps = fitted.var_eps * (rows.eps.T @ dual)
    for at, entries, R in rows.eta:
        eps[entries] += fitted.cov[entries] * (R.T @ dual[at])
    return theta, np.maximum(variance, 0), chi2, eps


def _certify(problem: Open, t: NDArray, image: NDArray, channels: NDArray, beliefs: list) -> VirtualSolution:
    """Solves once more on the final piece of σ alone, without prior, and weighs the outcome."""
    m = problem.x + problem.N @ t
    rows = _assemble(
        problem, fit(problem.activation, m, np.full(len(m), 1e-60)), m, image, channels, None, problem.noise
    )
    weight = rows.floor.min() / rows.floor
    A, b = rows.A * weight[:, None], rows.b * weight
    norms = np.linalg.norm(A, axis=0) + 1e-300
    values, Q = np.linalg.eigh((A / norms).T @ (A / norms))
    condition = float(np.sqrt(values[-1] / max(values[0], 1e-300)))
    theta = (Q @ ((Q.T @ ((A / norms).T @ b)) / np.maximum(values, 1e-14 * values[-1]))) / norms
    residual = float(problem.noise * np.sqrt(np.mean(((b - A @ theta) / rows.floor.min()) ** 2)))
    equations = problem.previous.left.shape[1] + _independent_gradients(problem, m, channels)
    surplus = equations + problem.known.size - problem.unknowns
    x = problem.x + problem.N @ theta[: t.size]
    kept = not problem.activation.homogeneous or np.array_equal(
        slope(problem.activation, x), slope(problem.activation, m)
    )
    certified = residual <= RESIDUAL * problem.noise and surplus >= SURPLUS and condition <= CONDITION and kept
    return VirtualSolution(
        x if certified else m, certified, equations, len(beliefs), residual, condition, np.array(beliefs)
    )


def _independent_gradients(problem: Open, m: NDArray, channels: NDArray) -> int:
    """Gradient equations that the deficient layer's own constraints do not contain already.

    ⟨G′[o], W′[o′]⟩ = ⟨δz′[o], z′[o′]⟩ = ⟨δx[o], x[o′]⟩ holds for o = o′ where σ is homogeneous and there is no bias, and
    for o ≠ o′ where both channels keep one sign throughout: those equations are known.
    """
    if not channels.size:
        return 0
    slopes = slope(problem.activation, m).reshape(problem.dx.shape)
    rank = problem.previous.gradient_rank((slopes * problem.dx)[channels])
    if not problem.homogeneous:
        return rank
    constant = np.ptp(slopes.reshape(len(slopes), -1), axis=1) == 0
    return rank - len(channels) - int(constant[channels].sum()) * (int(constant.sum()) - 1)
