"""The limits that decide how a layer is solved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SolverLimits:
    """Sizes and ratios that decide how a layer is solved; unknowns are counted for one group of channels.

    Batches have some limits of their own: no iterative solver stands behind their dense system, so that this may be
    larger, and the precision of their gradient is not taken into account, so that W must be better conditioned.
    """

    # unknowns that the gradients may leave open, over all images, before W alone is preferred to a dense system
    dense_unknowns: int = 1600
    dense_unknowns_batch: int = 800
    # open unknowns from which conjugate gradients on both kinds of equations are tried before a dense system; one image
    # only
    iterative_unknowns: int = 2000
    # open unknowns, over all images, up to which a dense system is solved at all (6000: 0.3 GB; 12,000: 1.2 GB)
    max_dense_unknowns: int = 6000
    max_dense_unknowns_batch: int = 12_000
    # unknowns up to which W is factored sparsely; beyond, conjugate gradients need less time and memory
    max_factor_unknowns: int = 40_000
    # condition number of W up to which its own solution is always taken where gradients leave many unknowns open
    well_conditioned: float = 1e3
    well_conditioned_batch: float = 300.0  # the same for a batch, whatever the gradient's precision
    # directions that the gradients see with less than this share of their largest singular value are shared with the
    # weight equations
    trusted_ratio: float = 0.02
    # directions that W sees with less than this share of its largest singular value are left to the gradients, where W
    # goes first; batches only
    weak_ratio: float = 0.03
    # w goes first where it leaves less than this share of what the gradients leave open: it is the quicker way, and
    # passes on more error; batches only
    weights_first_ratio: float = 1 / 3
    # entries of the largest null basis of a fixed layer that is made (20 million: 160 MB)
    max_null_entries: int = 20_000_000
    # rows and columns of W up to which its dense pseudo-inverse is made; also the shorter side up to which its dense
    # Gram matrix is (8000: 0.5 GB)
    max_pinv_side: int = 8000


DEFAULT_LIMITS = SolverLimits()  # the limits of every attack; tests pass their own
