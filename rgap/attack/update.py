"""An update of several local steps, and the images that its first layer gives whatever the steps were (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgap.client import LocalTraining, UpdateGradients, gradients_of
from rgap.network.layer import Chain
from rgap.results import GradientMismatchError, LayerReport, PixelRange
from rgap.shared_gradient import FLOAT64_FLOOR, receive
from rgap.tokens import PatchEmbedding, reconstruct_tokens

UNIT_AGREEMENT = 20.0  # standard deviations within which two units show the same image
MIN_UNIT_SHARE = 1e-6  # smallest bias gradient of a unit that is looked at, relative to the largest
RANDOM_PROJECTIONS = 64  # random projections of the units' images that are compared with each other
MAX_CLASSES = 100  # classes up to which the gradient of an image with each label is computed
MAX_LABELS_TRIED = 5  # most labels with which an image is run through the client's steps


@dataclass(frozen=True)
class UpdateTask:
    """An update, and what is known of the client."""

    network: Chain | PatchEmbedding
    update: UpdateGradients  # Ḡ
    training: LocalTraining
    loss: str
    batch_size: int
    labels: Tensor | Sequence[int] | None
    pixels: PixelRange
    seed: int
    device: torch.device | str | None

    def weights(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The weights that were sent out, by name."""
        return {name: p.detach().to("cpu", dtype) for name, p in self.network.model.named_parameters()}

    def simulate(self, images: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Ḡ of a client with these images (B, C, H, W), computed in `dtype`."""
        start = self.weights(dtype)
        end = self.training.run(self.network.model, start, images, labels, self.loss)
        kept, total = self.training.coefficients[0], self.training.total
        return {n: (w.double() - end[n].double() - (1 - kept) * w.double()) / total for n, w in start.items()}

    def drift(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far Ḡ of these images is from their gradient at the weights that were sent out."""
        gradient = gradients_of(self.network.model, self.weights(), images, labels, self.loss)
        return {name: g - gradient[name] for name, g in self.simulate(images, labels).items()}

    def miss(self, mean: Mapping[str, Tensor]) -> float:
        """How far a mean gradient is from Ḡ: the root of the parameters' squared relative misses."""
        pairs = [(mean[name] - g, g) for name, g in self.update.items()]
        return math.hypot(*(rest.norm().item() / max(g.norm().item(), 1e-300) for rest, g in pairs))


@dataclass(frozen=True)
class FoundImages:
    """Images before their certificate."""

    images: Tensor  # (B, C, H, W), float64
    labels: tuple[Tensor, ...]  # (B,) each, in the order in which they are likely; at least one
    error: float | None  # predicted root-mean-square error of the images
    layers: tuple[LayerReport, ...] = ()
    notes: tuple[str, ...] = ()
    iterates: Mapping[str, Tensor] = field(default_factory=dict)  # name of the first layer -> iterates, (steps, n)


def by_patches(task: UpdateTask) -> FoundImages:
    """The patches solve Ḡ_1 = Δ̄ᵀ P as after one step."""
    result = reconstruct_tokens(
        task.network, task.update, task.loss, batch_size=task.batch_size, labels=task.labels,
        virtual_constraints=False, pixel_range=(task.pixels.low, task.pixels.high),
    )  # fmt: skip
    best = result.candidates[0]
    certifiable = len(result.candidates) == 1 and not best.open_layers  # else the image rests on a prior
    notes = tuple(note for note in result.notes if "no single gradient" not in note)
    labels = likely_labels(task, best.images) if task.labels is None else (best.labels,)
    return FoundImages(best.images, labels, best.predicted_error if certifiable else None, best.layers, notes)


def by_first_layer(task: UpdateTask) -> FoundImages:
    """One image is the common factor of the units' rows of Ḡ_1; of several, each is that of units that it alone moves.

    A unit that one image alone switches on has Ḡ_j = h̄_j x; two units that show the same x are two such.
    """
    layer, shape = task.network.layers[0], task.network.image_shape
    received = receive(task.network, task.update)
    G, h = received.gradients[layer.weight_name].flatten(1), received.gradients[layer.bias_name]
    G_std, h_std = received.entry_std[layer.weight_name].flatten(1), received.entry_std[layer.bias_name]
    if not h.any():
        raise GradientMismatchError(f"the update of the bias {layer.bias_name!r} is zero, and the weight's is not")
    groups = [torch.arange(len(h))] if task.batch_size == 1 else _agreeing_units(G, h, G_std, h_std, task.seed)
    notes = []
    if len(groups) != task.batch_size:
        notes = [f"{len(groups)} images of {task.batch_size} show in two units or more that each of them moves alone"]
    images, variances = [], []
    for units in groups[: task.batch_size]:
        own, square = h[units], h[units].square().sum()
        x = own @ G[units] / square
        spread = G_std[units].square() + (h_std[units, None] * x).square()
        variances.append((own.square() @ spread / square.square()).mean().item())
        images.append(x.reshape(shape))
    x = torch.stack(images) if images else G.new_zeros(0, *shape)
    error = max(variances, default=math.inf) ** 0.5
    report = LayerReport(layer.name, layer.unknowns, rank=layer.unknowns, deficit=0, predicted_error=error)
    if task.labels is not None and len(x) == task.batch_size:
        labels = (torch.as_tensor(task.labels),)
    else:
        labels = likely_labels(task, x) if task.batch_size == 1 else (_batch_labels(task, x),)
    return FoundImages(x, labels, error, (report,), tuple(notes))


def _agreeing_units(G: Tensor, h: Tensor, G_std: Tensor, h_std: Tensor, seed: int) -> list[Tensor]:
    """Groups of two units or more with the same Ḡ_j / h̄_j to within their errors, the largest group first."""
    units = (h.abs() > MIN_UNIT_SHARE * h.abs().max()).nonzero()[:, 0]
    x = G[units] / h[units, None]
    std = (G_std[units].square() + (x * h_std[units, None]).square()).mean(1).sqrt() / h[units].abs()
    generator = torch.Generator().manual_seed(seed)
    seen = x @ torch.randn(
        x.shape[1], RANDOM_PROJECTIONS, generator=generator, dtype=x.dtype
    )  # of size √n in each entry
    floor = FLOAT64_FLOOR * x.square().mean(1).sqrt()
    limit = UNIT_AGREEMENT * x.shape[1] ** 0.5 * (std[:, None] + std + floor[:, None])
    alike = torch.cdist(seen, seen, compute_mode="donot_use_mm_for_euclid_dist") <= limit * RANDOM_PROJECTIONS**0.5
    groups, left = [], torch.ones(len(units), dtype=torch.bool)
    for one in std.argsort().tolist():  # the most precise units first
        group = alike[one] & left
        if left[one] and group.sum() > 1:
            groups.append(units[group])
        left &= ~group
    return sorted(groups, key=len, reverse=True)


def likely_labels(task: UpdateTask, image: Tensor) -> tuple[Tensor, ...]:
    """Labels (1,) of one image, by the angle between its gradient with each of them and Ḡ; a few."""
    start = task.weights()
    with torch.no_grad():
        outputs = torch.func.functional_call(task.network.model, start, image)
    if (classes := max(outputs.shape[-1], 2)) > MAX_CLASSES:
        raise ValueError(f"the network has {classes} classes, too many to try the label of each; give labels=")
    products = []
    for label in torch.arange(classes):
        mine = gradients_of(task.network.model, start, image, label[None], task.loss)
        product = sum((mine[n] * g).sum().item() for n, g in task.update.items())
        size = sum(mine[n].square().sum().item() for n in task.update) ** 0.5
        products.append(product / max(size, 1e-300))
    return tuple(label[None] for label in torch.tensor(products).argsort(descending=True)[:MAX_LABELS_TRIED])


def _batch_labels(task: UpdateTask, images: Tensor) -> Tensor:
    """The label of every image (B,): Ḡ of the last layer is nearly Σ_b δz_b a_bᵀ with the a_b before the steps."""
    head = task.network.layers[-1]
    a = task.network.layer_inputs(images)[head.name].flatten(1)
    dz = torch.linalg.lstsq(a.T, task.update[head.weight_name].flatten(1).T).solution  # (B, C)
    return (dz[:, 0] < 0).long() if dz.shape[1] == 1 else dz.argmin(1)
