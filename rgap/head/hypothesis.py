"""Shared by the readings of all losses: hypotheses, the rank-one factors of a gradient, the evidence for a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rgap.linalg import distance, norm
from rgap.network.layer import Chain, Layer
from rgap.results import GradientMismatchError, LayerReport

MAX_WHITE_RATIO = 1.3  # largest singular value of noise in units of that of white noise
REAL_TARGET = -1  # stands for a label where the target of a squared error is real-valued
WRONG_LABEL_RESIDUAL = 0.3  # relative residual from which a given label is refused if another fits ten times better


@dataclass(frozen=True)
class HeadGradient:
    """The last layer and what is known of its gradient."""

    layer: Layer  # the last one, with C outputs
    G: Tensor  # gradient of its weight, (C, n), not zero
    bias: Tensor | None  # gradient of its bias, (C,), which is δz; None where it gives none
    precision: float  # relative error of the gradients' entries
    tolerance: float  # residual up to which the head's equations count as satisfied
    known: int | None  # the label if it was given
    std: Tensor | None = None  # standard deviation of G's entries, (C, n)
    bias_std: Tensor | None = None  # of the bias's gradient, (C,)
    target: Tensor | None = None  # real-valued target of a squared error, (C,), if it was given

    @property
    def labels(self) -> Sequence[int]:
        """Every label that a sample may have."""
        return range(max(len(self.G), 2)) if self.target is None else (REAL_TARGET,)

    @property
    def W(self) -> Tensor:
        """The layer's weight, (C, n)."""
        return self.layer.weight.reshape(self.G.shape)


@dataclass(frozen=True)
class Hypothesis:
    """A label and a scale with which the last layer's gradient u vᵀ can be explained.

    In positively homogeneous networks hypotheses whose scales have the same sign are twins: their images differ by the
    ratio of the scales.
    """

    label: int  # 0 or 1 for one output
    scale: float  # s in x = s v, δz = u / s
    dz: Tensor  # gradient of the loss by the output, (C,)
    x: Tensor  # input of the last layer, (n,)
    residual: float = 0.0  # of the head's equations, ‖∂ℓ/∂z(z) − δz‖ / ‖δz‖ with z = W x + b
    rounding: float = 0.0  # relative error of δz from the client's own arithmetic, beyond the gradient's precision
    gradient_scale: float = 1.0  # κ of the shared gradient κ ∇ℓ, which δz includes
    label_smoothing: float = 0.0  # ε of the client's labels
    length_error: float = 0.0  # relative standard deviation of x's length; infinite where nothing determines it
    misfit: float = 0.0  # of the head's equations, in standard deviations
    target: Tensor | None = None  # (C,), where the label is `REAL_TARGET`


@dataclass(frozen=True)
class HeadReading:
    """All hypotheses that the last layer's gradient allows, at least one."""

    hypotheses: tuple[Hypothesis, ...]
    misfits: Mapping[int, float]  # label -> smallest residual of the head's equations with it, or a lower bound of it
    notes: tuple[str, ...] = ()  # on quantities out of range, and on the evidence for the label


class Twin(NamedTuple):
    """A label and scale that explain an image's head as well as those of its `Start`."""

    label: int
    factor: float = 1.0  # scale of the image relative to that of the `Start`
    residual: float | None = None  # of the image's own head equations, relative; None where they were not computed
    length_error: float = 0.0  # relative standard deviation of its x's length; infinite where nothing determines it


