"""Kinds of clients: by the book, with coarse or altered gradients, and what else a server may get to see."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rgap import client, models
from rgap.client import LOSSES, client_gradients, gradients_of
from rgap.data import load_images
from rgap.experiments.common import seeded
from rgap.experiments.noise import root_mean_square
from rgap.experiments.random_networks import ACTIVATIONS

OUTSIDE = "pixels outside the range"  # the kind of client whose images were normalised, of which the attack is not told
SMOOTHINGS_DRAWN = (0.05, 0.1, 0.2)  # label smoothings of the clients


@dataclass(frozen=True)
class Case:
    """A network, an image and what the client does with them."""

    model: nn.Module  # in eval mode and the client's dtype
    images: Tensor  # of the batch, (B, C, H, W)
    labels: Tensor  # (B,)
    loss: str  # a name in `rgap.client.LOSSES`
    rng: np.random.Generator  # for what is drawn on the way

    def gradients(self, model: nn.Module | None = None) -> list[Tensor]:
        """The gradient of the mean loss, of this network or a changed one."""
        model = model or self.model
        dtype = next(model.parameters()).dtype
        return client_gradients(model, self.images.to(dtype), self.labels, self.loss)

    def log_uniform(self, low: float, high: float) -> float:
        """A number drawn uniformly on a logarithmic scale."""
        return float(np.exp(self.rng.uniform(math.log(low), math.log(high))))


@dataclass(frozen=True)
class Shared:
    """What a client shares."""

    gradients: Sequence[Tensor]  # one tensor for each parameter
    # options of `rgap.reconstruct` with what the attack is told
    told: Mapping[str, float] = field(default_factory=dict)
    # another image in the gradient, (1, C, H, W): where the network is linear between the two, a mean of them has this
    # very gradient, and counts as right
    second: Tensor | None = None


def _rounded(name: str) -> Callable[[Case], Shared]:
    return lambda case: Shared(client.quantise(case.gradients(), name))


def _half(case: Case) -> Shared:
    return Shared(
        case.gradients(copy.deepcopy(case.model).to(torch.bfloat16 if case.rng.random() < 0.5 else torch.half))
    )


def _pruned(case: Case) -> Shared:
    return Shared(client.prune(case.gradients(), case.rng.uniform(0.01, 0.3)))


def _noisy(case: Case, declared: bool = False) -> Shared:
    gradients = case.gradients()
    std = root_mean_square(gradients) * case.log_uniform(1e-7, 1e-2)
    noisy = client.gaussian_noise(gradients, std, int(case.rng.integers(2**31)))
    return Shared(noisy, {"noise_std": std} if declared else {})


def _tampered(case: Case) -> Shared:
    gradients = case.gradients()
    if case.rng.random() < 0.5:
        gradients = client.quantise(gradients, "float16")
    which = int(case.rng.integers(len(gradients)))
    gradients[which] = gradients[which] * (1 + case.log_uniform(1e-3, 0.3))
    return Shared(gradients)


def _averaged(case: Case) -> Shared:
    """Two images of one class as one."""
    other = _image(case.rng, case.images.shape[1:])
    second = torch.lerp(other, case.images, float(case.rng.choice([0.0, 0.5, 0.9, 0.99])))
    both = replace(case, images=torch.cat([case.images, second]), labels=case.labels.repeat(2))
    gradients = both.gradients()
    gradients = client.quantise(gradients, "float16") if case.rng.random() < 0.3 else gradients
    return Shared(gradients, second=second)


def _outdated(case: Case) -> Shared:
    """The client's weights differ a little from those that the attack is given."""
    size, model = case.log_uniform(1e-6, 1e-2), copy.deepcopy(case.model)
    with seeded(int(case.rng.integers(2**31))), torch.no_grad():
        for p in model.parameters():
            p.add_(size * p.square().mean().sqrt() * torch.randn_like(p))
    return Shared(case.gradients(model))


def _autocast(case: Case) -> Shared:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.model(case.images.to(next(case.model.parameters()).dtype))
    loss = client.loss_value(case.loss, outputs.float(), case.labels)
    return Shared(torch.autograd.grad(loss, list(case.model.parameters())))


def _scaled(factor: Callable[[Case], float]) -> Callable[[Case], Shared]:
    def share(case: Case) -> Shared:
        size = factor(case)
        return Shared([size * g for g in case.gradients()])

    return share


def _clipped(case: Case) -> Shared:
    gradients = case.gradients()
    norm = math.hypot(*(g.double().norm().item() for g in gradients))
    return Shared(client.clip_and_noise(gradients, norm * case.rng.uniform(0.1, 0.99), 0.0))


