"""One layer's weight and gradient equations, their rank laws, and their solution for all images of a batch."""

from rgap.equations.gradient import bias_residual, identity_residual
from rgap.equations.limits import SolverLimits
from rgap.equations.solution import LayerSolution
from rgap.equations.solve import solve_layer

__all__ = ["LayerSolution", "SolverLimits", "bias_residual", "identity_residual", "solve_layer"]