@dataclass(frozen=True)
class Start:
    """A hypothesis on all images at one layer, from which the attack descends to the images."""

    layer: int  # index of that layer: the last one for a single image, the first fully connected one for a batch
    labels: Tensor  # (B,), int64, or the real-valued targets of a squared error, (B, C)
    x: Tensor  # inputs of that layer, (B, n)
    dx: Tensor  # gradient of the loss by them, (B, n)
    twins: tuple[tuple[Twin, ...], ...]  # for each image all labels and scales that explain its head, that of x first
    reports: tuple[LayerReport, ...]  # of the layers that were read, from the last to `layer`
    batch_size: int = 1  # images in the batch, at least B: some of a fully connected batch may not have been found
    ranks: tuple[int, int] = (1, 1)  # of a batch's gradients of `layer` and the next one: limits on the images found
    rounding: float = 0.0  # relative error of δz from the client's own arithmetic, where it exceeds the precision
    gradient_scale: tuple[float, ...] = (1.0,)  # of each image: κ of the shared gradient κ ∇ℓ; one number for all
    label_smoothing: float = 0.0  # ε of the client's labels
    length_errors: tuple[float, ...] = (0.0,)  # relative standard deviation of each x's length, or one for all
    misfit: float = 0.0  # of the head's equations, in standard deviations
    errors: Tensor | None = None  # of x, that the tests may have overlooked, (B,); of images peeled off, predicted
    peeled: int = 0  # images that were peeled off
    noise_ratio: float = 1.0  # by which a batch's gradient shows more noise than is assumed

    def scales(self, b: int) -> tuple[float, float]:
        """The factor of image b's gradient, and the relative error of its brightness."""
        return self.gradient_scale[b % len(self.gradient_scale)], self.length_errors[b % len(self.length_errors)]

    @property
    def client_loss(self) -> dict[str, Tensor | float | None]:
        """The client's loss as `rgap.client.loss_value` takes it."""
        by_book = all(factor == 1 for factor in self.gradient_scale)
        weights = None if by_book else self.dx.new_tensor(self.gradient_scale)
        return {"label_smoothing": self.label_smoothing, "weights": weights}


def starts_of(chain: Chain, hypotheses: Sequence[Hypothesis]) -> list[Start]:
    """The hypotheses on a single image as starts at the last layer, twins as one start."""
    head, groups, starts = chain.layers[-1], {}, []
    for number, one in enumerate(hypotheses):
        twins = (one.scale > 0, one.gradient_scale, one.label_smoothing)
        groups.setdefault(twins if chain.homogeneous else number, []).append(one)
    for first, *others in groups.values():
        n, dx = len(first.x), head.adjoint(first.dz[None, :, None, None]).flatten(1)
        report = LayerReport(head.name, n, None, n, n, 0, condition=1.0, seconds=0.0)
        twins = tuple(Twin(h.label, h.scale / first.scale, None, h.length_error) for h in (first, *others))
        place, label = len(chain.layers) - 1, torch.tensor([first.label])
        label = label if first.target is None else first.target[None]
        starts.append(Start(
            place, label, first.x[None], dx, (twins,), (report,), rounding=first.rounding,
            gradient_scale=(first.gradient_scale,), label_smoothing=first.label_smoothing,
            length_errors=(first.length_error,), misfit=first.misfit,
        ))  # fmt: skip
    return starts


@dataclass(frozen=True)
class RankOne:
    """G ≈ u vᵀ with Σ |u| = 2, as Σ |δz| / 2 is 1 − p of the label for softmax cross-entropy."""

    u: Tensor  # (C,)
    v: Tensor  # (n,)
    noise: float  # standard deviation of u's entries, estimated from G − u vᵀ
    white: bool = True  # whether G − u vᵀ looks like noise


def rank_one(G: Tensor) -> RankOne:
    """The leading factors of a gradient (C, n) that is not zero, by power iteration from its largest row.

    For a single sample the first step gives them to rounding. Unlike those of a singular value decomposition, small
    entries of u have the relative precision of their rows.
    """
    unit = G.abs().max()
    rows = G / unit  # the squares of the smallest gradients underflow
    v = rows[rows.square().sum(1).argmax()]
    for _ in range(3):
        u = rows @ v / (v @ v)
        v = u @ rows / (u @ u)
    size = u.abs().sum() / 2
    rest = rows - u[:, None] * v
    noise = rest.norm() / G.numel() ** 0.5 / (v.norm() * size)
    return RankOne(u / size, v * size * unit, noise.item(), _is_white(rest))


def _is_white(rest: Tensor) -> bool:
    """Whether what rank one leaves looks like white noise, by its largest singular value; a second image does not."""
    v = rest[rest.square().sum(1).argmax()]
    for _ in range(3):
        v = (rest @ (v / v.norm().clamp(min=torch.finfo(v.dtype).tiny))) @ rest
    largest, (C, n) = v.norm().sqrt(), rest.shape
    return bool(largest <= MAX_WHITE_RATIO * rest.norm() * (C**-0.5 + n**-0.5))


