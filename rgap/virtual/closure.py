"""Virtual constraints, solved: the layer before a rank-deficient one supplies the missing equations.

A deficient layer determines x up to the t in x = x_mn + N t. The layer before requires that σ⁻¹(x) lies in the range of
its W, and that its own gradient is K(δz′) x′ with δz′ = σ′(z′) ∘ δx. For LeakyReLU both are linear in t once the signs
of x are known, and exact where these are right. The paper counts such equations; here they are solved (ours).

The signs are not guessed one by one. Every entry of x has a Gaussian belief N(m, v), under which σ⁻¹ and σ′ are
replaced by their best linear fits (`linearisation`). The fits' residuals are noise of known covariance, and one step of
generalised least squares gives the next belief, its variance scaled by the step's own χ² where that exceeds 1. As v
falls the step becomes the linear system on one piece of σ, which is solved at the end, alone, and certified.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations import LayerSolution
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.network.layer import Layer
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.inference import DeficientLayer, assemble, independent_gradients, update
from rgap.virtual.linearisation import fit, flattened, slope
from rgap.virtual.previous import previous_factors, smooth_image_rows

ERROR_AMPLIFICATION = 5.0  # rough error of a pre-activation, over the gradient's, through the layers above and σ⁻¹
MAX_CERTIFIED_RESIDUAL = 20.0  # largest certified residual, in units of the data's noise; a wrong sign gives thousands
MAX_CERTIFIED_CONDITION = 1e5  # largest certified condition number of the final system
MAX_STEPS = 40  # limit on the steps of one attempt
PRIOR_WIDENING = 30.0  # standard deviation of the first belief on weak directions, in units of the layer's own for them
SETTLED_SHARE = 0.01  # standard deviation, over a belief's noise, from which a layer needs no belief
MAX_HOPELESS_UNKNOWNS = 300  # unknowns up to which a system that is short of equations is approached within a second
MAX_APPROACHED_UNKNOWNS = 1200  # the same of other systems, some ten seconds; no larger one has been closed
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


def close_by_previous(
    before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor, *, full: bool = True
) -> VirtualSolution | None:
    """Determines a deficient layer's input of one image within its null space, by the layer before it.

    Args:
        before: The layer before, and the activation that follows it.
        received: The gradients and their precision.
        solution: The deficient layer's own solution, of one image.
        z: Its pre-activations.
        dx: Gradient of the loss by its input, in any shape.
        full: Whether systems are approached that are short of equations, for a rough picture, or take minutes.

    Returns:
        A `VirtualSolution`; None where there is no null basis, or the layer before has groups, no weight or an
        activation without inverse, is too large, is itself rank-deficient, or has nothing to add.
    """
    if solution.null_basis is None or not before.activation.one_to_one:
        return None
    further = max(before.unknowns - math.prod(before.output_shape), 0)
    if not full and solution.null_basis.shape[1] + further > MAX_APPROACHED_UNKNOWNS:
        return None
    factors = previous_factors(before)
    is_shared = not set(before.weight_names) & set(received.absent)
    if factors is None or not (is_shared or factors.left.size):
        return None
    noise = ERROR_AMPLIFICATION * max(received.precision, FLOAT64_FLOOR)
    middle = before.activation.forward(torch.zeros(before.output_shape, dtype=torch.float64))
    x, null = solution.x.flatten(), solution.null_basis
    problem = DeficientLayer(
        x=(x + null @ (null.T @ (middle.flatten() - x))).numpy(),
        N=torch.cat([solution.null_basis, solution.weak_basis], 1).numpy(),
        known=(noise * z.square().mean().sqrt() * solution.weak_gain).numpy(),
        activation=flattened(before.activation, before.output_shape),
        previous=factors,
        G=before.gradient(received.gradients).numpy() if is_shared else None,
        dx=dx.reshape(before.output_shape).numpy(),
        noise=noise,
    )
    try:
        return solve_virtual(problem, reads_image=before.input_shape[0] in (1, 3), full=full)
    except np.linalg.LinAlgError:  # a wrong hypothesis, whose pre-activations overflow
        return None


def solve_virtual(problem: DeficientLayer, *, reads_image: bool = False, full: bool = True) -> VirtualSolution | None:
    """Recovers a rank-deficient layer's input from its affine solution set and the layer before it.

    Where the layer before reads the image, `smooth_image_rows` are a start for systems with little surplus. Raises
    LinAlgError if a belief is so far off that the equations overflow. Unless `full`, None for a large system that is
    short of equations.
    """
    beliefs: list = []
    for channels, rows in _plan(problem, reads_image):
        independent = 0 if problem.G is None else channels.size * (problem.G[0].size - problem.homogeneous)
        room = problem.previous.left.shape[1] + independent
        hopeless = room + problem.known.size - problem.unknowns < CERTIFICATE_SURPLUS
        if hopeless and not full and problem.unknowns > MAX_HOPELESS_UNKNOWNS:
            return None
        t, image = _attempt(problem, channels, rows, hopeless, beliefs)
        solution = _certify(problem, t, image, _channels(problem), beliefs)
        if solution.certified or hopeless:
            break
    return solution


def _plan(problem: DeficientLayer, reads_image: bool) -> list[tuple[NDArray, tuple | None]]:
    """Attempts by cost: with the range of W alone where that suffices, then with the gradient, first from a prior."""
    supplied = problem.previous.spare
    channels, deficit = _channels(problem), problem.N.shape[1] - problem.known.size
    plan = [(channels[:0], None)] if deficit <= 0.75 * supplied else []
    gradients = 0 if problem.G is None else problem.G.size
    tight = deficit + problem.previous.null.shape[1] > 0.7 * (problem.previous.left.shape[1] + gradients)
    if reads_image and tight:
        plan.append((channels, smooth_image_rows(problem.previous)))
    return [*plan, (channels, None)]


def _channels(problem: DeficientLayer, most: int = 4000) -> NDArray:
    """Output channels whose gradient is used: all, or in large layers enough for three equations per unknown."""
    if problem.G is None:
        return np.arange(0)
    outputs, taps = problem.G.shape[0], problem.G[0].size
    enough = outputs if outputs * taps <= 1000 else max(1, min(outputs, -(-3 * problem.unknowns // taps), most // taps))
    return np.linspace(0, outputs - 1, enough).round().astype(int)


def _attempt(problem: DeficientLayer, channels: NDArray, prior, hopeless: bool, beliefs: list):
    """Steps until the belief is as narrow as the noise, or stalls; the prior takes part in the first steps.

    Ill-conditioned directions that the layer itself knows better than that take no part.
    """
    rms, noise = problem.spread, max(problem.noise, 1e-7)  # a lower one collapses the belief too soon
    whole = problem
    if whole.known.size and whole.known.max() < SETTLED_SHARE * noise * rms:
        problem = replace(whole, N=whole.N[:, : -whole.known.size], known=whole.known[:0])
    previous, N, rough = problem.previous, problem.N, problem.N.astype(np.float32)
    m, t, y = problem.x, np.zeros(N.shape[1]), np.zeros(previous.null.shape[1])
    open_ = t.size - problem.known.size
    at_first = np.concatenate([np.full(open_, rms), np.minimum(PRIOR_WIDENING * problem.known, rms)])
    v = (rough**2 @ at_first.astype(np.float32) ** 2).astype(float)
    scales = np.concatenate([np.full(t.size, rms), np.full(y.size, 3 * rms)])
    image, spread, best, waited = np.full(previous.layer.unknowns, 0.5), rms, np.inf, 0
    if prior is None:
        first = fit(problem.activation, m, v)
        image = previous.lift(first.alpha + first.beta * m, y)
    for step in range(MAX_STEPS):
        if prior is not None and not hopeless and (step >= 10 or (step >= 4 and spread < 0.02 * rms)):
            prior = None
        fitted = fit(problem.activation, m, v)
        rows = assemble(problem, fitted, m, image, channels, prior, noise)
        theta, v, chi2, eps = update(rows, fitted, rough, scales)
        move, t, y = np.linalg.norm(theta[: t.size] - t), theta[: t.size], theta[t.size :]
        v = v * max(1.0, chi2)
        spread, m = float(np.sqrt(v.mean())), problem.x + N @ t
        beliefs.append(m)
        if channels.size or not problem.activation.homogeneous:
            image = previous.lift(fitted.alpha + fitted.beta * m + eps, y)
        sharp, still = spread < 20 * noise * rms, move < 0.1 * spread * np.sqrt(len(m))
        waited = 0 if spread < 0.9 * best else waited + 1
        best = min(best, spread)
        done = prior is None and chi2 < 100 and (sharp or still)
        if done or (hopeless and step >= 4 and still) or waited > 8:
            break
    if problem is not whole:
        whole.range_rows.extend(problem.range_rows)
    return np.pad(t, (0, whole.N.shape[1] - t.size)), image


def _certify(problem: DeficientLayer, t: NDArray, image: NDArray, channels: NDArray, beliefs: list) -> VirtualSolution:
    """Solves on the final piece of σ alone, without prior, until the piece no longer changes, and tests the solution.

    Where it does not fit, the few entries closest to zero are tried with the other sign, one at a time.
    """
    belief = problem.x + problem.N @ t
    piece = _solve_pieces(problem, belief, image, channels)
    if not piece.fits and problem.activation.homogeneous:
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
    for _ in range(MAX_PIECES):
        piece = _solve_piece(problem, m, image, channels)
        if piece.stays:
            break
        m = piece.x
    return piece


def _solve_piece(problem: DeficientLayer, m: NDArray, image: NDArray, channels: NDArray) -> _Piece:
    """Solves the linear system on the piece of σ on which m lies, for (t, y), columns scaled."""
    fitted, N = fit(problem.activation, m, np.full(len(m), 1e-60)), problem.N
    rows = assemble(problem, fitted, m, image, channels, None, problem.noise, certain=True)
    known = np.flatnonzero(np.isfinite(rows.known))  # the deficient layer's own values of ill-conditioned directions
    floor = np.concatenate([rows.floor, rows.known[known]])
    weight = floor.min() / floor
    A = np.vstack([rows.A, np.eye(rows.A.shape[1])[known]]) * weight[:, None]
    b = np.concatenate([rows.b, np.zeros(known.size)]) * weight
    norms = np.linalg.norm(A, axis=0) + 1e-300
    scaled = A / norms
    values, Q = np.linalg.eigh(scaled.T @ scaled)
    kept = np.maximum(values, 1e-14 * values[-1])
    theta = (Q @ ((Q.T @ (scaled.T @ b)) / kept)) / norms
    rest = b - A @ theta
    residual = float(problem.noise * np.sqrt(np.mean((rest / floor.min()) ** 2)))
    std = np.linalg.norm(rest) / np.sqrt(max(len(rest) - len(theta), 1))
    error = std * (Q @ (np.random.default_rng(0).standard_normal(len(theta)) / np.sqrt(kept))) / norms
    x, draw = problem.x + N @ theta[: N.shape[1]], N @ error[: N.shape[1]]
    stays = not problem.activation.homogeneous
    stays = stays or np.array_equal(slope(problem.activation, x), slope(problem.activation, m))
    fits = stays and residual <= MAX_CERTIFIED_RESIDUAL * problem.noise
    return _Piece(x, draw, residual, float(np.sqrt(values[-1] / max(values[0], 1e-300))), stays, fits)
