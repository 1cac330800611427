"""Attacks by optimisation, to compare the closed form with.

They take the arguments of `rgap.reconstruct` and any network that can be differentiated twice, and return an
`Optimised`: a `Reconstruction` with the course of the optimisation. They too know only the network and the gradient.
"""

from rgap.baselines.hybrid import hybrid
from rgap.baselines.methods import dlg, inverting_gradients
from rgap.baselines.optimisers import Snapshot
from rgap.baselines.outcome import Optimised

__all__ = ["Optimised", "Snapshot", "dlg", "hybrid", "inverting_gradients"]
