"""The factor κ of the whole gradient, and the smoothing ε of the labels, by the last layer's equations (ours).

A client that accumulates, sums, weights classes, clips or scales its loss shares κ ∇ℓ. Below the head every equation is
linear in δz and G together and does not see κ. In the head δz = κ ∂ℓ/∂z(z): with a bias x and z follow from the
gradient alone, and κ from the size of δz. Without one the length of x is unknown too: three classes or more determine
both, more than three confirm them; one output, or two classes, leave the brightness of the image open.

The simplest of (κ = 1), (κ) and (κ, ε) is kept that explains the equations, and the error of the length is the one that
it has where the next model's unknown is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from rgap.head.fits import EXCLUDED_MISFIT, MAX_MISFIT, HeadEquations, HeadFit, fit_rows, rows_of
from rgap.head.hypothesis import (
    HeadGradient,
    HeadReading,
    Hypothesis,
    RankOne,
    bias_error,
    entry_stds,
    least_squares_input,
    rank_one,
)
from rgap.head.logistic import C_MINIMUM

SIGNIFICANT_STDS = 6.0  # standard deviations by which a single output's factor must differ from 1
MAX_LABELS_TRIED = 3  # labels of a squared error whose equations are fitted with a free factor
MIN_SMOOTHING = 1e-6  # smoothing from which a fit starts beside a solution without one
SMOOTHINGS = (0.02, 0.1, 0.3)  # smoothings from which a fit starts
MAX_FURTHER_ERROR = 0.0125  # standard deviation of log κ or ε, both free, from which one may not be 0 and still look so
MAX_UNCONFIRMED_OUTPUTS = 2  # outputs up to which length and factor of a squared error fit any gradient
OUTPUT_ARITHMETIC = 2.0  # error of a single output over its precision and the root of its squared terms' sum


def with_factor(
    loss: str, head: HeadGradient, found: HeadReading, *, given: bool, smoothing: float | None
) -> HeadReading:
    """A reading by the book's loss, corrected for factor and smoothing where these are not given, with its errors.

    `head` is the last layer's gradient, divided by its factor if that is `given`, `found` what the loss's own reader
    makes of it, `smoothing` ε if it is given; only softmax cross-entropy has one.
    """
    if len(head.G) == 1:
        return _one_output(loss, head, found, given)
    return _several_outputs(loss, head, found, given, 0.0 if loss == "mse" else smoothing)


def _several_outputs(
    loss: str, head: HeadGradient, found: HeadReading, given: bool, smoothing: float | None
) -> HeadReading:
    factors, bias, solved = rank_one(head.G), head.bias is not None, []
    likely, unlikely = _ways(loss, head, factors, found, smoothing)
    for label, sign in (*likely, *unlikely):
        if (label, sign) in unlikely and any(h.misfit <= MAX_MISFIT for _, h in solved):
            break
        own = [h for h in found.hypotheses if h.label == label and (bias or h.scale * sign > 0)]
        fit, error, by_book = _model(rows_of(loss, head, factors, label, sign), head, own, given, smoothing)
        error = bias_error(head) if bias else error
        for h in own if by_book and own and not smoothing else [_of_fit(head, factors, label, sign, fit)]:
            solved.append((by_book, replace(h, length_error=error, misfit=fit.misfit)))
    if not solved:  # a label was given that the gradient does not have
        return replace(found, hypotheses=())
    limit = max(MAX_MISFIT, 3 * min(h.misfit for _, h in solved))
    kept = [(by_book, h) for by_book, h in solved if h.misfit <= limit]
    notes = found.notes if any(by_book for by_book, _ in kept) else ()
    return HeadReading(tuple(h for _, h in kept), found.misfits, notes)


def _model(
    rows: HeadEquations, head: HeadGradient, own: Sequence[Hypothesis], given: bool, smoothing: float | None
) -> tuple[HeadFit, float, bool]:
    """The fit of the simplest model that explains one label's equations, the error of log s, and if it is the book's.

    That error is the one of the next model, whose further unknown is free; whether it is 0 is not known.
    """
    length = head.bias is None
    logs = [math.log(abs(h.scale)) for h in own] + rows.length_starts() if length else [0.0]
    logs = logs or [0.0]

    def best(factor: bool, smooth: bool) -> HeadFit:
        shares = SMOOTHINGS if smooth else (smoothing or 0.0,)
        starts = [(q + length * math.log1p(-e), 0.0, e) for q in logs for e in shares]
        starts = [(q, rows.log_factor(q, e) if factor else 0.0, e) for q, _, e in starts]
        starts = [start for start in starts if math.isfinite(start[1])] or [(logs[0], 0.0, shares[0])]
        return min((fit_rows(rows, start, (length, factor, smooth)) for start in starts), key=lambda fit: fit.misfit)

    if own and length and not smoothing:  # the book's own reader has solved them
        book = min((fit_rows(rows, (q, 0.0, 0.0), (True, False, False), solved=True) for q in logs[: len(own)]),
                   key=lambda fit: fit.misfit)  # fmt: skip
    else:
        book = best(False, False)
    if given and (smoothing is not None or book.misfit <= MAX_MISFIT):
        return book, float(book.std[0]), True
    if book.misfit <= MAX_MISFIT:
        return book, book.error_beside(best(True, False)), True
    simple = [best(True, False)] * (not given) + [best(False, True)] * (smoothing is None)
    one, *rival = sorted(simple, key=lambda fit: fit.misfit)
    if one.misfit > MAX_MISFIT:
        one, rival = (book if given or smoothing is not None else best(True, True)), []
        return (one, float(one.std[0]), False) if one.misfit <= MAX_MISFIT else (book, math.inf, True)
    if rows.squared and length and len(rows.u) <= MAX_UNCONFIRMED_OUTPUTS:
        return one, math.inf, False
    if rival and rival[0].misfit <= EXCLUDED_MISFIT * max(one.misfit, 1.0):
        return one, one.error_beside(rival[0]), False
    if rival:
        beside = tuple(np.maximum(one.theta, (-np.inf, -np.inf, MIN_SMOOTHING)))
        both = fit_rows(rows, beside, (length, True, True))
        place = 2 if one.theta[2] == 0 else 1
        if not both.std[place] <= MAX_FURTHER_ERROR:
            return one, one.error_beside(both), False
        if abs(both.theta[place]) > SIGNIFICANT_STDS * both.std[place]:
            return both, float(both.std[0]), False
    return one, float(one.std[0]), False


def _ways(
    loss: str, head: HeadGradient, factors: RankOne, found: HeadReading, smoothing: float | None
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Labels, each with the sign of u, whose equations are fitted; and those that are where these explain nothing."""
    bias, more = head.bias is not None, []
    likely = {(h.label, 1.0 if bias or h.scale > 0 else -1.0) for h in found.hypotheses}
    if loss == "mse" and bias:
        rows = [rows_of(loss, head, factors, label, 1.0) for label in range(len(head.G))]
        misfits = [fit_rows(one, (0.0, one.log_factor(0.0), 0.0), (False,) * 3).residual for one in rows]
        more = sorted(range(len(rows)), key=misfits.__getitem__)[:MAX_LABELS_TRIED]
    elif smoothing != 0:  # entries of other classes may be negative, and the label's may not
        more = (head.bias if bias else factors.u).abs().argsort(descending=True)[:MAX_LABELS_TRIED].tolist()
    unlikely = [(label, sign) for label in more for sign in ((1.0,) if bias else (1.0, -1.0))]
    both = sorted(likely), [way for way in unlikely if way not in likely]
    return tuple([way for way in ways if head.known in (None, way[0])] for ways in both)


