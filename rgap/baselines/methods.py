"""Deep Leakage from Gradients and Inverting Gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rgap.baselines.labels import label_choices
from rgap.baselines.matching import Matching, matching
from rgap.baselines.optimisers import FAR, Descended, Record, lbfgs, signed_adam, total_variation
from rgap.baselines.outcome import Optimised, candidate, outcome
from rgap.network.layer import Chain

Gradients = Sequence[Tensor] | Mapping[str, Tensor]

RETRIES = 4
"""New starts that one restart may take when its descent diverges."""


def dlg(
    model: nn.Module | Chain,
    gradients: Gradients,
    image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic",
    *,
    batch_size: int = 1,
    labels: Tensor | Sequence[int] | None = None,
    steps: int = 1000,
    restarts: int = 1,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    noise_std: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Optimised:
    """Deep Leakage from Gradients (Zhu et al. 2019): L-BFGS on the squared distance of the gradients.

    Stronger than the original in four ways, all tried on networks where it is known to work: labels are known or read
    off the last layer (Zhao et al. 2020) instead of optimised, the start is uniform in the pixel range instead of
    normal, the distance is relative and scaled so that L-BFGS does not stop early, and a descent that diverges is begun
    again from a new start.

    Args:
        model: The network, any module that can be differentiated twice, or a `Chain`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        batch_size: Images behind the gradient.
        labels: Labels if they are known, (B,); inferred for a single image.
        steps: Evaluations of the distance in each restart.
        restarts: Starts for each label that is tried; the best by gradient residual is the result.
        pixel_range: Smallest and largest value of a pixel; the start and the verdict need it, the descent does not.
        noise_std: Standard deviation of noise known to be on every gradient entry; widens the tolerance.
        dtype: In which the optimiser works, torch.float32 or torch.float64.
        seed: Of the starts.
        device: On which it works, by default the CPU.

    Returns:
        An `Optimised`; its images are on the CPU.

    Raises:
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.
    """
    problem = matching(model, gradients, image_shape, loss, batch_size, pixel_range, noise_std, dtype, device)

    def descend(start: Tensor, known: Tensor, record: Record) -> Descended:
        def objective(images: Tensor) -> tuple[Tensor, float]:
            found = problem.match(images, known)
            return found.squared, found.residual

        return lbfgs(objective, start, steps, record, "DLG", far=lambda x: is_far(problem, x))

    return _restarted(problem, descend, labels, steps, restarts, seed)


def inverting_gradients(
    model: nn.Module | Chain,
    gradients: Gradients,
    image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic",
    *,
    batch_size: int = 1,
    labels: Tensor | Sequence[int] | None = None,
    steps: int = 1000,
    restarts: int = 1,
    tv_weight: float = 0.01,
    rate: float = 0.05,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    noise_std: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Optimised:
    """Inverting Gradients (Geiping et al. 2020): cosine distance and total variation, Adam on signs, in the pixel box.

    The cosine is blind to a scale: of a fully connected network without biases an image and its darker copy have
    gradients of one direction, and the total variation prefers the darker.

    Args:
        model: The network, any module that can be differentiated twice, or a `Chain`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        batch_size: Images behind the gradient.
        labels: Labels if they are known, (B,); inferred for a single image.
        steps: Evaluations of the distance in each restart.
        restarts: Starts for each label that is tried; the best by gradient residual is the result.
        tv_weight: Weight of the total variation, the mean absolute difference of neighbouring pixels.
        rate: First step length, in widths of the pixel range.
        pixel_range: Smallest and largest value of a pixel, the box.
        noise_std: Standard deviation of noise known to be on every gradient entry; widens the tolerance.
        dtype: In which the optimiser works, torch.float32 or torch.float64.
        seed: Of the starts.
        device: On which it works, by default the CPU.

    Returns:
        An `Optimised`; its images are on the CPU.

    Raises:
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.
    """
    problem = matching(model, gradients, image_shape, loss, batch_size, pixel_range, noise_std, dtype, device)
    if not tv_weight >= 0 or not rate > 0:
        raise ValueError(f"tv_weight is {tv_weight} and rate is {rate}; give at least 0, and a positive rate")
    width = problem.low_and_width()[1]

    def descend(start: Tensor, known: Tensor, record: Record) -> Descended:
        def objective(images: Tensor) -> tuple[Tensor, float]:
            found = problem.match(images, known)
            return found.cosine + tv_weight / width * total_variation(images), found.residual

        return signed_adam(objective, start, steps, record, problem.pixel_range, rate * width, "Inverting Gradients")

    return _restarted(problem, descend, labels, steps, restarts, seed)


def is_far(problem: Matching, images: Tensor) -> bool:
    """Whether images lie so far outside the pixel range that no descent comes back."""
    low, width = problem.low_and_width()
    return not bool((images - (low + width / 2)).abs().max() <= FAR * width)


def check_counts(**counts: int) -> None:
    """Refuses what is no positive number, by name."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")


def _restarted(
    problem: Matching,
    descend: Callable[[Tensor, Tensor, Record], Descended],
    labels: Tensor | Sequence[int] | None,
    steps: int,
    restarts: int,
    seed: int,
) -> Optimised:
    """Runs every restart for every label; one whose descent diverges begins anew."""
    check_counts(steps=steps, restarts=restarts)
    generator, record = torch.Generator().manual_seed(seed), Record()
    candidates, notes = [], []
    for known in label_choices(problem, labels):
        for _ in range(restarts):
            if record.rows:
                record.next_restart()
            for _ in range(1 + RETRIES):
                found = descend(problem.uniform_start(generator), known, record)
                if found.diverged is not None:
                    notes.append(f"start {record.restart} diverged at step {found.diverged}")
                    record.next_restart()
                candidates.append(candidate(problem, found.best, known))
                if found.diverged is None:
                    break
    return outcome(problem, candidates, record, notes)
