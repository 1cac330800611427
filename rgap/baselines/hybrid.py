"""The hybrid: the closed form, then gradient matching for what it left undetermined (ours, after the paper's H-GAP).

A deficient layer's input is x = x_mn + N t, and only t is optimised; what the layer determines stays. The objective
uses the layer before: σ⁻¹(x) − b lies in the range of its weights, and its gradient is the shared one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rgap.arguments import check_count, check_number
from rgap.attack.arguments import checked_chain
from rgap.attack.descent import Closer, close_by_virtual_constraints, descend
from rgap.attack.reconstruct import reconstruct
from rgap.baselines.matching import GradientObjective, gradient_objective
from rgap.baselines.methods import Gradients
from rgap.baselines.optimisers import Record, lbfgs
from rgap.baselines.outcome import MAX_ROUNDING, Optimised, candidate, outcome
from rgap.client import loss_value
from rgap.equations import LayerSolution
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain, Layer
from rgap.results import Candidate
from rgap.shared_gradient import SharedGradient
from rgap.virtual.certificate import VirtualSolution
from rgap.virtual.previous import PreviousLayer, previous_factors

NOISE_TV = 0.01  # weight of the total variation for gradients that are noisier than rounding
REFINE_ABOVE_RESIDUAL = 0.03  # residual above which matching refines; below, images of LeakyReLU networks became worse
RANGE_ONLY_SHARE = 0.9  # open unknowns per range equation up to which the range is matched alone, without the gradient
GRADIENT_WEIGHT = 0.1  # weight of the relative gradient residual beside the relative range residual


def hybrid(
    model: nn.Module | Chain, gradients: Gradients, image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic", *, labels: Tensor | Sequence[int] | None = None, steps: int = 300,
    tv_weight: float | None = None, virtual_constraints: bool = False, pixel_range: tuple[float, float] = (0.0, 1.0),
    rcond: float | None = None, noise_std: float | None = None, dtype: torch.dtype = torch.float64, seed: int = 0,
    device: torch.device | str | None = None,
) -> Optimised:  # fmt: skip
    """Closed form, then gradient matching where the closed form left something open or missed the gradient.

    1. `rgap.reconstruct`. If its result is consistent and leaves nothing open, it is the result.
    2. At a rank-deficient layer the input is x_mn + N t, and only t is optimised: what the layer determines stays, and
       there are as many variables as equations are missing (280 in CNN6-d, not 3,072 pixels).
    3. If the gradient residual is still above 3 %, or the gradient is noisier than rounding: L-BFGS on the squared
       distance and total variation, from the best image so far. The recursion passes the noise of each layer on to the
       next; matching weighs all equations at once.

    Args:
        model: The network, a chain that `rgap.reconstruct` takes, or a `Chain`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        labels: The label if it is known, (1,).
        steps: Most evaluations in each of stages 2 (for each open layer) and 3.
        tv_weight: Weight of the total variation in stage 3, the mean absolute difference of neighbouring pixels; by
            default 0.01 where the gradient is noisier than rounding, else 0.
        virtual_constraints: Whether the closed form may use them; then stage 2 has less to do.
        pixel_range: Smallest and largest value of a pixel.
        rcond: Singular values below rcond times the largest count as zero.
        noise_std: Standard deviation of noise known to be on every gradient entry.
        dtype: The precision of stage 3, torch.float32 or torch.float64.
        seed: Seed of the closed form; the optimiser starts from its result, not at random.
        device: Where stage 3 runs, by default the CPU.

    Returns:
        An `Optimised` of one image; its candidates are the closed form and each stage's result, best first by gradient
        residual, restarts 0, 1, … of the history in order of time (step 0 of restart 0 is the closed form). Where a
        null space was open the verdict stays "rank-deficient": an optimiser certifies nothing.

    Raises:
        UnsupportedLayerError: As `rgap.reconstruct`.
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.

    Example:
        >>> import rgap
        >>> model = rgap.models.cnn6(seed=0)
        >>> images, labels = rgap.data.load_images("embedded", count=1, classes=2)
        >>> gradients = rgap.client_gradients(model, images, labels)
        >>> result = rgap.baselines.hybrid(model, gradients, (3, 32, 32), steps=2)
        >>> rgap.metrics.psnr_db(result.images, images).item() > 90
        True
    """
    check_count("steps", steps)
    if tv_weight is not None:
        check_number("tv_weight", tv_weight)
    record = Record()
    chain = checked_chain(model, image_shape)
    problem = gradient_objective(chain, gradients, None, loss, 1, pixel_range, noise_std, dtype, device)
    closed = reconstruct(
        chain, gradients, loss=loss, labels=labels, virtual_constraints=virtual_constraints, pixel_range=pixel_range,
        rcond=rcond, noise_std=noise_std, seed=seed, gradient_scale=1.0,
        effort="full",
    )  # fmt: skip
    first = closed.candidates[0]
    record.note(0, first.gradient_residual**2, first.gradient_residual, first.images)
    noisy = problem.received.precision > MAX_ROUNDING
    if closed.verdict in ("exact", "ambiguous") and not noisy:
        return Optimised(**vars(closed), history=record.frame(), snapshots=tuple(record.snapshots))
    candidates, notes = [first], list(closed.notes)
    if first.open_layers:
        close = gradient_matching_closer(chain, first.open_layers, steps, record, filled := [])
        descent = descend(chain, problem.received, start_of(chain, first, loss), close=close)
        if filled:
            image = descent.layer_inputs[chain.layers[0].name].reshape(1, *chain.image_shape)
            candidates.append(_like(first, candidate(problem, image, first.labels)))
            notes += filled
    best = min(candidates, key=lambda c: c.gradient_residual)
    if noisy or best.gradient_residual > max(REFINE_ABOVE_RESIDUAL, problem.received.tolerance):
        weight = tv_weight if tv_weight is not None else NOISE_TV * noisy
        refined = _refine(problem, best, steps, weight, record)
        candidates.append(_like(first, candidate(problem, refined, best.labels)))
    notes.append(f"gradient matching took {len(record.rows) - 1} evaluations after the closed form")
    return outcome(problem, candidates, record, notes)


def _like(first: Candidate, found: Candidate) -> Candidate:
    """The refined image, with the reports and the open layers of the descent that it came from."""
    return replace(found, layers=first.layers, open_layers=first.open_layers)


def _refine(problem: GradientObjective, best: Candidate, steps: int, tv_weight: float, record: Record) -> Tensor:
    """L-BFGS from the best image so far, clamped to the pixel range, NaN replaced by the range's middle."""
    record.next_restart()
    low, width = problem.low, problem.pixels.width
    objective = problem.objective(best.labels.to(problem.sizes.device), "squared", tv_weight)
    start = best.images.nan_to_num(low + width / 2).clamp(low, low + width).to(problem.sizes)
    return lbfgs(objective, start, steps, record, title="hybrid", diverged=problem.diverged).best


