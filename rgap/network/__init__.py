"""An nn.Module as a chain of linear layers with activations; float64, prepared once."""

from rgap.network.activations import Activation
from rgap.network.chain import Chain, Layer, prepare
from rgap.network.tracing import Step, trace

__all__ = ["Activation", "Chain", "Layer", "Step", "prepare", "trace"]
