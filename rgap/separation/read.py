"""What the fully connected layers determine of every image of a batch: input, gradient by it, label and scale."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rgap.equations import identity_residual
from rgap.head.hypothesis import Start, Twin
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.separation.factors import share_hypotheses, with_factors
from rgap.separation.joint_softmax import fit_joint_softmax
from rgap.separation.peeling import peel, peel_again
from rgap.separation.scales import label_of, output_gradients, output_jacobians, refine_inputs, share_residuals
from rgap.separation.search import separate
from rgap.separation.separated import Separation, separation_reports, told_by_shares, what_was_found, why_nothing_below
from rgap.separation.shares import MAX_ROUNDED_ZERO
from rgap.separation.subspaces import BatchSize, first_dense, row_span
from rgap.shared_gradient import SharedGradient

MAX_SEARCHED_FIRST = 9  # largest rank at which all images are searched before any is peeled off
MAX_STARTED_AT_RANDOM = 25  # largest rank at which the search starts at random, rather than from rows of the gradients
NOISE_REESTIMATE_RATIO = 3.0  # noise that a gradient shows, over that assumed, above which its images have it
MAX_COMBINATIONS = 64  # largest number of combinations of scale hypotheses between which the last convolution decides


def read_batch(
    chain: Chain, received: SharedGradient, size: BatchSize, loss: str, known: list[int] | None, seed: int,
    gradient_scale: float | None = 1.0,
) -> tuple[Start, list[str]]:  # fmt: skip
    """Every image at the first fully connected layer, with label and scale.

    The first two fully connected layers are separated into one direction an image; each image's share of the gradients
    gives ∂ℓ/∂f, and the loss label and scale. Where convolutions lie below, whose gradients are sums over the batch,
    the images are fitted to all fully connected gradients together, and all of them are needed.

    Labels, where they are known, are used where only the outputs distinguish the images; the seed is that of random
    starts; a factor of the gradient of None is estimated for each image. Returns the `Start` with the images that were
    found, none with convolutions below where one was not found or has no scale, and notes.
    """
    below, count, begin = first_dense(chain), size.size, time.perf_counter()
    tail, none = chain.layers[below:], torch.zeros(0, chain.layers[below].unknowns, dtype=torch.float64)
    apart = _separated(tail, received, size, loss, seed)
    start, notes, said = None, [], []
    if not size.is_given and gradient_scale is not None and told_by_shares(apart, gradient_scale) > count:
        count = told_by_shares(apart, gradient_scale)
        said = [f"by the images' shares the batch has {count}, of which {size.size} differ"]
    if below == 0:
        start, notes = _each_alone(chain, received, apart, count, loss, gradient_scale)
    elif len(apart.inputs) == count:
        start, notes = _fitted(chain, received, apart, loss, gradient_scale)
    elif apart.first.rank == count and loss == "cross_entropy":
        start, notes = _read_together(chain, received, apart, known, seed, gradient_scale or 1.0)
    start = start or Start(below, torch.zeros(0, dtype=torch.int64), none, none, (), ())
    reports = separation_reports(tail, apart, count, time.perf_counter() - begin)
    ranks = (apart.first.rank, apart.second.rank)
    noise = _excess_noise(tail, received, apart, size)
    start = replace(start, reports=reports, batch_size=count, ranks=ranks, noise_ratio=noise)
    if size.leaves_lengths:
        start = replace(start, length_errors=(math.inf,))
    notes = [*size.notes, *said, *what_was_found(tail, apart, count, gradient_scale or 1.0), *notes]
    if below and not len(start.x):
        notes += why_nothing_below(apart, count)
    return start, notes


def _separated(tail: Sequence[Layer], received: SharedGradient, size: BatchSize, loss: str, seed: int) -> Separation:
    """The images apart, by a search where it can find each by itself or they are few; else those that peel off first.

    The search takes starts and steps in proportion to the rank, each of its third power: it is left out where many
    images are left or, behind few outputs, after the search for patterns.
    """
    spans = size.span, row_span(tail[1], received.gradients, received.precision, size.span.rank)
    options = {"precision": received.precision, "seed": seed, "spans": spans}
    rank, apart = size.span.rank, None
    if rank <= MAX_SEARCHED_FIRST or spans[1].rank >= rank:
        apart = separate(*tail[:2], received.gradients, **options, by_rows=rank > MAX_STARTED_AT_RANDOM)
        if len(apart.inputs) == rank:
            return apart
    peeled = peel(tail, received, spans, loss, size.size, seed)
    if apart is not None and (len(apart.inputs) >= peeled.peeled or rank <= MAX_STARTED_AT_RANDOM):
        return max(apart, peeled, key=lambda one: len(one.inputs))
    left, narrow = rank - peeled.peeled, spans[1].rank + MAX_SEARCHED_FIRST < rank
    if left == 0 or (narrow and left > MAX_SEARCHED_FIRST):
        return peeled
    return separate(*tail[:2], received.gradients, **options, known=peeled, by_rows=True)


def _excess_noise(tail: Sequence[Layer], received: SharedGradient, apart: Separation, size: BatchSize) -> float:
    """How much more noise the singular values below the cut show than is assumed; 1 where they show no more.

    What a gradient of too high a rank holds beside the images found may be noise, too.
    """
    ratios = [1.0]
    for layer, span in zip(tail, (apart.first, apart.second), strict=False):
        assumed = rms(received.entry_std[layer.weight_name]).item()
        ratios.append(span.left / assumed if assumed and span.below_cut > MAX_ROUNDED_ZERO else 1.0)
    if size.is_exceeded:
        rest = tail[0].gradient(received.gradients).flatten(1) - apart.dz.T @ apart.inputs
        ratios.append((rms(rest) / rms(received.entry_std[tail[0].weight_name]).clamp(min=1e-300)).item())
    return max(ratios) if max(ratios) > NOISE_REESTIMATE_RATIO else 1.0


def _each_alone(
    chain: Chain, received: SharedGradient, apart: Separation, size: int, loss: str, given: float | None
) -> tuple[Start, list[str]]:
    """The images that were found of a fully connected network, each with label and scale from its own share."""
    tail = chain.layers
    complete = len(apart.inputs) == apart.first.rank > apart.peeled  # one that was peeled off has its own share
    c, f = output_gradients(tail, received.gradients, apart.inputs, apart.dz, complete=complete)
    hypotheses, factors, notes = share_hypotheses(chain, tail[0], loss, f, size * c, received.precision, given)
    own = size * c / c.new_tensor([one.factor for one in factors])[:, None]
    for x, c_b, found in zip(apart.inputs, own, hypotheses, strict=True):
        if not found:  # where no scale fits, the direction is still right: scaled as far as the pixel range allows
            found.append((label_of(c_b), 1.0 / x.abs().max().item()))
    places = [b for b, found in enumerate(hypotheses) for _ in found]
    misses = share_residuals(loss, f[places], own[places], list(itertools.chain.from_iterable(hypotheses)))
    scales = [found[0][1] for found in hypotheses]
    twins = [
        tuple(Twin(k, a / scale, miss) for (k, a), miss in zip(found, part.tolist(), strict=True))
        for found, scale, part in zip(hypotheses, scales, misses.split([*map(len, hypotheses)]), strict=True)
    ]
    labels = torch.tensor([each[0].label for each in twins], dtype=torch.int64)
    scale = apart.inputs.new_tensor(scales)[:, None]
    dx, errors = apart.dz / scale @ tail[0].weight.flatten(1), scale[:, 0] * apart.errors
    options = {"errors": errors if errors.any() else None, "peeled": apart.peeled}
    start = Start(0, labels, scale * apart.inputs, dx, tuple(twins), (), **options)
    return with_factors(start, factors), notes


def read_again(chain: Chain, received: SharedGradient, loss: str, start: Start) -> Start:
    """The images of a fully connected network that was read, once more from other gradients, without a search.

    Their activation patterns are kept, and everything else is computed anew: how the images differ from those of
    `start` shows what the difference of the gradients does to them. They come in the same order, x NaN where an image
    was not found again.
    """
    tail, precision = chain.layers, received.precision
    spans = tuple(row_span(layer, received.gradients, precision, len(start.x)) for layer in tail[:2])
    if start.peeled:  # no hidden vector alone need pass a test
        apart = peel_again(tail, received, spans, loss, start.x, start.errors)
    else:
        apart = separate(*tail[:2], received.gradients, precision=precision, spans=spans, near=start.x)
    given = start.gradient_scale[0] if len(set(start.gradient_scale)) == 1 else None
    found, _ = _each_alone(chain, received, apart, start.batch_size, loss, given)
    scaled = [twin.factor * x[None] for x, twins in zip(found.x, found.twins, strict=True) for twin in twins]
    every = [twins for twins in found.twins for _ in twins]
    if not scaled:
        scaled, every = [torch.full_like(start.x[:1], math.nan)], [(Twin(0),)]
    x = torch.cat(scaled)
    nearest = torch.cdist(start.x, x).argmin(1)
    return replace(start, x=x[nearest], twins=tuple(every[i] for i in nearest.tolist()))


def _fitted(
    chain: Chain, received: SharedGradient, apart: Separation, loss: str, given: float | None
) -> tuple[Start | None, list[str]]:
    """Labels and scales of the separated inputs, then a joint fit; None where an image has no scale."""
    below, count = first_dense(chain), len(apart.inputs)
    tail = chain.layers[below:]
    c, f = output_gradients(tail, received.gradients, apart.inputs, apart.dz, complete=True)
    hypotheses, shares, notes = share_hypotheses(chain, tail[0], loss, f, count * c, received.precision, given)
    weights = c.new_tensor([one.factor for one in shares])
    if not all(hypotheses):
        return None, [*notes, "without a scale for every image the convolutions were not solved"]
    combinations = list(itertools.islice(itertools.product(*hypotheses), MAX_COMBINATIONS))
    if len(combinations) > 1 and not chain.homogeneous:
        dz = torch.einsum("bco,bc->bo", output_jacobians(tail, apart.inputs)[1][0], c)
        misses = [_identity_residual(chain, received, apart.inputs, dz, one) for one in combinations]
        best = min(range(len(misses)), key=misses.__getitem__)
        notes.append(
            f"the last convolution decided between {len(combinations)} combinations of scales: the residual of its "
            f"identities is {misses[best]:.2g}, with the next one {sorted(misses)[1]:.2g}"
        )
        hypotheses = [[one] for one in combinations[best]]
    heads = []
    for number in range(max(map(len, hypotheses))):
        chosen = [found[min(number, len(found) - 1)] for found in hypotheses]
        labels = torch.tensor([label for label, _ in chosen])
        scales = apart.inputs.new_tensor([scale for _, scale in chosen])
        heads.append(
            (labels, refine_inputs(tail, received.gradients, scales[:, None] * apart.inputs, labels, loss, weights))
        )
    labels, head = heads[0]
    factors = [((other.x * head.x).sum(1) / head.x.square().sum(1)).tolist() for _, other in heads]
    factors[0] = [1.0] * count
    twins = tuple(
        tuple(Twin(label, factors[n][b]) for n, (label, _) in enumerate(found)) for b, found in enumerate(hypotheses)
    )
    return with_factors(Start(below, labels, head.x, head.dx, twins, ()), shares), notes


def _read_together(
    chain: Chain, received: SharedGradient, apart: Separation, known: list[int] | None, seed: int, factor: float
) -> tuple[Start | None, list[str]]:
    """The head of images that the search cannot separate, by their outputs; None where that fails too."""
    below, options = first_dense(chain), {"labels": known, "precision": received.precision, "seed": seed}
    by_book = {name: g / factor for name, g in received.gradients.items()}
    span = replace(apart.first, S=apart.first.S / factor)
    found = fit_joint_softmax(chain.layers[below:], by_book, span, **options)
    if found is None:
        return None, ["nor were all images found together, by the softmax of their outputs"]
    labels, head = found
    note = f"all images found together, by the softmax of their outputs; residual of the gradients {head.residual:.2g}"
    twins = tuple((Twin(label),) for label in labels.tolist())
    return Start(below, labels, head.x, factor * head.dx, twins, (), gradient_scale=(factor,)), [note]


def _identity_residual(
    chain: Chain, received: SharedGradient, inputs: Tensor, dz: Tensor, chosen: Sequence[tuple[int, float]]
) -> float:
    """Residual of the last convolution's identities with one combination of scales, before any layer is solved."""
    layer, dense = chain.layers[first_dense(chain) - 1 :][:2]
    scales = inputs.new_tensor([scale for _, scale in chosen])[:, None]
    x, dx = scales * inputs, dz @ dense.weight.flatten(1) / scales
    z = layer.activation.inverse(x.reshape(len(x), *layer.output_shape))
    dz = layer.activation.derivative(z) * dx.reshape(z.shape)
    return identity_residual(layer, layer.gradient(received.gradients), dz, z)
