"""Samples of the audit: random networks whose outcome the attack and the Jacobian must not contradict, and a zoo."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap import client
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.common import progress, seeded
from rgap.experiments.real_networks import RECOVERED_DB
from rgap.metrics import match, psnr_db
from rgap.models import trained_names
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import exposure
from rgap.ranks.largest_batch import largest_batch
from rgap.results import GradientMismatchError, UnsupportedLayerError

JACOBIAN_CUTOFF = 1e-12  # singular values of the Jacobian below this, relative to the largest, count as zero
JACOBIAN_CHUNK = 64  # columns of it that are computed at a time
ZOO_SHAPE = (3, 224, 224)  # image shape with which torchvision's networks are analysed
ZOO_SHAPES = {"inception_v3": (3, 299, 299)}  # the same of those that take no such images
MAX_ZOO_SECONDS = 20.0  # CPU seconds that the analysis of one network of the zoo may take
MAX_ZOO_GIGABYTES = 4.0  # largest memory that it may take, of its whole process
ZOO_MODELS = 80  # networks of the zoo in one sample

ANALYSE_ONE = """
import json, resource, sys, time
import torchvision
from rgap.ranks import rank_analysis
model = getattr(torchvision.models, sys.argv[1])()
start = time.process_time()
found = rank_analysis(model, tuple(json.loads(sys.argv[2])))
print(json.dumps({"seconds": time.process_time() - start, "sentence": found.verdict,
                  "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""
"""What analyses one network of the zoo, in a process of its own."""


class ChannelMean(nn.Module):
    """Mean over the channels, which no convolution undoes."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W)."""
        return x.mean(1)


def sample_audit(count: int = 200, seed: int = 0) -> pd.DataFrame:
    """Audits random networks, attacks them, and counts the rank of the gradient's Jacobian by the images.

    Convolutions and fully connected layers, pooling, means over channels, frozen layers, batches of up to four images.
    A row is not ok where the audit says that a network leaks, the attack does not recover its images, and the Jacobian
    lacks rank; where it says that it stops, and the attack is sure of the right images; or where it is so of a batch
    beyond the bound of `largest_batch`.

    The first network has the number `seed`, the next ones the next. Columns: case, batch, bound (of a batch), outcome,
    missing_share, jacobian_lacks, verdict, psnr_db, ok, why.
    """
    return pd.DataFrame([_audit_one(number) for number in progress(range(seed, seed + count), "networks")])


def sample_zoo(count: int = ZOO_MODELS, seed: int = 0) -> pd.DataFrame:
    """Analyses torchvision's classification networks, each in a process of its own: `count` names in chunk `seed`.

    Columns: case, verdict (the outcome), psnr_db (none), seconds (CPU), gigabytes (peak), ok, why (the sentence or
    error).
    """
    import torchvision  # seconds to import, and nothing else here needs it

    names = torchvision.models.list_models(module=torchvision.models)[seed * count : (seed + 1) * count]
    return pd.DataFrame([_analyse_one(name) for name in progress(names, "zoo")])


def random_audited(number: int) -> tuple[nn.Sequential, tuple[int, int, int], int, list[str]]:
    """A random float64 network in eval mode, its image shape, a batch size, and names of what is special about it."""
    rng = np.random.default_rng(number)
    shape = (int(rng.integers(1, 4)), *map(int, rng.integers(5, 9, 2)))
    modules, kinds, channels, bias = [], [], shape[0], bool(rng.random() < 0.5)
    size = min(shape[1:])
    kind = nn.Tanh if rng.random() < 0.3 else lambda: nn.LeakyReLU(0.2)
    batch = int(rng.choice([1, 1, 1, 2, 3, 4]))
    with seeded(number):
        for _ in range(rng.integers(0, 4)):
            width, kernel, stride = int(rng.integers(4, 25)), int(rng.integers(1, 5)), int(rng.integers(1, 3))
            modules += [nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=bias), kind()]
            channels, size = width, (size + 2 * (kernel // 2) - kernel) // stride + 1
            if rng.random() < 0.15 and size > 1:
                size -= 1
                modules.insert(len(modules) - int(rng.integers(0, 2)), nn.AvgPool2d(2, 1))
                kinds.append("pooling")
        if modules and rng.random() < 0.1:
            modules.append(ChannelMean())
            kinds.append("channel mean")
        modules.append(nn.Flatten())
        for _ in range(rng.integers(0, 3) + (batch > 1)):
            modules += [nn.LazyLinear(int(rng.integers(4, 60)), bias=bias), nn.LeakyReLU(0.2)]
        modules.append(nn.LazyLinear(int(rng.choice([1, 3, 6, 10])), bias=bias))
        network = nn.Sequential(*modules).double().eval()
        network(torch.zeros(1, *shape, dtype=torch.float64))  # lazy layers take their sizes
    weighted = [module for module in network if hasattr(module, "weight")]
    for module in weighted:
        if rng.random() < 0.12:
            module.requires_grad_(False)
            kinds.append("frozen")
    return network, shape, batch, kinds


def jacobian_lacks(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> int:
    """Pixels of a batch minus the rank of the Jacobian of the shared gradient by them."""
    named = dict(model.named_parameters())
    trained = {name: named[name].detach() for name in trained_names(model)}

    def shared(x: Tensor) -> Tensor:
        def value(parameters: dict[str, Tensor]) -> Tensor:
            return client.loss_value(loss, torch.func.functional_call(model, {**named, **parameters}, (x,)), labels)

        return torch.cat([g.flatten() for g in torch.func.grad(value)(trained).values()])

    def column(direction: Tensor) -> Tensor:
        return torch.func.jvp(shared, (images,), (direction,))[1]

    units = torch.eye(images.numel(), dtype=images.dtype).reshape(-1, *images.shape)
    J = torch.func.vmap(column, chunk_size=JACOBIAN_CHUNK)(units).detach()
    return images.numel() - int(torch.linalg.matrix_rank(J, rtol=JACOBIAN_CUTOFF))


def _audit_one(number: int) -> dict:
    model, shape, batch, kinds = random_audited(number)
    generator = torch.Generator().manual_seed(number)
    images = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    outputs = model[-1].out_features
    labels = torch.randint(max(2, outputs), (batch,), generator=generator)
    loss = "logistic" if outputs == 1 else "cross_entropy"
    found = exposure(rank_analysis(model, shape, batch, limit=0))
    verdict, quality = _attack(model, images, labels, loss)
    bound = _bound(model, shape, loss) if batch > 1 else math.inf
    lacks = jacobian_lacks(model, images, labels, loss)
    recovered = quality >= RECOVERED_DB and verdict in ("exact", "ambiguous")
    contradicted = {"leaks": lacks > 0 and not recovered, "stops": verdict == "exact" and recovered, "unknown": False}
    return {
        "case": f"network {number}: {batch} images{''.join(f', {kind}' for kind in sorted(set(kinds)))}",
        "batch": batch, "bound": bound, "outcome": found.outcome, "missing_share": found.missing_share,
        "jacobian_lacks": lacks, "verdict": verdict, "psnr_db": quality,
        "ok": not contradicted[found.outcome] and not (verdict == "exact" and recovered and batch > bound),
        "why": found.sentence,
    }  # fmt: skip


def _bound(model: nn.Module, shape: tuple[int, int, int], loss: str) -> float:
    """The batch size above which `largest_batch` excludes every recovery; infinite where it says nothing."""
    try:
        return largest_batch(model, shape, loss).bound
    except UnsupportedLayerError:
        return math.inf


def _attack(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> tuple[str, float]:
    """The attack's verdict and the smallest PSNR of an image, NaN where it refuses."""
    gradients = client.client_gradients(model, images, labels, loss)
    try:
        result = reconstruct(model, gradients, tuple(images.shape[1:]), loss, batch_size=len(images))
    except (UnsupportedLayerError, GradientMismatchError):
        return "refused", math.nan
    if len(images) == 1:
        found = result.candidates if result.verdict == "ambiguous" else result.candidates[:1]
        return result.verdict, max(psnr_db(c.images, images).item() for c in found)
    if len(result.images) < len(images):
        return result.verdict, math.nan
    return result.verdict, psnr_db(result.images, images[match(result.images, images)]).min().item()


def _analyse_one(name: str) -> dict:
    row = {"case": name, "verdict": "error", "psnr_db": math.nan, "seconds": math.nan, "gigabytes": math.nan}
    command = [sys.executable, "-c", ANALYSE_ONE, name, json.dumps(ZOO_SHAPES.get(name, ZOO_SHAPE))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10 * MAX_ZOO_SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"ok": False, "why": f"no answer in {10 * MAX_ZOO_SECONDS:.0f} s"}
    if run.returncode:
        return row | {"ok": False, "why": (run.stderr.strip() or "killed").splitlines()[-1]}
    found = json.loads(run.stdout.splitlines()[-1])
    row |= {"verdict": found["sentence"].partition(":")[0], "why": found.pop("sentence"), **found}
    return row | {"ok": row["seconds"] <= MAX_ZOO_SECONDS and row["gigabytes"] <= MAX_ZOO_GIGABYTES}