def _of_fit(head: HeadGradient, factors: RankOne, label: int, sign: float, fit: HeadFit) -> Hypothesis:
    q, log_factor, smoothing = fit.theta.tolist()
    numbers = {"gradient_scale": math.exp(log_factor), "label_smoothing": smoothing}
    if head.bias is not None:
        scale, x = 2 / head.bias.abs().sum().item(), least_squares_input(head.G, head.bias)
        return Hypothesis(label, scale, head.bias, x, fit.residual, **numbers)
    s = sign * math.exp(q)
    return Hypothesis(label, s, factors.u / s, s * factors.v, fit.residual, **numbers)


def _one_output(loss: str, head: HeadGradient, found: HeadReading, given: bool) -> HeadReading:
    """A single output: with a bias the factor follows, without one it must be given, or the brightness is open."""
    stds = None if head.bias is not None or not given else entry_stds(head, rank_one(head.G))
    fix = partial(_without_bias, stds=stds) if head.bias is None else _with_bias
    hypotheses = [fix(loss, head, h, given) for h in found.hypotheses]
    by_book = given or all(h.gradient_scale == 1 for h in hypotheses)
    return HeadReading(tuple(hypotheses), found.misfits, found.notes if by_book else ())


def _output_error(head: HeadGradient, x: Tensor) -> float:
    """Standard deviation of a client's single output by its own arithmetic."""
    terms = head.W[0] * x
    return OUTPUT_ARITHMETIC * head.precision * (terms.norm() + terms.sum().abs()).item()


