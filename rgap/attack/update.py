"""An update of several local steps, its simulation, and the images that its first layer gives whatever the steps were.

Units with kinks may flip between the steps: they are then positive for a part of them, and have mean slopes (ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rgap.client import LocalTraining, UpdateGradients, gradients_of
from rgap.linalg import distance, norm
from rgap.network.layer import Chain
from rgap.results import GradientMismatchError, LayerReport, PixelRange
from rgap.shared_gradient import FLOAT64_FLOOR, receive
from rgap.tokens import PatchEmbedding, reconstruct_tokens

UNIT_AGREEMENT = 20.0  # standard deviations within which two units show the same image
MIN_UNIT_SHARE = 1e-6  # smallest bias gradient of a unit that is looked at, relative to the largest
RANDOM_PROJECTIONS = 64  # random projections of the units' images that are compared with each other
MAX_CLASSES = 100  # classes up to which the gradient of an image with each label is computed
MAX_LABELS_TRIED = 5  # most labels with which an image is run through the client's steps
REACH_FACTOR = 1.5  # multiple of what a unit moves in the simulation up to which it may have moved
MAX_SETTLED_UNITS = 12  # units about which two patterns may disagree for each of them to be decided by a simulation


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
        start, kept, total = self.weights(dtype), self.training.coefficients[0], self.training.total
        end = self.training.run(self.network.model, start, images, labels, self.loss)
        return {n: (w.double() - end[n].double() - (1 - kept) * w.double()) / total for n, w in start.items()}

    def drift(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """How far Ḡ of these images is from their gradient at the weights that were sent out."""
        gradient = gradients_of(self.network.model, self.weights(), images, labels, self.loss)
        return {name: g - gradient[name] for name, g in self.simulate(images, labels).items()}

    def miss(self, mean: Mapping[str, Tensor]) -> float:
        """How far a mean gradient is from Ḡ: the root of the parameters' squared relative misses."""
        return math.hypot(*(distance(mean[name], g) / max(norm(g), 1e-300) for name, g in self.update.items()))


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
    given = {"batch_size": task.batch_size, "labels": task.labels, "pixel_range": (task.pixels.low, task.pixels.high)}
    result = reconstruct_tokens(task.network, task.update, task.loss, virtual_constraints=False, **given)
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
    short = f"{len(groups)} images of {task.batch_size} show in two units or more that each of them moves alone"
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
    labels = likely_labels(task, x) if task.batch_size == 1 and task.labels is None else (_labels(task, x),)
    return FoundImages(x, labels, error, (report,), () if len(groups) == task.batch_size else (short,))


def _agreeing_units(G: Tensor, h: Tensor, G_std: Tensor, h_std: Tensor, seed: int) -> list[Tensor]:
    """Groups of two units or more with the same Ḡ_j / h̄_j to within their errors, the largest group first."""
    units = (h.abs() > MIN_UNIT_SHARE * h.abs().max()).nonzero()[:, 0]
    x = G[units] / h[units, None]
    std = (G_std[units].square() + (x * h_std[units, None]).square()).mean(1).sqrt() / h[units].abs()
    generator = torch.Generator().manual_seed(seed)
    seen = x @ torch.randn(x.shape[1], RANDOM_PROJECTIONS, generator=generator, dtype=x.dtype)  # √n large in each entry
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
    cosines = []
    for label in torch.arange(classes):
        mine = gradients_of(task.network.model, start, image, label[None], task.loss)
        size = math.hypot(*(mine[n].norm().item() for n in task.update))
        cosines.append(sum((mine[n] * g).sum().item() for n, g in task.update.items()) / max(size, 1e-300))
    return tuple(label[None] for label in torch.tensor(cosines).argsort(descending=True)[:MAX_LABELS_TRIED])


def _labels(task: UpdateTask, images: Tensor) -> Tensor:
    """Every image's label (B,), as given, or as Ḡ of the last layer is nearly Σ_b δz_b a_bᵀ, a_b before the steps."""
    if task.labels is not None and len(images) == task.batch_size:
        return torch.as_tensor(task.labels)
    head = task.network.layers[-1]
    a = task.network.layer_inputs(images)[head.name].flatten(1)
    dz = torch.linalg.lstsq(a.T, task.update[head.weight_name].flatten(1).T).solution  # (B, C)
    return (dz[:, 0] < 0).long() if dz.shape[1] == 1 else dz.argmin(1)


