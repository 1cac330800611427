"""Two consecutive fully connected layers: the inputs of the first, apart, from gradients that mix a batch.

A batch of B has G_1 = Δ_1ᵀ X and G_2 = Δ_2ᵀ H, H = σ(X W_1ᵀ): every input x lies in the row space of G_1 and every
hidden vector σ(W_1 x) in that of G_2, and almost nothing else does both. Everything in this module is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.network.layer import Layer
from rgap.separation.search import Search
from rgap.separation.subspaces import Span, row_span

PATIENCE = 60
"""Starts in a row without a new input, or a new share of one, that end the search."""

AT_ONCE = 6
"""Starts that are iterated together."""


@dataclass(frozen=True)
class Separation:
    """The inputs of the first layer that were found, each verified on its own.

    Attributes:
        inputs: (F, n), float64: of unit length without bias, else with their true length.
        dz: ∂ℓ/∂z_1 that belongs to these inputs, (F, h): Σ dz_bᵀ x_b is the found inputs' share of G_1.
        residuals: Sines of the angles by which (hidden vector, dz) miss the spaces that they must lie in, (F, 2); for
            an input that follows from shares, the first is that of all such inputs together.
        first, second: Row and column spaces of the two gradients, with their ranks.
        starts: Random starts that were used.
        steps: Steps of the fixed point over all starts.
    """

    inputs: Tensor
    dz: Tensor
    residuals: Tensor
    first: Span
    second: Span
    starts: int
    steps: int


def separate(
    first: Layer,
    second: Layer,
    gradients: Mapping[str, Tensor],
    *,
    precision: float = 1e-14,
    seed: int = 0,
    span: Span | None = None,
) -> Separation:
    """Separates the inputs of a fully connected layer from the gradients of it and the next one.

    Write x = V_x q and s for the signs of z = W_1 x. The hidden vector D_s z, with D_s the slopes that the signs
    choose, must lie in the row space of G_2. For given s that is a smallest principal angle between two subspaces; its
    direction gives new signs, until they stay. Starts are random. The same signs give ∂ℓ/∂z_1 = D_s W_2ᵀ ∂ℓ/∂z_2,
    which must lie in the column space of G_1: a second, independent test. And it *deflates*: with u = ∂ℓ/∂z_1 of one
    input, all others fulfil uᵀ G_1⁺ x = 0 (Wedderburn's rank reduction), so that the next start looks among the others
    only, and little more than B starts do.

    Where the second gradient has a lower rank than the first, single hidden vectors are not in its row space, and the
    second test leads: shares ∂ℓ/∂z_1 are collected, and the inputs follow from them (`batch_shares`).

    The first layer must have `batch_margins.SPARE` more outputs than the ranks of both gradients together. What is
    not found is missing from the result; an input that is in it has passed both tests, or, by its share, the second one
    and that of the signs of all its units.

    Args:
        first: A fully connected layer with a positively homogeneous activation that is not linear (LeakyReLU, PReLU,
            ReLU).
        second: The fully connected layer after it.
        gradients: Parameter name -> gradient, float64, at least of these two layers.
        precision: Relative error of the gradients' entries.
        seed: Of the starts.
        span: `row_span` of the first layer, where it is at hand.

    Returns:
        A `Separation`.

    Raises:
        UnsupportedLayerError: If the activation between the layers is linear or not homogeneous.
    """
    spans = span or row_span(first, gradients, precision), row_span(second, gradients, precision)
    search = Search(first, second, spans, precision)
    generator = torch.Generator().manual_seed(seed)
    starts, failed, whole = 0, 0, False
    while search.missing > search.half_found and failed < PATIENCE and search.has_tests:
        count = min(AT_ONCE, search.missing - search.half_found, PATIENCE - failed)
        known = search.found + search.half_found
        search.look(count, generator, whole=whole)
        starts += count
        progress = search.found + search.half_found > known
        if progress and search.half_found:
            search.settle()
        failed = 0 if progress else failed + count
        whole = failed > 0 and not whole  # where the rest gives nothing, look among all, and take turns
    return Separation(search.inputs, search.dz, search.residuals, search.first, search.second, starts, search.steps)
