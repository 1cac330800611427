"""Units that all images of a batch switch on: they act as a linear layer, and show what the others lack (ours).

Where every image switches unit j on, its row of the gradient is Σ_b e_bj q_bᵀ with e_b = W_2ᵀ ∂ℓ/∂z_2, that is e_jᵀ M
with E an orthonormal basis of W_2ᵀ times the column space of the second gradient, and one M (k, r) for all units. What
then remains of any other row are the images that do *not* switch its unit on: another end at which a batch peels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LINEAR_UNKNOWNS = 24  # largest k for which such units are searched: k + `SURPLUS_UNITS` of them are needed
SURPLUS_UNITS = 4  # units beyond k that must agree: a chance agreement of so many is none
SUBSETS_TRIED = 250  # random subsets of each list of units from which M is solved
LINEAR_FITS = 3  # turns of the fit of M to the units that agree, each with the noise that the last one has shown
TEST_COLUMNS = 16  # random combinations of columns on which a subset is tested
AGREEING_STDS = 10.0  # multiple of the noise of a row up to which it agrees with M


class LinearPart(NamedTuple):
    """What the gradient's rows would be if every image switched every unit on."""

    rows: Tensor  # (h, r)
    noise: Tensor  # standard deviation of their entries, (h,)


def linear_part(E: Tensor, rows: Tensor, noise: Tensor, order: Tensor, generator: torch.Generator) -> LinearPart | None:
    """The linear part of `rows` (h, r) with noise (h,), by consensus among the units that come first in `order`.

    E (h, k) is that of the module, times the slope of each unit where all images agree. None where no consensus is
    found.
    """
    k = E.shape[1]
    if not 0 < k <= MAX_LINEAR_UNKNOWNS or len(order) < k + SURPLUS_UNITS:
        return None
    columns = torch.randn(rows.shape[1], TEST_COLUMNS, generator=generator, dtype=rows.dtype)
    seen, best = rows @ columns, None
    alive = rows.norm(dim=1) > AGREEING_STDS * noise * rows.shape[1] ** 0.5
    order = order[alive[order]]
    for size in (k + SURPLUS_UNITS, 2 * k, 4 * k, 8 * k):
        first = order[:size]
        if len(first) < k + SURPLUS_UNITS or (best is not None and int(best.sum()) > size):
            break
        draws = torch.rand(SUBSETS_TRIED, len(first), generator=generator).argsort(1)[:, :k]
        subset = first[draws]
        inverse = torch.linalg.pinv(E[subset], rtol=1e-10)  # (S, k, k)
        left = (seen - E @ (inverse @ seen[subset])).norm(dim=2)
        spread = ((E @ inverse).square() @ noise[subset].square()[:, :, None])[:, :, 0] + noise.square()
        agree = (left <= AGREEING_STDS * (spread * TEST_COLUMNS * rows.shape[1]).sqrt()) & alive
        found = agree[int(agree.sum(1).argmax())]
        if int(found.sum()) >= k + SURPLUS_UNITS and (best is None or found.sum() > best.sum()):
            best = found
    if best is None:
        return None
    seen, noise = rows[best], noise[best]
    for _ in range(LINEAR_FITS):
        inverse = torch.linalg.pinv(E[best] / noise[:, None], rtol=1e-10)
        M = inverse @ (seen / noise[:, None])
        noise = torch.maximum(noise, (seen - E[best] @ M).norm(dim=1) / rows.shape[1] ** 0.5)
    return LinearPart(E @ M, (E @ inverse).norm(dim=1))
