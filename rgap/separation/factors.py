"""The factor on each image's share of a batch's gradient, and what it leaves open of the image's length (ours).

A weighted loss has a factor for each class, a clipped, accumulated or summed one the same for all. With biases the
inputs have their true lengths, and the factor follows from the size of ∂ℓ/∂f. Without them three classes or more
determine both, and one output or two classes leave the brightness open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rgap.client import loss_value
from rgap.head.factor import MAX_FURTHER_ERROR, MIN_SMOOTHING, SIGNIFICANT_STDS
from rgap.head.fits import EXCLUDED_MISFIT, MAX_MISFIT, HeadEquations, fit_rows
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain, Layer
from rgap.separation.scales import label_of, scale_hypotheses

SHARE_NOISE = 10.0  # relative error of ∂ℓ/∂f in units of the gradients' precision
UNIT_FACTOR_ERROR = 1e-3  # distance from 1 up to which a factor that follows from an input of known length counts as 1


class ImageFactor(NamedTuple):
    """An image's length and the factor on its share of the gradient."""

    alpha: float  # of the image α x̂
    factor: float
    error: float  # relative standard deviation of α; infinite where it is open


def image_factor(
    loss: str, f: Tensor, c: Tensor, label: int, alpha: float, *, fixed_scale: bool, precision: float
) -> ImageFactor:
    """The factor of one image's share ∂ℓ/∂f = c (C,) at outputs f (C,), with the α that it has with the factor 1."""
    if fixed_scale:
        mine = torch.func.grad(lambda f: loss_value(loss, f, torch.tensor([label])))(f[None])[0]
        factor = ((c * mine).sum() / mine.square().sum().clamp(min=torch.finfo(c.dtype).tiny)).item()
        return ImageFactor(1.0, factor if factor > 0 and abs(factor - 1) > UNIT_FACTOR_ERROR else 1.0, 0.0)
    if len(f) <= 2:
        return ImageFactor(alpha, 1.0, math.inf)
    noise = SHARE_NOISE * max(precision, torch.finfo(c.dtype).eps)
    unit = c.abs().max().item()
    numbers = (c / unit).numpy(), f.numpy(), np.zeros(len(f)), np.full(len(f), noise), np.zeros(len(f))
    rows = HeadEquations(label, False, *numbers, noise)
    logs, shift = [math.log(alpha), *rows.length_starts()], math.log(unit)
    book = fit_rows(rows, (logs[0], -shift, 0.0), (True, False, False), solved=True)
    starts = [(q, rows.log_factor(q), 0.0) for q in logs if math.isfinite(rows.log_factor(q))] or [(logs[0], 0.0, 0.0)]
    free = min((fit_rows(rows, start, (True, True, False)) for start in starts), key=lambda fit: fit.misfit)
    if book.misfit <= max(MAX_MISFIT, EXCLUDED_MISFIT * free.misfit):
        return ImageFactor(alpha, 1.0, book.error_beside(free))
    beside = tuple(np.maximum(free.theta, (-np.inf, -np.inf, MIN_SMOOTHING)))
    both = fit_rows(rows, beside, (True, True, True))
    error = float(free.std[0])
    if free.misfit > MAX_MISFIT or both.theta[2] > SIGNIFICANT_STDS * both.std[2]:
        error = math.inf  # no factor explains the share; smoothed labels may
    elif not both.std[2] <= MAX_FURTHER_ERROR:
        error = free.error_beside(both)
    q, log_factor, _ = free.theta.tolist()
    return ImageFactor(math.exp(q), math.exp(log_factor + shift), error)


def share_hypotheses(
    chain: Chain, first: Layer, loss: str, f: Tensor, c: Tensor, precision: float, given: float | None
) -> tuple[list[list[tuple[int, float]]], list[ImageFactor], list[str]]:
    """The (label, scale) hypotheses of every image, the factor of its share, and notes without repetitions."""
    biased, found, factors, notes = first.bias is not None, [], [], []
    for f_b, c_b in zip(f, c / (given or 1.0), strict=True):
        options, more = scale_hypotheses(loss, f_b, c_b, biased)
        factor = ImageFactor(1.0, given or 1.0, 0.0)
        if given is None and len(f_b) <= 2 and not biased:  # the layers below see the brightness, if anything does
            factor = ImageFactor(1.0, 1.0, math.inf if chain.homogeneous else 0.0)
        elif given is None and c_b.any() and torch.isfinite(c_b).all():
            label = label_of(c_b)
            alpha = options[0][1] if options else 1.0
            factor = image_factor(loss, f_b, c_b, label, alpha, fixed_scale=biased, precision=precision)
            if factor.factor != 1:
                options, more = [(label, factor.alpha)], []
        found.append(options)
        factors.append(factor)
        notes += more
    return found, factors, list(dict.fromkeys(notes))


def with_factors(start: Start, factors: Sequence[ImageFactor]) -> Start:
    """A start with the factors of its images."""
    if not factors:
        return start
    scales, errors = zip(*((one.factor, one.error) for one in factors), strict=True)
    return replace(start, gradient_scale=scales, length_errors=errors)
