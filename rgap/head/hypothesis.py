"""What the readings of all losses share: hypotheses, the rank-one factors of a gradient, the evidence for a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rgap.network.layer import Chain, Layer
from rgap.results import GradientMismatchError, LayerReport

WRONG_LABEL_RESIDUAL = 0.3
"""Relative residual from which a label that was given is refused, if another one fits ten times better."""


@dataclass(frozen=True)
class HeadGradient:
    """The last layer and what is known of its gradient.

    Attributes:
        layer: The last layer, with C outputs.
        G: Gradient of its weight, (C, n), not zero.
        bias: Gradient of its bias, (C,), or None without bias.
        precision: Relative error of the gradients' entries.
        tolerance: Residual up to which the head's equations count as fulfilled.
        known: The label where it was given.
    """

    layer: Layer
    G: Tensor
    bias: Tensor | None
    precision: float
    tolerance: float
    known: int | None

    @property
    def W(self) -> Tensor:
        """The layer's weight, (C, n)."""
        return self.layer.weight.reshape(self.G.shape)


@dataclass(frozen=True)
class Hypothesis:
    """A label and a scale with which the last layer's gradient can be explained.

    Attributes:
        label: Index of the class; 0 or 1 for one output.
        scale: s in x = s v, δz = u / s, where u vᵀ is the gradient. Hypotheses whose scales have one sign are twins in
            networks that are positively homogeneous: their images differ by the ratio of the scales.
        dz: Gradient of the loss by the output, (C,).
        x: Input of the last layer, (n,).
        residual: How far the head's equations are missed, ‖∂ℓ/∂z(z) − δz‖ / ‖δz‖ with z = W x + b; 0 where they hold.
        rounding: Relative error that δz has from the client's own arithmetic, beyond the gradient's precision.
    """

    label: int
    scale: float
    dz: Tensor
    x: Tensor
    residual: float = 0.0
    rounding: float = 0.0


@dataclass(frozen=True)
class HeadReading:
    """What the last layer's gradient allows.

    Attributes:
        hypotheses: Every one that it allows; never empty.
        misfits: Label -> the smallest residual of the head's equations with it, as far as it was looked for.
        notes: Sentences: what was out of range, and on what evidence the label was decided.
    """

    hypotheses: tuple[Hypothesis, ...]
    misfits: Mapping[int, float]
    notes: tuple[str, ...] = ()


class Twin(NamedTuple):
    """A label and scale that explain an image's head as well as those of its `Start`.

    Attributes:
        label: Index of the class; 0 or 1 for one output.
        factor: Scale of the image relative to that of the `Start`.
        residual: How far the image's own head equations are missed, relative; None where they were not looked at alone.
    """

    label: int
    factor: float = 1.0
    residual: float | None = None


@dataclass(frozen=True)
class Start:
    """A hypothesis on all images at one layer, from which the attack descends to the images.

    Attributes:
        layer: Index of that layer in the chain: the last one for a single image, the first fully connected one for a
            batch.
        labels: (B,), int64.
        x: Inputs of that layer, (B, n).
        dx: Gradient of the loss by them, (B, n).
        twins: For each image what explains its head as well; the first entry is the image as it is here.
        reports: Reports of the layers that were read, from the last to `layer`.
        batch_size: Images in the batch, B or more: some of a fully connected batch may not have been found.
        ranks: Of a batch, the ranks of the gradients of `layer` and of the layer after it: at most that many images can
            be told apart.
        rounding: Relative error of δz by the client's own arithmetic, where that exceeds the gradient's precision.
    """

    layer: int
    labels: Tensor
    x: Tensor
    dx: Tensor
    twins: tuple[tuple[Twin, ...], ...]
    reports: tuple[LayerReport, ...]
    batch_size: int = 1
    ranks: tuple[int, int] = (1, 1)
    rounding: float = 0.0


def starts_of(chain: Chain, hypotheses: Sequence[Hypothesis]) -> list[Start]:
    """The hypotheses on a single image as starts at the last layer, twins as one start."""
    head, groups, starts = chain.layers[-1], {}, []
    for number, one in enumerate(hypotheses):
        groups.setdefault(one.scale > 0 if chain.homogeneous else number, []).append(one)
    for first, *others in groups.values():
        n, dx = len(first.x), head.adjoint(first.dz[None, :, None, None]).flatten(1)
        report = LayerReport(head.name, n, None, n, n, 0, condition=1.0, seconds=0.0)
        twins = tuple(Twin(one.label, one.scale / first.scale) for one in (first, *others))
        place, label = len(chain.layers) - 1, torch.tensor([first.label])
        starts.append(Start(place, label, first.x[None], dx, (twins,), (report,), rounding=first.rounding))
    return starts


