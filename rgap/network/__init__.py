"""An nn.Module as a chain of linear layers with activations, or as a graph of them; float64, prepared once."""

from rgap.network.activations import Activation
from rgap.network.chain import Chain, Layer, prepare, prepare_graph
from rgap.network.nodes import Graph, Node
from rgap.network.steps import Step
from rgap.network.tracing import trace

__all__ = ["Activation", "Chain", "Graph", "Layer", "Node", "Step", "prepare", "prepare_graph", "trace"]
