"""What the fully connected layers say of every image of a batch: features, the gradients by them, label and scale."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.equations.blocks import joint_identities
from rgap.network.chain import Chain, Layer
from rgap.separation.batch_size import first_dense
from rgap.separation.joint_softmax import fit_joint_softmax
from rgap.separation.refine import FittedInputs, refine_head
from rgap.separation.scales import output_gradients, output_jacobians, scale_hypotheses
from rgap.separation.separate import Separation
from rgap.shared_gradient import SharedGradient

COMBINATIONS = 64
"""Most combinations of scale hypotheses between which the last convolution is asked to choose."""


@dataclass(frozen=True)
class Start:
    """A hypothesis on all images at the first fully connected layer.

    Attributes:
        labels: (B,).
        head: The layer's inputs and the gradients by them.
        twins: For each image the factors by which it may as well be scaled; the first is 1.
    """

    labels: Tensor
    head: FittedInputs
    twins: tuple[tuple[float, ...], ...]


def read_batch(
    chain: Chain, received: SharedGradient, apart: Separation, size: int, loss: str, known: list[int] | None, seed: int
) -> tuple[Start | None, list[str]]:
    """Every image at the first fully connected layer, with label and scale.

    Args:
        chain: The prepared network.
        received: The gradients.
        apart: What the search has found.
        size: Images in the batch.
        loss: "logistic" or "cross_entropy".
        known: Labels if they are known.
        seed: Of random starts.

    Returns:
        The `Start`, None where not all images have come apart or one has no scale, and notes.
    """
    if len(apart.inputs) == size:
        return _scaled(chain, received, apart, loss)
    if apart.first.rank == size and loss == "cross_entropy":
        return _read_together(chain.layers[first_dense(chain) :], received, apart, known, seed)
    return None, []


def _scaled(chain: Chain, received: SharedGradient, apart: Separation, loss: str) -> tuple[Start | None, list[str]]:
    """Labels and scales of the separated inputs, then all of it fitted together; None where an image has no scale."""
    below, count = first_dense(chain), len(apart.inputs)
    tail = chain.layers[below:]
    c, f = output_gradients(tail, received.gradients, apart.inputs, apart.dz, complete=True)
    hypotheses, notes = [], []
    for f_b, c_b in zip(f, count * c, strict=True):
        found, said = scale_hypotheses(loss, f_b, c_b, tail[0].bias is not None)
        notes += [note for note in said if note not in notes]
        hypotheses.append(found)
    if not all(hypotheses):
        return None, [*notes, "without a scale for every image the convolutions were not solved"]
    combinations = list(itertools.islice(itertools.product(*hypotheses), COMBINATIONS))
    if len(combinations) > 1 and not chain.homogeneous:
        shares = torch.einsum("bco,bc->bo", output_jacobians(tail, apart.inputs)[1][0], c)
        misses = [_mismatch(chain, received, apart.inputs, shares, one) for one in combinations]
        best = min(range(len(misses)), key=misses.__getitem__)
        notes.append(
            f"the last convolution chose between {len(combinations)} combinations of scales: it misses its identities "
            f"by {misses[best]:.2g}, with the next one by {sorted(misses)[1]:.2g}"
        )
        hypotheses = [[one] for one in combinations[best]]
    heads = []
    for number in range(max(map(len, hypotheses))):
        chosen = [found[min(number, len(found) - 1)] for found in hypotheses]
        labels = torch.tensor([label for label, _ in chosen])
        scales = apart.inputs.new_tensor([scale for _, scale in chosen])
        heads.append((labels, refine_head(tail, received.gradients, scales[:, None] * apart.inputs, labels, loss)))
    labels, head = heads[0]
    factors = [((other.x * head.x).sum(1) / head.x.square().sum(1)).tolist() for _, other in heads]
    twins = tuple((1.0, *(factors[n][b] for n in range(1, len(each)))) for b, each in enumerate(hypotheses))
    return Start(labels, head, twins), notes


def _read_together(
    tail: Sequence[Layer], received: SharedGradient, apart: Separation, known: list[int] | None, seed: int
) -> tuple[Start | None, list[str]]:
    """The head of images that the search cannot tell apart, by their outputs."""
    precision = received.precision
    found = fit_joint_softmax(tail, received.gradients, apart.first, labels=known, precision=precision, seed=seed)
    if found is None:
        return None, ["nor were all images found together, by the softmax of their outputs"]
    labels, head = found
    note = (
        f"all images found together, by the softmax of their outputs; their gradients are missed by {head.residual:.2g}"
    )
    return Start(labels, head, ((1.0,),) * len(labels)), [note]


def _mismatch(
    chain: Chain, received: SharedGradient, inputs: Tensor, shares: Tensor, chosen: Sequence[tuple[int, float]]
) -> float:
    """How badly a combination of scales fits the last convolution's gradient, before anything is solved."""
    below = first_dense(chain)
    layer, scales = chain.layers[below - 1], inputs.new_tensor([scale for _, scale in chosen])[:, None]
    x, dx = scales * inputs, shares @ chain.layers[below].weight.flatten(1) / scales
    z = layer.activation.inverse(x.reshape(len(x), *layer.output_shape))
    dz = layer.activation.derivative(z) * dx.reshape(z.shape)
    return joint_identities(layer, layer.gradient(received.gradients), dz, z)