@dataclass(frozen=True)
class RankOne:
    """G ≈ u vᵀ with Σ |u| = 2, as Σ |δz| / 2 is 1 − p of the label for softmax cross-entropy.

    Attributes:
        u: (C,).
        v: (n,).
        residual: ‖G − u vᵀ‖ / ‖G‖: 0 to rounding for a single sample.
        noise: Standard deviation of u's entries, by what u vᵀ leaves of G.
    """

    u: Tensor
    v: Tensor
    residual: float
    noise: float


def rank_one(G: Tensor) -> RankOne:
    """The leading factors of a gradient (C, n) that is not zero, by power iteration from its largest row.

    For a single sample the first step has them to rounding, and, unlike a singular value decomposition's, small entries
    of u have the relative precision of their rows.
    """
    unit = G.abs().max()
    rows = G / unit  # the squares of the smallest gradients underflow
    v = rows[rows.square().sum(1).argmax()]
    for _ in range(3):
        u = rows @ v / (v @ v)
        v = u @ rows / (u @ u)
    size = u.abs().sum() / 2
    rest = (rows - u[:, None] * v).norm()
    noise = rest / G.numel() ** 0.5 / (v.norm() * size)
    return RankOne(u / size, v * size * unit, (rest / rows.norm()).item(), noise.item())


def least_squares_input(G: Tensor, dz: Tensor) -> Tensor:
    """The x of G = δz xᵀ by least squares over the rows, (n,)."""
    unit = dz.abs().max()
    return (dz / unit) @ G / (dz / unit).square().sum() / unit


def relative(model: Tensor, dz: Tensor) -> float:
    """‖model − δz‖ / ‖δz‖, without overflow of squares."""
    unit = dz.abs().max()
    return (((model - dz) / unit).norm() / (dz / unit).norm()).item()


def reading(
    head: HeadGradient,
    found: list[Hypothesis],
    misfits: Mapping[int, float],
    notes: list[str],
    tolerance: float | None = None,
) -> HeadReading:
    """Puts a reading together: checks a known label, and notes on what evidence the label was decided.

    Args:
        head: What was read.
        found: The hypotheses, of the known label too where one is given.
        misfits: Label -> smallest residual of the head's equations.
        notes: What was out of range so far.
        tolerance: Residual up to which the equations count as fulfilled, where it is not the head's.

    Raises:
        GradientMismatchError: If the gradient is plainly that of another label than the one given.
    """
    known, tolerance = head.known, head.tolerance if tolerance is None else tolerance
    best, second = sorted(misfits, key=misfits.__getitem__)[:2]
    decided = misfits[second] > 10 * misfits[best] and misfits[second] > tolerance
    evidence = []
    if known is not None:
        if known != best and decided and misfits[known] > WRONG_LABEL_RESIDUAL > 10 * misfits[best]:
            raise GradientMismatchError(f"label {known} was given; the last layer's gradient is that of {best}")
        if known != best and decided:
            evidence = [
                f"label {known} was given, and the head's equations are missed by {misfits[known]:.2g} with it; with "
                f"label {best} by {misfits[best]:.2g}"
            ]
        found = [h for h in found if h.label == known]
    elif decided:
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
    head: HeadGradient,
    dz: Tensor,
    output_gradient: Callable[[Tensor, int], Tensor],
    notes: list[str],
    *,
    label: int | None = None,
    rounding: float = 0.0,
) -> HeadReading:
    """The reading of a layer with a bias, whose gradient is δz: x and z follow from it, and z must explain δz.

    Args:
        head: What is read.
        dz: Gradient of the loss by the outputs, (C,), not zero.
        output_gradient: (z, label) -> the loss's gradient by outputs z, (C,).
        notes: What was out of range.
        label: Where δz alone tells it; by default the one whose gradient is nearest to δz.
        rounding: Relative error of δz from the client's own arithmetic.
    """
    x = least_squares_input(head.G, dz)
    z = head.W @ x + head.layer.bias
    residuals = {k: relative(output_gradient(z, k), dz) for k in range(max(len(dz), 2))}
    label = min(residuals, key=residuals.__getitem__) if label is None else label
    found = [Hypothesis(label, 2 / dz.abs().sum().item(), dz, x, residuals[label], rounding)]
    if head.known not in (None, label):  # another label was given: it has to stand on the same numbers
        found.append(replace(found[0], label=head.known, residual=residuals[head.known]))
    return reading(head, found, residuals, notes, max(head.tolerance, 10 * rounding))
