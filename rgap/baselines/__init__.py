"""Attacks by optimisation, to compare the closed form with; one module a concern, the methods here.

They take what `rgap.reconstruct` takes, any network that is differentiable twice, and return an `Optimised`: a
`Reconstruction` with the course of the optimisation. Like it they know the network and the gradient, nothing else.
"""

from rgap.baselines.hybrid import hybrid
from rgap.baselines.methods import dlg, inverting_gradients
from rgap.baselines.optimisers import Snapshot
from rgap.baselines.outcome import Optimised

__all__ = ["Optimised", "Snapshot", "dlg", "hybrid", "inverting_gradients"]