def _smoothed(case: Case) -> Shared:
    smoothing = float(case.rng.choice(SMOOTHINGS_DRAWN)) if case.loss == "cross_entropy" else 0.0
    values = next(case.model.parameters())
    shared = gradients_of(
        case.model, dict(case.model.named_parameters()), case.images.to(values), case.labels, case.loss,
        label_smoothing=smoothing,
    )  # fmt: skip
    return Shared(list(shared.values()))


CLIENTS: dict[str, Callable[[Case], Shared]] = {
    "clean": lambda case: Shared(case.gradients()),
    "float16": _rounded("float16"),
    "bfloat16": _rounded("bfloat16"),
    "computed in 16 bits": _half,
    "int8": _rounded("int8"),
    "pruned": _pruned,
    "noise": _noisy,
    "noise, declared": partial(_noisy, declared=True),
    "one tensor scaled": _tampered,
    "two images as one": _averaged,
    "other weights": _outdated,
    "autocast": _autocast,
}
"""Name -> what such a client shares, and what the attack is told of it."""


FACTOR_CLIENTS: dict[str, Callable[[Case], Shared]] = {
    "by the book": lambda case: Shared(case.gradients()),
    "accumulated": _scaled(lambda case: 1 / int(case.rng.integers(2, 33))),
    "summed": _scaled(lambda case: float(case.rng.integers(2, 129))),
    "class weight": _scaled(lambda case: case.log_uniform(0.2, 5.0)),
    "loss scaling": _scaled(lambda case: 2.0 ** int(case.rng.integers(8, 17))),
    "clipped": _clipped,
}
"""Clients whose gradient has a factor -> what they share."""

ALL_CLIENTS = FACTOR_CLIENTS | {
    "smoothed labels": _smoothed,
    OUTSIDE: lambda case: Shared(case.gradients()),
    "half precision": CLIENTS["computed in 16 bits"],
    "autocast": CLIENTS["autocast"],
    "weights one step old": CLIENTS["other weights"],
    "one tensor scaled": CLIENTS["one tensor scaled"],
    "two images as one": CLIENTS["two images as one"],
}
"""The same for all clients of this family."""


def random_case(rng: np.random.Generator) -> Case:
    """A network of one to four layers on 36 to 300 pixels, an image, and a label."""
    shape = (int(rng.choice([1, 3])), int(rng.integers(6, 11)), int(rng.integers(6, 11)))
    loss = str(rng.choice(LOSSES))
    outputs = {"logistic": 1, "cross_entropy": int(rng.integers(2, 8)), "mse": int(rng.integers(1, 5))}[loss]
    with seeded(int(rng.integers(2**31))):
        model = _network(rng, shape, outputs).to(torch.float64 if rng.random() < 0.2 else torch.float32).eval()
    with torch.no_grad():
        list(model.parameters())[-1 if rng.random() < 0.5 else 0].mul_(float(rng.choice([1.0, 1.0, 3.0, 10.0])))
    labels = torch.tensor([int(rng.integers(max(2, outputs)))])
    return Case(model, _image(rng, shape), labels, loss, rng)


def _network(rng: np.random.Generator, shape: Sequence[int], outputs: int) -> nn.Module:
    name, bias = str(rng.choice(list(ACTIVATIONS))), bool(rng.integers(2))
    name = name if rng.random() < 0.6 else "LeakyReLU"
    channels, modules, size = shape[0], [], list(shape[1:])
    for _ in range(int(rng.integers(0, 3))):
        stride = int(rng.integers(1, 3))
        wide = min(24, int(1.3 * channels * stride**2) + int(rng.integers(1, 4)))
        modules += [nn.Conv2d(channels, wide, 3, stride, 1, bias=bias), ACTIVATIONS[name]()]
        channels, size = wide, [(side - 1) // stride + 1 for side in size]
    modules.append(nn.Flatten())
    features = channels * math.prod(size)
    for _ in range(int(rng.integers(0 if len(modules) > 1 else 1, 3))):
        modules += [nn.Linear(features, features := int(rng.integers(10, 80)), bias=bias), ACTIVATIONS[name]()]
    return nn.Sequential(*modules, nn.Linear(features, outputs, bias=bias))


def _image(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """A noise image, a dark one with black pixels, or a smooth one."""
    pixels = torch.from_numpy(rng.random((1, *shape)))
    kind = rng.integers(3)
    if kind == 0:
        return pixels
    if kind == 1:
        return (2 * pixels - 1).clamp(min=0) ** 2
    return nn.functional.interpolate(pixels[..., :4, :4], shape[1:], mode="bilinear", align_corners=False)


def real_case(rng: np.random.Generator) -> Case:
    """LeNet with some weights, and an embedded image."""
    images, _ = load_images("embedded", image_shape=(3, 32, 32))
    image = images[int(rng.integers(len(images)))][None].double()
    model = models.lenet(int(rng.integers(100)), bias=bool(rng.integers(2)))
    return Case(model, image, torch.tensor([int(rng.integers(10))]), "cross_entropy", rng)