def start_of(chain: Chain, found: Candidate, loss: str) -> Start:
    """The hypothesis behind a candidate for one image, at the last layer."""
    head = chain.layers[-1]
    x = found.layer_inputs[head.name].reshape(1, *head.input_shape)
    z = (head.apply(x) + head.pre_bias()).reshape(1, -1).requires_grad_()
    (dz,) = torch.autograd.grad(loss_value(loss, z, found.labels.cpu()), z)
    dx = head.adjoint(dz.reshape(1, *head.output_shape))
    return Start(len(chain.layers) - 1, found.labels.cpu(), x.flatten(1), dx.flatten(1), ((),), found.layers[:1])


def gradient_matching_closer(
    chain: Chain, open_layers: Sequence[str], steps: int, record: Record, notes: list[str]
) -> Closer:
    """A closer that fills null spaces by L-BFGS, and never certifies what it has filled in.

    Fills the first of the open layers (names) and every deficient layer below; those above are closed by virtual
    constraints, as they were for the candidate. At most `steps` evaluations per layer, each layer a restart of its own
    in the record; `notes`, empty at first, receives a sentence for each layer that was filled.
    """

    def close(before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor):
        name = solution.report.name
        if name not in open_layers and not notes:
            return close_by_virtual_constraints(before, received, solution, z, dx)
        factors = previous_factors(before, weak_ratio=0) if solution.null_basis is not None else None
        if factors is None:
            return None
        notes.append(f"{solution.null_basis.shape[1]} open unknowns of layer {name!r} by gradient matching")
        shown = before is chain.layers[0]
        is_shared = not set(before.weight_names) & set(received.absent)
        G = before.gradient(received.gradients) if is_shared else None
        return _filled(solution, factors, G, dx, steps, record, shown)

    return close


def _filled(
    solution: LayerSolution, previous: PreviousLayer, G: Tensor | None, dx: Tensor, steps: int, record: Record,
    shown: bool,
) -> VirtualSolution:  # fmt: skip
    """The layer's input with the t that matches best; `shown`: the input of the layer before is the image to record."""
    before, x0, N = previous.layer, solution.x.flatten(), solution.null_basis
    left, pinv, order = map(torch.from_numpy, (previous.left, previous.pinv, np.argsort(previous.order)))
    bias = torch.from_numpy(previous.bias.copy())
    size = (before.activation.inverse(x0) - bias).square().sum()
    range_only = G is None or N.shape[1] <= RANGE_ONLY_SHARE * left.shape[1]

    def input_before(t: Tensor) -> Tensor:
        z = before.activation.inverse(x0 + N @ t)
        return (pinv @ (z - bias))[order].reshape(1, *before.input_shape)

    def misfit(t: Tensor) -> tuple[Tensor, float]:
        z = before.activation.inverse(x0 + N @ t)
        value = (left.T @ (z - bias)).square().sum() / size
        if range_only:
            return value, value.item() ** 0.5
        dz = (before.activation.derivative(z) * dx.flatten()).reshape(before.output_shape)
        missed = (before.weight_gradient(input_before(t), dz) - G).square().sum() / G.square().sum()
        return value + GRADIENT_WEIGHT * missed, missed.item() ** 0.5

    record.next_restart()
    found = lbfgs(misfit, x0.new_zeros(N.shape[1]), steps, record, "null space", images=input_before if shown else None)
    x = (x0 + N @ found.best).numpy()
    nothing = np.zeros((0, len(x)))
    return VirtualSolution(x, False, left.shape[1], steps, found.loss**0.5, 1.0, nothing, np.zeros(len(x)))