@dataclass(frozen=True)
class KinkedSteps:
    """Simulated steps, and for every call of LeakyReLU in a forward pass what its outputs (k, B, …) do."""

    mean: Mapping[str, Tensor]  # Ḡ
    positive: list[Tensor]  # 1 where a unit is positive at a step, else 0
    reach: list[Tensor]  # how far a unit may move from the middle of its path, (B, …)


def simulated_steps(task: UpdateTask, image: Tensor, label: Tensor, shares: Sequence[Tensor]) -> list[KinkedSteps]:
    """The client's steps with an image, and once more on a pattern of which the `shares` of the steps are known.

    Of a unit that flips the steps are positive at which it is largest.
    """
    with _KinkSlopes() as slopes:
        mean = task.simulate(image, label)
    calls = len(slopes.outputs) // task.training.steps
    paths = [torch.stack(slopes.outputs[i::calls]) for i in range(calls)]
    reach = [REACH_FACTOR * (path.amax(0) - path.amin(0)) / 2 for path in paths]
    found = [KinkedSteps(mean, [(path > 0).to(path.dtype) for path in paths], reach)]
    if paths and [path[0].numel() for path in paths] == [share.numel() for share in shares]:
        positive = [
            _largest(path, path.new_tensor(task.training.shares), share)
            for path, share in zip(paths, shares, strict=True)
        ]
        found.append(_on_pattern(task, image, label, KinkedSteps(mean, positive, reach)))
    return found


def _on_pattern(task: UpdateTask, image: Tensor, label: Tensor, steps: KinkedSteps) -> KinkedSteps:
    """The client's steps where units are positive as they are in others."""
    with _KinkSlopes([one[step] for step in range(task.training.steps) for one in steps.positive]):
        return replace(steps, mean=task.simulate(image, label))


def settled_steps(
    task: UpdateTask, image: Tensor, label: Tensor, first: KinkedSteps, second: KinkedSteps
) -> KinkedSteps:
    """Steps on the first pattern with those units as in the second that bring the simulation closer, one by one."""
    pairs = list(zip(first.positive, second.positive, strict=True))
    units = [(i, unit) for i, (a, b) in enumerate(pairs) for unit in (a != b).any(0).nonzero().tolist()]
    for i, unit in units if len(units) <= MAX_SETTLED_UNITS else []:
        positive, at = list(first.positive), (slice(None), *unit)
        positive[i] = positive[i].clone()
        positive[i][at] = second.positive[i][at]
        trial = _on_pattern(task, image, label, replace(first, positive=positive))
        if task.miss(trial.mean) < task.miss(first.mean):
            first = trial
    return first


def _largest(path: Tensor, weights: Tensor, share: Tensor) -> Tensor:
    """1 at the steps at which a unit is largest, up to its share of the weights; path (k, B, …)."""
    order = path.argsort(0, descending=True)
    each = weights[order]
    chosen = each.cumsum(0) - each / 2 < share.reshape(path.shape[1:])
    return torch.zeros_like(path).scatter(0, order, chosen.to(path.dtype))


def mean_gradient(
    task: UpdateTask, parameters: Mapping[str, Tensor], image: Tensor, label: Tensor, positive: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradient at other parameters, with the units' mean slopes over steps at which they are `positive`."""
    with _KinkSlopes([torch.tensordot(one.new_tensor(task.training.shares), one, 1) for one in positive]):
        return gradients_of(task.network.model, parameters, image, label, task.loss)


class _KinkSlopes(TorchFunctionMode):
    """Records the outputs of every LeakyReLU; given `shares`, it gives one call after the other a pattern.

    With share 1 or 0 a unit has the upper or lower piece; in between its value stays, and its slope is the mean.
    """

    def __init__(self, shares: Sequence[Tensor] = ()):
        super().__init__()
        self.outputs, self.shares = [], iter(shares)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs the function, a LeakyReLU with the slopes given."""
        y = func(*args, **(kwargs or {}))
        if func is not F.leaky_relu:
            return y
        self.outputs.append(y.detach())
        share = next(self.shares, None)
        if share is None:
            return y
        slope = args[1] if len(args) > 1 else (kwargs or {}).get("negative_slope", 0.01)
        mean = torch.lerp(torch.full_like(share, slope), torch.ones_like(share), share)
        factor = mean / torch.where(y > 0, 1.0, slope)
        flips = (share > 0) & (share < 1)
        return torch.where(flips, y + (factor - 1) * (y - y.detach()), factor * y)
