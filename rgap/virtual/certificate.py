"""The certificate of virtual constraints: the linear system on one piece of σ, alone, and whether its solution fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.virtual.inference import DeficientLayer, assemble, gradient_rows, independent_gradients
from rgap.virtual.linearisation import Fit, fit, slope

MAX_CERTIFIED_RESIDUAL = 20.0  # largest certified residual, in units of the data's noise; a wrong sign gives thousands
MAX_CERTIFIED_CONDITION = 1e5  # largest certified condition number of the final system
WEAK_SHARE = 0.07  # eigenvalue, over the largest, up to which the range alone sees a direction badly
MAX_PIECES = 2  # systems on one piece of σ solved at the end; each corrects signs of entries near zero
MAX_SIGN_TRIALS = 4  # entries closest to zero whose signs are flipped, one at a time, where the solution does not fit


@dataclass(frozen=True)
class VirtualSolution:
    """The input of a layer after the equations of the layer before have joined its own."""

    # the input, (n,), or for a batch (B, n); not certified, the mean of the last belief or the last iterate
    x: NDArray | Tensor
    certified: bool  # residual at noise level, surplus equations, full column rank, and the signs those of the solution
    equations: int  # independent equations that were used
    iterations: int  # steps over all attempts, or systems that were solved
    residual: float  # root-mean-square residual of these equations relative to the size of z′
    condition: float  # condition number of the final system
    # for one image, the mean of the belief on x after each step, (iterations, n)
    beliefs: NDArray | None = field(default=None, repr=False)
    # for one image, one draw of the error of x from the final residual, (n,); 0 where it is not certified
    draw: NDArray | None = field(default=None, repr=False)
    solved: Any = field(default=None, repr=False)  # for a batch, the linearised constraints and the last solution


def certify(problem: DeficientLayer, t: NDArray, image: NDArray, channels: NDArray, beliefs: list) -> VirtualSolution:
    """Solves on the final piece of σ alone, without prior, until the piece no longer changes, and tests the solution.

    Where it does not fit, the few entries closest to zero are tried with the other sign, one at a time.
    """
    belief = problem.x + problem.N @ t
    piece = _solve_pieces(problem, belief, image, channels)
    determined = piece.condition <= MAX_CERTIFIED_CONDITION  # a sign must not decide what the equations leave open
    if determined and not piece.fits and problem.activation.homogeneous:
        flips = (np.arange(len(belief)) == entry for entry in np.argsort(np.abs(belief))[:MAX_SIGN_TRIALS])
        trials = (_solve_pieces(problem, np.where(flip, -belief, belief), image, channels) for flip in flips)
        piece = next((trial for trial in trials if trial.fits), piece)
    equations = problem.previous.left.shape[1] + independent_gradients(problem, piece.x, channels)
    surplus = equations + problem.known.size - problem.unknowns
    certified = piece.fits and surplus >= CERTIFICATE_SURPLUS and piece.condition <= MAX_CERTIFIED_CONDITION
    best, draw = (piece.x, piece.draw) if certified else (belief, 0 * belief)
    numbers = equations, len(beliefs), piece.residual, piece.condition
    return VirtualSolution(best, certified, *numbers, np.array(beliefs), draw)


@dataclass(frozen=True)
class _Piece:
    """The solution on one piece of σ, a draw of its error, whether it lies on that piece, and also fits."""

    x: NDArray
    draw: NDArray
    residual: float
    condition: float
    stays: bool
    fits: bool


def _solve_pieces(problem: DeficientLayer, m: NDArray, image: NDArray, channels: NDArray) -> _Piece:
    """Solves on the piece of σ on which m lies, then on the one on which the solution lies, and so on."""
    for left in reversed(range(MAX_PIECES)):
        piece = _solve_piece(problem, m, image, channels, last=not left)
        if piece.stays or piece.condition > MAX_CERTIFIED_CONDITION:
            break
        m = piece.x
    return piece


def _solve_piece(problem: DeficientLayer, m: NDArray, image: NDArray, channels: NDArray, last: bool) -> _Piece:
    """Solves the linear system on the piece of σ on which m lies, for θ = (t, y).

    Where the range of the layer before and what is `known` determine θ, its gradient corrects it in the directions P
    that they see worst, and is tested as a whole; elsewhere both kinds of equations are solved together. On any piece
    but the `last` the gradient is spared where the range alone leads to another one.
    """
    fitted, N = fit(problem.activation, m, np.full(len(m), 1e-60)), problem.N
    d, r = N.shape[1], problem.previous.null.shape[1]
    unit = problem.noise * np.sqrt(np.mean((fitted.alpha + fitted.beta * m) ** 2))
    A, b = _own_rows(problem, fitted, m, unit)
    theta, P, strong, draw, generator = np.zeros(d + r), np.eye(d + r), [], 0.0, np.random.default_rng(0)
    if not r and len(A) - d >= CERTIFICATE_SURPLUS and channels.size:
        own = _least_squares(A, b, np.linalg.norm(A, axis=0), generator)
        hasty = _piece(problem, m, (own.directions @ own.x)[:d], np.zeros(d), own.rest / unit, own.values)
        if not (last or hasty.stays or hasty.condition > MAX_CERTIFIED_CONDITION):
            return hasty
        seen = own.values > WEAK_SHARE * own.values[-1]
        strong, P = own.values[seen], own.directions[:, ~seen]
        theta, draw = own.directions[:, seen] @ own.x[seen], own.directions[:, seen] @ own.draw[seen]
    A, b, norms = A @ P, b - A @ theta, np.ones(P.shape[1])
    if channels.size:
        own = gradient_rows(problem, fitted, m, image, channels, problem.x + N @ theta[:d], N @ P[:d])
        weight = unit / np.maximum(unit, problem.noise * own.size)
        A = np.vstack([A, (own.A + own.null @ P[d:]) * weight[:, None]])
        b = np.concatenate([b, (own.b - own.null @ theta[d:]) * weight])
    if not len(strong):  # P's columns, which one system has singled out, show by their length what neither sees
        norms = np.linalg.norm(A, axis=0)
    found = _least_squares(A, b, norms, generator)
    P = P @ found.directions
    t, error = (theta + P @ found.x)[:d], (draw + P @ found.draw)[:d]
    return _piece(problem, m, t, error, found.rest / unit, np.concatenate([found.values, strong]))


def _own_rows(problem: DeficientLayer, fitted: Fit, m: NDArray, unit: float) -> tuple[NDArray, NDArray]:
    """The range's equations, and what the deficient layer knows of ill-conditioned directions, in the same units."""
    rows = assemble(problem, fitted, m, problem.x[:0], np.arange(0), None, problem.noise)
    known = np.flatnonzero(np.isfinite(rows.known))
    weight = unit / np.concatenate([rows.floor, rows.known[known]])
    A, b = np.vstack([rows.A, np.eye(rows.A.shape[1])[known]]), np.concatenate([rows.b, np.zeros(known.size)])
    return A * weight[:, None], b * weight


