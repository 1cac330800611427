"""From an update of several local steps to the images behind it (ours).

An update of k steps of SGD is a weighted sum of the gradients at k different weights, momentum and decay included:
Ḡ = Σ_j d_j g_j / Σ_j d_j. Three ways lead from it to the images:

    the first layer's input is the image itself and does not drift, so that equations without anything from above hold
    as they are: of a vision transformer's patches, Ḡ_1 = Δ̄ᵀ P, and of a fully connected first layer, Ḡ_1 = h̄ xᵀ with
    h̄ the bias's;
    for several images, units of that layer that one image alone switches on at every step have Ḡ_j / h̄_j = x;
    a chain or a residual network has a drift Ḡ(x) − g(x) from the gradient at the mean weights that is small: a fixed
    point takes it off.

The verdict is a simulation: the images, run through the client's steps, must reproduce the update to within the
rounding of its weights. Where activations have kinks, units that flip between the steps are read as mean slopes; where
too many do, the fixed point does not contract, and nothing is certified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rgap.attack.arguments import check_options, checked_network
from rgap.attack.drift import by_fixed_point, by_walks
from rgap.attack.misfit import NOISE_RESIDUAL_FACTOR
from rgap.attack.reconstruct import reconstruct
from rgap.attack.update import FoundImages, UpdateTask, by_first_layer, by_patches
from rgap.client import LocalTraining, mean_gradients
from rgap.network.layer import Chain
from rgap.results import (
    MAX_CERTIFIED_ERROR,
    Candidate,
    PixelRange,
    Reconstruction,
    UnsupportedLayerError,
    certified_psnr_db,
    noise_limit,
    with_accuracy,
)
from rgap.tokens import PatchEmbedding
from rgap.tokens.replay import gradient_sizes

STEPS_TRIED = (1, 2, 3, 4, 5, 6, 8, 10)  # numbers of local steps that are tried where it is unknown
MIN_ALLOWED_RESIDUAL = 1e-10  # residual that float64 arithmetic of many steps explains
MAX_ALLOWED_RESIDUAL = 1e-2  # residual from which a simulated update is not the shared one, whatever its rounding


def reconstruct_update(
    before: nn.Module | Chain, after: nn.Module, image_shape: tuple[int, ...] | None = None, loss: str = "logistic", *,
    learning_rate: float, steps: int | None = 1, batch_size: int = 1, momentum: float = 0.0, weight_decay: float = 0.0,
    optimizer: str = "sgd", gradient_scale: float | None = None, labels: Tensor | Sequence[int] | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0), seed: int = 0, device: torch.device | str | None = None,
) -> Reconstruction:  # fmt: skip
    """Computes a client's images back from the weights that it returns after local steps of SGD on all of them.

    Args:
        before: The network that was sent out, in the mode in which the client used it, or a `Chain` of it.
        after: The network that came back, its state dict, or its parameters in their order.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: A name in `rgap.client.LOSSES`.
        learning_rate: Of every step.
        steps: Local steps, each on the same batch; None to try small numbers, among which the certificate chooses.
        batch_size: Images in the batch; more than one need a fully connected first layer with a bias.
        momentum: Of `torch.optim.SGD`, without dampening.
        weight_decay: λ of `torch.optim.SGD`.
        optimizer: "sgd"; the updates of others are no sum of gradients.
        gradient_scale: Of one step, as in `rgap.reconstruct`: 1.0 asserts that the rate is right. Several steps show
            by their drift whether it is.
        labels: Labels if they are known, (B,).
        pixel_range: Smallest and largest value of a pixel.
        seed: Seed of random choices in batches.
        device: Where the returned images and labels live.

    Returns:
        A `Reconstruction`. It is `exact` where the images, run through the client's steps, reproduce the update to
        within the rounding of the weights; one step is a gradient, and judged as `rgap.reconstruct` judges it.

    Raises:
        UnsupportedLayerError: If the network is of no supported kind.
        GradientMismatchError: If the two states do not fit each other, or nothing has changed.
        ValueError: If another argument is out of range.

    Example:
        >>> import copy, torch, rgap
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> before = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3)).double()
        >>> images, labels = rgap.data.load_images("embedded", image_shape=(1, 8, 8), count=1)
        >>> after, images = copy.deepcopy(before), images.double()
        >>> optimizer = torch.optim.SGD(after.parameters(), lr=0.01)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(after(images), labels).backward()
        ...     optimizer.step()
        >>> result = rgap.reconstruct_update(before, after, (1, 8, 8), "cross_entropy", learning_rate=0.01, steps=5)
        >>> result.verdict
        'exact'
    """
    if optimizer != "sgd":
        raise ValueError(
            f"optimizer is {optimizer!r}; only 'sgd' is supported: Adam and its kin divide by gradients' sizes, so "
            "that their updates are no weighted sums of gradients"
        )
    network = checked_network(before, image_shape)
    check_options(loss, batch_size, pixel_range)
    if batch_size is None:
        raise ValueError("batch_size is None; an update of several steps needs the number of images")
    options = {"momentum": momentum, "weight_decay": weight_decay}
    found = []
    for count in STEPS_TRIED if steps is None else (steps,):
        training = LocalTraining(learning_rate, count, **options)
        update = mean_gradients(network.model, after, training)
        task = UpdateTask(network, update, training, loss, batch_size, labels, PixelRange(*pixel_range), seed, device)
        found.append(_one_step(task, gradient_scale) if count == 1 else _several_steps(task))
        if found[-1].verdict == "exact":
            break
    best = min(found, key=lambda one: (one.verdict != "exact", one.candidates[0].gradient_residual))
    if steps is None:
        count = STEPS_TRIED[next(i for i, one in enumerate(found) if one is best)]
        why = "by the simulated update" if best.verdict == "exact" else "which misses least; none is certified"
        best = replace(best, notes=(*best.notes, f"{count} local steps of {STEPS_TRIED}, {why}"))
    return best


def _one_step(task: UpdateTask, gradient_scale: float | None) -> Reconstruction:
    return reconstruct(
        task.network, task.update, None, task.loss, batch_size=task.batch_size, labels=task.labels,
        pixel_range=(task.pixels.low, task.pixels.high), gradient_scale=gradient_scale, seed=task.seed,
        device=task.device,
    )  # fmt: skip


def _several_steps(task: UpdateTask) -> Reconstruction:
    if isinstance(task.network, PatchEmbedding):
        found = by_patches(task)
    elif isinstance(task.network, Chain) and task.network.layers[0].is_dense and task.network.layers[0].bias_name:
        found = by_first_layer(task)
    elif task.batch_size > 1:
        raise UnsupportedLayerError(
            f"{task.batch_size} images and several local steps: the first layer of a chain must be a Linear with a "
            "bias; the inputs of all other layers drift between the steps"
        )
    else:
        found = by_fixed_point(task) if isinstance(task.network, Chain) else by_walks(task)
    return _certified(task, found)


def _certified(task: UpdateTask, found: FoundImages) -> Reconstruction:
    """The verdict: the images, run through the client's steps, must reproduce the update."""
    images, complete = found.images, len(found.images) == task.batch_size
    residual, allowed, labels = math.inf, 0.0, found.labels[0]
    if complete and torch.isfinite(images).all():
        for one in (labels for labels in found.labels if labels.is_floating_point() or labels.min() >= 0):
            miss, limit = _simulated_miss(task, found, one)
            if miss < residual:
                residual, allowed, labels = miss, limit, one
            if residual <= allowed:
                break
    slack = max(MAX_CERTIFIED_ERROR * task.pixels.width, NOISE_RESIDUAL_FACTOR * (found.error or 0.0))
    candidate = Candidate(
        images.to(task.device or "cpu"), labels.to(task.device or "cpu"), residual,
        task.pixels.contains(images, slack), {found.layers[-1].name: images}, found.layers, beliefs=found.iterates,
        residual_allowed=allowed, predicted_error=found.error,
    )  # fmt: skip
    steps, notes = f"{task.training.steps} simulated local steps", list(found.notes)
    verdict, miss = "inconsistent", f"{residual:.2g}; {allowed:.2g} is allowed"
    if not complete:
        verdict = "rank-deficient"
    elif residual > allowed:
        notes.append(f"{steps} miss the update by {miss}: other steps, or other images")
    elif certified_psnr_db(candidate, task.pixels) is None:
        notes.append(noise_limit(found.error, task.pixels))
    else:
        verdict = "exact"
        notes.append(f"{steps} reproduce the update, missed by {miss}")
        if not candidate.in_pixel_range:
            notes.append("pixels lie outside the pixel range by more than their predicted error")
    per_image = ()
    if task.batch_size > 1:
        own = "inconsistent" if verdict == "rank-deficient" else verdict  # nothing certifies a part of the batch
        pairs = zip(candidate.images, candidate.labels, strict=True)
        per_image = tuple((own, (replace(candidate, images=x[None], labels=y[None]),)) for x, y in pairs)
    record = (candidate.images, candidate.labels, verdict, (candidate,), found.layers, tuple(notes), per_image)
    return with_accuracy(Reconstruction(*record), task.pixels)


def _simulated_miss(task: UpdateTask, found: FoundImages, labels: Tensor) -> tuple[float, float]:
    """How far the simulated Ḡ is from the shared one, relative, and how far it may be.

    That far the client's own arithmetic, in the format of the weights, and the predicted error of the images move it,
    by one draw of the latter, and the rounding of the weights that were subtracted.
    """
    dtype = next(task.network.model.parameters()).dtype
    mine = task.simulate(found.images, labels)
    generator = torch.Generator().manual_seed(task.seed)
    drawn = found.images + (found.error or 0.0) * torch.randn(
        found.images.shape, generator=generator, dtype=found.images.dtype
    )
    other = task.simulate(drawn, labels, dtype)
    miss = expected = 0.0
    for name, size in gradient_sizes(task.update).items():
        rounding = task.update.noise_std[name] * mine[name].numel() ** 0.5
        miss = max(miss, (mine[name] - task.update[name]).norm().item() / size)
        expected = max(expected, math.hypot((other[name] - mine[name]).norm().item(), rounding) / size)
    return miss, min(max(NOISE_RESIDUAL_FACTOR * expected, MIN_ALLOWED_RESIDUAL), MAX_ALLOWED_RESIDUAL)