def _with_bias(loss: str, head: HeadGradient, h: Hypothesis, given: bool) -> Hypothesis:
    error = bias_error(head)
    if given:
        return replace(h, length_error=error)
    dz = head.bias.item()
    x = head.G[0] / dz
    z, labels = (head.W[0] @ x + head.layer.bias).item(), (0, 1) if head.known is None else (head.known,)
    factors = {label: dz / own for label in labels if (own := _output_gradient(loss, z, label)) * dz > 0}
    if not factors:
        return h
    label = min(factors, key=lambda k: abs(math.log(factors[k])))
    slope = 2.0 if loss == "mse" else 1.0
    noise = math.hypot(error, slope * _output_error(head, x) / abs(_output_gradient(loss, z, label)))
    factor = factors[label]
    if abs(math.log(factor)) <= SIGNIFICANT_STDS * noise:
        factor = 1.0
    return Hypothesis(label, 1 / abs(dz), head.bias, x, gradient_scale=factor, length_error=error)


def _output_gradient(loss: str, z: float, label: int) -> float:
    """∂ℓ/∂z of a single output."""
    y = 2 * label - 1
    return 2 * (z - y) if loss == "mse" else -y / (1 + math.exp(min(y * z, 700.0)))


def _without_bias(loss: str, head: HeadGradient, h: Hypothesis, given: bool, stds: Tensor | None) -> Hypothesis:
    """The error of x's length, by the curvature of c(μ) too: at its minimum two roots meet, and errors are large."""
    c = (head.G * head.W).sum().item()
    y, least = 2 * h.label - 1, -0.5 if loss == "mse" else C_MINIMUM
    if not given:
        factor = max(c / least, 1.0)  # the smallest with which a sample has this gradient
        return replace(h, gradient_scale=factor if factor > 1 + 1e-9 else 1.0, residual=0.0, length_error=math.inf)
    f = (head.W[0] @ h.x).item()
    mu, output = y * f, _output_error(head, h.x)
    if loss == "mse":
        share, slope, curve, dlog = abs(mu - 1), 2 * (2 * mu - 1), 4.0, 1 / max(abs(mu - 1), 1e-300)
        rounding = output / max(share, 1e-300)
    else:
        share = 1 / (1 + math.exp(min(mu, 700.0)))
        slope = share * (mu * (1 - share) - 1)
        curve, dlog, rounding = share * (1 - share) * (2 - mu * (1 - 2 * share)), 1 - share, (1 - share) * output
    rounding = math.hypot(rounding, (stds.min() / h.dz.abs().max()).item())
    error = math.hypot((head.W * stds).norm().item(), abs(f) * h.dz.abs().item() * rounding)
    moved = 2 * error / (abs(slope) + math.sqrt(slope**2 + 2 * abs(curve) * error))
    return replace(h, length_error=math.hypot(dlog * moved, rounding), rounding=max(h.rounding, rounding))