def _piece(problem: DeficientLayer, m: NDArray, t: NDArray, error: NDArray, rest: NDArray, values: NDArray) -> _Piece:
    """What a solution t shows, its draw of an error, its residuals, and squares of the system's singular values."""
    x, residual = problem.x + problem.N @ t, float(problem.noise * np.sqrt(np.mean(rest**2)))
    stays = not problem.activation.homogeneous
    stays = stays or np.array_equal(slope(problem.activation, x), slope(problem.activation, m))
    condition = float(np.sqrt(values.max() / max(values.min(), 1e-300)))
    fits = stays and residual <= MAX_CERTIFIED_RESIDUAL * problem.noise
    return _Piece(x, problem.N @ error, residual, condition, stays, fits)


class _Solution(NamedTuple):
    """A least-squares solution in the singular directions of A, whose columns are divided by their norms."""

    values: NDArray  # squares of the singular values, ascending
    directions: NDArray  # columns, of unit length once they are multiplied with the norms
    x: NDArray  # the solution's coefficients
    draw: NDArray  # a draw of their errors, from the residual
    rest: NDArray  # b − A x


def _least_squares(A: NDArray, b: NDArray, norms: NDArray, generator: np.random.Generator) -> _Solution:
    scaled = A / (norms + 1e-300)
    values, Q = np.linalg.eigh(scaled.T @ scaled)
    kept = np.maximum(values, 1e-14 * values[-1:])
    x = (Q.T @ (scaled.T @ b)) / kept
    rest = b - scaled @ (Q @ x)
    std = np.linalg.norm(rest) / np.sqrt(max(len(rest) - len(x), 1))
    return _Solution(
        values, Q / (norms + 1e-300)[:, None], x, std * generator.standard_normal(len(x)) / np.sqrt(kept), rest
    )