def entry_stds(head: HeadGradient, factors: RankOne) -> Tensor:
    """Standard deviation of G's entries, (C, n): by their format and declared noise, or by what rank one leaves."""
    left = factors.noise * factors.v.norm().item() if factors.white and len(head.G) > 2 else 0.0
    return head.std.clamp(min=left)


def bias_error(head: HeadGradient) -> float:
    """Relative standard deviation of the length of x where the bias's gradient is δz."""
    unit = head.bias.abs().max()
    dz, std = head.bias / unit, head.bias_std / unit
    return ((dz * std).norm() / dz.square().sum()).item()


def least_squares_input(G: Tensor, dz: Tensor) -> Tensor:
    """The x of G = δz xᵀ by least squares over the rows, (n,)."""
    unit = dz.abs().max()
    return (dz / unit) @ G / (dz / unit).square().sum() / unit


def relative(model: Tensor, dz: Tensor) -> float:
    """‖model − δz‖ / ‖δz‖."""
    return distance(model, dz) / norm(dz)


def reading(
    head: HeadGradient, found: list[Hypothesis], misfits: Mapping[int, float], notes: list[str], rounding: float = 0.0
) -> HeadReading:
    """The reading with these hypotheses, misfits and notes: checks a known label, and notes the evidence for the label.

    `rounding` is the relative error of δz from the client's own arithmetic; the equations' tolerance is at least ten
    times that. Raises GradientMismatchError if the gradient is clearly that of another label than the one given.
    """
    known, tolerance = head.known, max(head.tolerance, 10 * rounding)
    best, *others = sorted(misfits, key=misfits.__getitem__)
    second = others[0] if others else best
    decided = misfits[second] > 10 * misfits[best] and misfits[second] > tolerance
    evidence, found = [], [h for h in found if known in (None, h.label)]
    if decided and known not in (None, best):
        if misfits[known] > WRONG_LABEL_RESIDUAL > 10 * misfits[best]:
            raise GradientMismatchError(f"label {known} was given; the last layer's gradient is that of {best}")
        evidence = [
            f"label {known} was given, and the head's equations are missed by {misfits[known]:.2g} with it; with "
            f"label {best} by {misfits[best]:.2g}"
        ]
    elif decided and known is None:
        evidence = [
            f"label {best} by the head's equations, missed by {misfits[best]:.2g}; with label {second}, the next best, "
            f"by {misfits[second]:.2g}"
        ]
    if (least := min(h.residual for h in found)) > tolerance and not notes:
        notes = [
            f"the last layer's gradient is that of no single sample: its equations are missed by {least:.2g}; it was "
            "altered or belongs to a batch, and the nearest possible scale was used"
        ]
    return HeadReading(tuple(found), misfits, (*notes, *evidence))


def reading_with_bias(
    head: HeadGradient, dz: Tensor, output_gradient: Callable[[Tensor, int], Tensor], notes: list[str], *,
    label: int | None = None, rounding: float = 0.0,
) -> HeadReading:  # fmt: skip
    """The reading of a layer with a bias, whose gradient is δz (C,), not zero: x and z follow, and z must explain δz.

    `output_gradient` gives ∂ℓ/∂z of (z, label). The `label` is given where δz alone determines it; by default it is the
    one whose ∂ℓ/∂z is nearest to δz.
    """
    x = least_squares_input(head.G, dz)
    z = head.W @ x + head.layer.bias
    residuals = {k: relative(output_gradient(z, k), dz) for k in head.labels}
    label = min(residuals, key=residuals.__getitem__) if label is None else label
    scale = 2 / dz.abs().sum().item()
    found = [Hypothesis(label, scale, dz, x, residuals[label], rounding, target=head.target)]
    if head.known not in (None, label):  # another label was given: the same numbers with its residual
        found.append(replace(found[0], label=head.known, residual=residuals[head.known]))
    return reading(head, found, residuals, notes, rounding)
