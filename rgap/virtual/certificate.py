"""The certificate of virtual constraints: the linear system on one piece of σ, alone, and whether its solution fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.virtual.inference import DeficientLayer, RangeRows, gradient_rows, independent_gradients
from rgap.virtual.linearisation import Fit, fit, slope

MAX_CERTIFIED_RESIDUAL = 20.0  # largest certified residual, in units of the data's noise; a wrong sign gives thousands
MAX_CERTIFIED_CONDITION = 1e5  # largest certified condition number of the final system
MAX_ROUGH_CONDITION = 1e3  # condition number of the range's equations up to which they are made in float32 and refined
MAX_REFINEMENTS = 4  # solutions, each by the residual in float64 that the last one has left
REFINED_STEP = 20.0  # relative step that ends them, in units of the data's noise: float32 leaves little of it
WEAK_SHARE = 0.05  # eigenvalue, over the largest, up to which the range alone sees a direction badly
MAX_PIECES = 2  # systems on one piece of σ solved at the end; each corrects signs of entries near zero
MAX_TANGENTS = 12  # the same where σ is smooth; from a good start four or five suffice
MAX_TANGENT_MISS = 1e-4  # square of the last relative step there, in units of the data's noise, at the end
MAX_CROSSING = 5.0  # root mean square errors by which an entry may lie beyond zero: a wrong sign shows in the residual
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

    Where it does not fit, the few entries closest to zero are tried with the other sign, one at a time, unless the
    range of the layer before contradicts the piece by itself.
    """
    belief = problem.x + problem.N @ t
    piece = _solve_pieces(problem, t, belief, image, channels)
    determined = piece.condition <= MAX_CERTIFIED_CONDITION  # a sign must not decide what the equations leave open
    if determined and piece.in_range and not piece.fits and problem.activation.homogeneous:
        flips = (np.arange(len(belief)) == entry for entry in np.argsort(np.abs(belief))[:MAX_SIGN_TRIALS])
        trials = (_solve_pieces(problem, t, np.where(flip, -belief, belief), image, channels) for flip in flips)
        piece = next((trial for trial in trials if trial.fits), piece)
    equations = problem.previous.left.shape[1] + independent_gradients(problem, piece.x, channels)
    surplus = equations + problem.known.size - problem.unknowns
    certified = piece.fits and surplus >= CERTIFICATE_SURPLUS and piece.condition <= MAX_CERTIFIED_CONDITION
    best, draw = (piece.x, piece.draw) if certified else (belief, 0 * belief)
    numbers = equations, len(beliefs), piece.residual, piece.condition
    return VirtualSolution(best, certified, *numbers, np.array(beliefs), draw)


@dataclass(frozen=True)
class _Piece:
    """The solution on one piece of σ, a draw of its error, whether it lies on that piece, and what its residual is."""

    x: NDArray
    draw: NDArray
    residual: float
    condition: float
    stays: bool
    is_small: bool  # the residual, for the data's noise
    in_range: bool = True  # whether that of the range's equations alone is, where they have been solved by themselves

    @property
    def fits(self) -> bool:
        """Whether the solution is one."""
        return self.stays and self.is_small


def _solve_pieces(problem: DeficientLayer, t: NDArray, m: NDArray, image: NDArray, channels: NDArray) -> _Piece:
    """Solves on the piece of σ on which m lies, then on the one on which the solution lies, and so on.

    A smooth σ has no pieces: it is replaced by its tangents at m, then at the solution, until this fits or is as near.
    """
    kinked, last = problem.activation.homogeneous, np.inf
    for left in reversed(range(MAX_PIECES if kinked else MAX_TANGENTS)):
        piece = _solve_piece(problem, t, m, image, channels, last=not left)
        moved = np.linalg.norm(piece.x - m)
        done = piece.stays if kinked else piece.fits or not moved < last
        if done or piece.condition > MAX_CERTIFIED_CONDITION:
            break
        m, last = piece.x, moved
    return piece


def _solve_piece(
    problem: DeficientLayer, t: NDArray, m: NDArray, image: NDArray, channels: NDArray, last: bool
) -> _Piece:
    """Solves the linear system on the piece of σ on which m lies, for θ = (t, y), from a t near the solution.

    Where the range of the layer before and what is `known` determine θ, its gradient corrects it in the directions P
    that they see worst, and is tested as a whole; elsewhere both kinds of equations are solved together. On any piece
    but the `last` the gradient is spared where the range alone contradicts the piece; where it only leads to another,
    by entries near zero, the gradient has more to say of their signs.
    """
    fitted, N = fit(problem.activation, m, np.full(len(m), 1e-60)), problem.N
    (d, r), q, known = (N.shape[1], problem.previous.null.shape[1]), problem.previous.left.shape[1], problem.known.size
    unit = problem.noise * np.sqrt(np.mean((fitted.alpha + fitted.beta * m) ** 2))
    theta, P, strong, draw, generator = np.zeros(d + r), np.eye(d + r), [], 0.0, np.random.default_rng(0)
    alone = not r and q + known - d >= CERTIFICATE_SURPLUS and channels.size
    rough = alone and problem.previous.is_sharp
    A, rest_of = _own_rows(problem, fitted, unit, problem.rough_rows if rough else problem.range_rows)
    if alone:
        own = _Decomposed.of(A)
        if rough and own.values[-1] > MAX_ROUGH_CONDITION**2 * own.values[0]:
            rough, (A, _) = False, _own_rows(problem, fitted, unit, problem.range_rows)
            own = _Decomposed.of(A)
        theta, rest = own.refined(t, rest_of, REFINED_STEP * problem.noise)
        hasty = _piece(problem, m, theta, np.zeros(d), rest / unit, own.values)
        if not (last or hasty.stays or hasty.is_small or hasty.condition > MAX_CERTIFIED_CONDITION):
            return hasty
        seen = own.values > WEAK_SHARE * own.values[-1]
        strong, P, draw = own.values[seen], own.directions[:, ~seen], own.draw(rest, generator, seen)
    A = A @ P
    if channels.size:
        columns = problem.rough @ P.astype(np.float32) if rough else N @ P[:d]
        by_gradient = gradient_rows(problem, fitted, m, image, channels, columns, rough=rough)
        weight = unit / np.maximum(unit, problem.noise * by_gradient.size)
        A = np.vstack([A, (by_gradient.A + by_gradient.null @ P[d:]) * weight[:, None]])

    def rest_of_all(theta: NDArray) -> NDArray:
        if not channels.size:
            return rest_of(theta)
        missed = by_gradient.rest(problem.x + N @ theta[:d]) - by_gradient.null @ theta[d:]
        return np.concatenate([rest_of(theta), missed * weight])

    # P's columns, which one system has singled out, show by their length what neither sees
    found = _Decomposed.of(A, scaled=not len(strong))
    theta, rest = found.refined(theta, rest_of_all, REFINED_STEP * problem.noise, P)
    error = draw + P @ found.draw(rest, generator)
    piece = _piece(problem, m, theta[:d], error[:d], rest / unit, np.concatenate([found.values, strong]))
    return replace(piece, in_range=not alone or hasty.is_small)


