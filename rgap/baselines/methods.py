"""Deep Leakage from Gradients and Inverting Gradients, and the labels that they assume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rgap.arguments import MAX_SQUARED_NUMBER, check_count, check_labels, check_number, check_seed
from rgap.baselines.matching import GradientObjective, gradient_objective
from rgap.baselines.optimisers import Descended, Record, lbfgs, signed_adam
from rgap.baselines.outcome import Optimised, candidate, outcome
from rgap.client import LocalTraining
from rgap.network.chain import Chain

Gradients = Sequence[Tensor] | Mapping[str, Tensor]

MAX_RETRIES = 4  # new starts that one restart may take when its descent diverges


def dlg(
    model: nn.Module | Chain, gradients: Gradients, image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic", *, batch_size: int = 1, labels: Tensor | Sequence[int] | None = None, steps: int = 1000,
    restarts: int = 1, pixel_range: tuple[float, float] = (0.0, 1.0), noise_std: float | None = None,
    dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str | None = None,
) -> Optimised:  # fmt: skip
    """Deep Leakage from Gradients (Zhu et al. 2019): L-BFGS on the squared distance of the gradients.

    Stronger than the original in four ways, all tried on networks where it is known to work: labels are known or read
    off the last layer (Zhao et al. 2020) instead of optimised, the start is uniform in the pixel range instead of
    normal, the distance is relative and scaled so that L-BFGS does not stop early, and a descent that diverges is
    repeated from a new start.

    Args:
        model: The network, any module that can be differentiated twice, or a `Chain`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        batch_size: Images behind the gradient.
        labels: Labels if they are known, (B,); inferred for a single image.
        steps: Most evaluations of the distance in each restart.
        restarts: Starts for each label that is tried; the result is the one with the smallest gradient residual.
        pixel_range: Smallest and largest value of a pixel; the start and the verdict need it, the descent does not.
        noise_std: Standard deviation of noise known to be on every gradient entry; widens the tolerance.
        dtype: The optimiser's precision, torch.float32 or torch.float64.
        seed: Seed of the starts.
        device: Where the optimiser runs, by default the CPU.

    Returns:
        An `Optimised`; its images are on the CPU.

    Raises:
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.

    Example:
        >>> import rgap
        >>> model = rgap.models.cnn6(seed=0)
        >>> images, labels = rgap.data.load_images("embedded", count=1, classes=2)
        >>> gradients = rgap.client_gradients(model, images, labels)
        >>> result = rgap.baselines.dlg(model, gradients, (3, 32, 32), labels=labels, steps=2)
        >>> result.images.shape, len(result.snapshots) > 0
        (torch.Size([1, 3, 32, 32]), True)
    """
    problem = gradient_objective(model, gradients, image_shape, loss, batch_size, pixel_range, noise_std, dtype, device)

    def descend(start: Tensor, known: Tensor, record: Record) -> Descended:
        objective = problem.objective(known, "squared")
        return lbfgs(objective, start, steps, record, "DLG", diverged=problem.diverged)

    return _restarted(problem, descend, labels, steps, restarts, seed)


def inverting_gradients(
    model: nn.Module | Chain, gradients: Gradients, image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic", *, batch_size: int = 1, labels: Tensor | Sequence[int] | None = None, steps: int = 1000,
    restarts: int = 1, tv_weight: float = 0.01, rate: float = 0.05, pixel_range: tuple[float, float] = (0.0, 1.0),
    noise_std: float | None = None, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: torch.device | str | None = None, training: LocalTraining | None = None,
) -> Optimised:  # fmt: skip
    """Inverting Gradients (Geiping et al. 2020): cosine distance and total variation, Adam on signs, in the pixel box.

    The cosine does not depend on the gradient's scale: in a fully connected network without biases an image and its
    darker copy have gradients of one direction, and the total variation prefers the darker.

    Arguments, result and errors are those of `dlg`, with `pixel_range` as the box, and three more: `tv_weight`, the
    weight of the total variation (mean absolute difference of neighbouring pixels), `rate`, the first step length in
    widths of the pixel range, and `training`, the client's local steps, which are then unrolled at every step of the
    optimiser: the gradients are those of `rgap.client.mean_gradients`.

    Example:
        >>> import rgap
        >>> model = rgap.models.cnn6(seed=0)
        >>> images, labels = rgap.data.load_images("embedded", count=1, classes=2)
        >>> gradients = rgap.client_gradients(model, images, labels)
        >>> result = rgap.baselines.inverting_gradients(model, gradients, (3, 32, 32), labels=labels, steps=2)
        >>> result.verdict
        'inconsistent'
    """
    options = (batch_size, pixel_range, noise_std, dtype, device, training)
    problem = gradient_objective(model, gradients, image_shape, loss, *options)
    tv_weight, rate = (
        check_number("tv_weight", tv_weight),
        check_number("rate", rate, high=MAX_SQUARED_NUMBER, open_low=True),
    )
    box, first_step = (problem.pixels.low, problem.pixels.high), rate * problem.pixels.width

    def descend(start: Tensor, known: Tensor, record: Record) -> Descended:
        objective = problem.objective(known, "cosine", tv_weight)
        return signed_adam(objective, start, steps, record, box, first_step, "Inverting Gradients")

    return _restarted(problem, descend, labels, steps, restarts, seed)


def label_choices(problem: GradientObjective, labels: Tensor | Sequence[int] | None) -> list[Tensor]:
    """The labels to try, tensors (B,): those that were given, or those that the last layer's gradient allows.

    They are inferred for a single image only. For softmax cross-entropy the gradient with respect to the outputs is
    negative at the label alone (Zhao et al. 2020, iDLG): with a bias it is the bias's gradient, without one the label's
    row of G = δz xᵀ is the one that points against the others. A single output leaves both labels, unless the gradient
    of its bias determines the sign.
    """
    count = problem.shape[0]
    if labels is not None:
        return [check_labels(labels, count).to(problem.sizes.device)]
    if count > 1:
        raise ValueError(f"labels are missing; of {count} images in one gradient they are not inferred, give them")
    found = _labels_from_head(problem)
    if not found:
        raise ValueError(
            f"labels are missing; the {problem.loss} loss of this network does not determine them, give them"
        )
    return [torch.tensor([label], device=problem.sizes.device) for label in found]


def _labels_from_head(problem: GradientObjective) -> list[int]:
    shared = list(problem.received.gradients.values())
    G = next((g for g in reversed(shared) if g.ndim == 2), shared[-1])
    bias = shared[-1] if shared[-1].ndim == 1 and len(shared[-1]) == len(G) else None
    if len(G) == 1:
        return [0, 1] if bias is None or problem.loss == "mse" else [int(bias.item() < 0)]
    if problem.loss != "cross_entropy":
        return []
    if bias is not None:
        return [int(bias.argmin())]
    if len(G) == 2:
        return [0, 1]  # two rows that point against each other
    unit = G / G.abs().max()
    products = unit @ unit.T
    return [int((products.sum(1) - products.diagonal()).argmin())]


def _restarted(
    problem: GradientObjective, descend: Callable[[Tensor, Tensor, Record], Descended], labels, steps, restarts, seed
) -> Optimised:
    """Runs every restart for every label; a descent that diverges is started again from new noise."""
    check_count("steps", steps)
    check_count("restarts", restarts)
    generator, record = torch.Generator().manual_seed(check_seed(seed)), Record()
    candidates, notes = [], []
    for known in label_choices(problem, labels):
        for _ in range(restarts):
            if record.rows:
                record.next_restart()
            for _ in range(1 + MAX_RETRIES):
                found = descend(problem.random_images(generator), known, record)
                if found.diverged is not None:
                    notes.append(f"start {record.restart} diverged at step {found.diverged}")
                    record.next_restart()
                candidates.append(candidate(problem, found.best, known))
                if found.diverged is None:
                    break
    return outcome(problem, candidates, record, notes)