def _own_rows(
    problem: DeficientLayer, fitted: Fit, unit: float, rows: RangeRows
) -> tuple[NDArray, Callable[[NDArray], NDArray]]:
    """The range's equations, and what the deficient layer knows of ill-conditioned directions: A and θ -> b − A θ.

    All in units of the range's; b − A θ is not made with A, which may be rough.
    """
    previous, N, known = problem.previous, problem.N, unit / problem.known
    d, r = N.shape[1], previous.null.shape[1]
    q, at = previous.left.shape[1], slice(d - len(known), d)
    A = np.zeros((q + len(known), d + r))
    A[:q, :d], A[:q, d:], A[q:, at] = rows.at(fitted.beta), -previous.gains, np.diag(known)

    def rest(theta: NDArray) -> NDArray:
        z = fitted.alpha + fitted.beta * (problem.x + N @ theta[:d]) - previous.bias
        return np.concatenate([previous.gains @ theta[d:] - z @ previous.left, -known * theta[at]])

    return A, rest


def _piece(problem: DeficientLayer, m: NDArray, t: NDArray, error: NDArray, rest: NDArray, values: NDArray) -> _Piece:
    """What a solution t shows, its draw of an error, its residuals, and squares of the system's singular values.

    Where the residual is small, an entry that is beyond zero by no more than its error is put on its side of the piece.
    """
    x, draw, sides = problem.x + problem.N @ t, problem.N @ error, slope(problem.activation, m)
    residual = float(problem.noise * np.sqrt(np.mean(rest**2)))
    is_small = residual <= MAX_CERTIFIED_RESIDUAL * problem.noise
    if is_small and problem.activation.homogeneous:
        near = np.abs(x) <= MAX_CROSSING * np.sqrt(np.mean(draw**2))
        x = np.where(near & (slope(problem.activation, x) != sides), np.copysign(0.1 * x, m), x)
    if problem.activation.homogeneous:
        stays = np.array_equal(slope(problem.activation, x), sides)
    else:  # a tangent misses by the square of the distance
        stays = bool(np.sum((x - m) ** 2) <= MAX_TANGENT_MISS * problem.noise * np.sum(m**2))
    condition = float(np.sqrt(values.max() / max(values.min(), 1e-300)))
    return _Piece(x, draw, residual, condition, stays, is_small)


class _Decomposed(NamedTuple):
    """A system in the singular directions of its matrix A, whose columns may be divided by their norms."""

    A: NDArray
    values: NDArray  # squares of the singular values, ascending
    directions: NDArray  # columns, of unit length once they are multiplied with the norms

    @classmethod
    def of(cls, A: NDArray, scaled: bool = True) -> _Decomposed:
        norms = np.linalg.norm(A, axis=0) + 1e-300 if scaled else np.ones(A.shape[1])
        values, Q = np.linalg.eigh(A.T @ A / norms / norms[:, None])
        return cls(A, values, Q / norms[:, None])

    @property
    def kept(self) -> NDArray:
        """The values that are divided by."""
        return np.maximum(self.values, 1e-14 * self.values[-1:])

    def solve(self, b: NDArray) -> NDArray:
        """The least-squares solution of A x = b."""
        return self.directions @ (self.directions.T @ (self.A.T @ b) / self.kept)

    def refined(
        self, x: NDArray, rest: Callable[[NDArray], NDArray], enough: float, P: NDArray | None = None
    ) -> tuple[NDArray, NDArray]:
        """The solution from x, along the columns of P, and its residual, for a rough A and x -> b − A x that is not.

        A relative step that is small `enough` is the last.
        """
        for _ in range(MAX_REFINEMENTS):
            step = self.solve(rest(x)) if P is None else P @ self.solve(rest(x))
            x = x + step
            if np.linalg.norm(step) <= enough * np.linalg.norm(x):
                break
        return x, rest(x)

    def draw(self, rest: NDArray, generator: np.random.Generator, kept: NDArray | slice = slice(None)) -> NDArray:
        """A draw of the solution's error in some of the directions, from its residual."""
        std = np.linalg.norm(rest) / np.sqrt(max(len(rest) - len(self.values), 1))
        return self.directions[:, kept] @ (std * generator.standard_normal(len(self.values)) / np.sqrt(self.kept))[kept]
