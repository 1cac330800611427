"""Rank laws proved shape by shape: the table in the package that the audit reads, and a sample of random layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from rgap import equations, models
from rgap.artifact.outputs import write_atomically
from rgap.artifact.progress import progress
from rgap.equations.proofs import PROOF_TABLE, LayerShape, elimination_work, rank_bounds
from rgap.experiments.ranks import random_convolution
from rgap.network.tracing import trace
from rgap.ranks.ranking import layer_shape
from rgap.ranks.steps import counted_steps

MAX_PROOF_WORK = 6e11  # multiplications up to which a shape is tried: about a minute, and 3 GiB

TORCHVISION = ("alexnet", "mobilenet_v2", "resnet18", "resnet152", "vgg16")


def layer_shapes(networks: Mapping[str, tuple[nn.Module, tuple]], batch_sizes: Sequence[int]) -> list[LayerShape]:
    """Every shape of a layer with weights, once, the least work first; shapes without laws are left out.

    Networks are name -> the network and the image shape that it takes.
    """
    found: set = set()
    for model, image_shape in networks.values():
        for step in counted_steps(trace(model, image_shape)):
            modules = [step.weights[0]] if step.kind in {"convolution", "linear"} else []
            found |= {layer_shape(module, step.input_shape, batch)[0] for module in modules for batch in batch_sizes}
    return sorted((s for s in found - {None} if None not in s.laws()), key=elimination_work)


def table_shapes() -> list[LayerShape]:
    """The shapes of this package's networks in batches of notebook 02, and of torchvision's at 224 pixels."""
    own = {name: (getattr(models, name)(), shape) for name, shape in models.ANALYSIS_SHAPES.items()}
    own["cut"] = models.resnet18(cut=models.RESNET18_BLOCKS), (3, 32, 32)
    own["vgg16"] = models.load_model("torchvision.models:vgg16")[0], (3, 32, 32)
    others = {name: (models.load_model(f"torchvision.models:{name}")[0], (3, 224, 224)) for name in TORCHVISION}
    return sorted({*layer_shapes(own, (1, 4, 16)), *layer_shapes(others, (1,))}, key=elimination_work)


def prove(shapes: Iterable[LayerShape], most_work: float = MAX_PROOF_WORK, seed: int = 0) -> pd.DataFrame:
    """The shapes whose laws are proved by elimination, and not for every shape: shape, weights, gradients, both."""
    open_ = [s for s in shapes if None in s.laws(tested=False) and elimination_work(s) <= most_work]
    proved = [shape for shape in progress(open_, "shapes") if rank_bounds(shape, seed) == shape.laws()]
    rows = [(shape.text, *shape.laws()) for shape in proved]
    return pd.DataFrame(rows, columns=["shape", "weights", "gradients", "both"])


def write_proofs(most_work: float = MAX_PROOF_WORK) -> Path:
    """Proves what `table_shapes` has, and writes the table that `rgap.equations.proofs.is_proved` reads."""
    text = prove(table_shapes(), most_work).to_csv(index=False, lineterminator="\n")
    path = Path(equations.__file__).with_name(PROOF_TABLE)
    return write_atomically(path, lambda file: file.write(text.encode()))


def sample_rank_proofs(count: int = 500, seed: int = 0) -> pd.DataFrame:
    """Random convolutions: the laws that the rank modulo a prime reaches are proved; one below it would be wrong.

    Columns: case (the shape), verdict ("proved", "open", or "refuted": a bound above a law), psnr_db (NaN), ok, why.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in progress(range(count), "rank laws"):
        shape, _ = layer_shape(*random_convolution(rng, 2000), 1 + number % 3)
        pairs = [pair for pair in zip(rank_bounds(shape, seed), shape.laws(), strict=True) if pair[1] is not None]
        refuted = any(bound > law for bound, law in pairs)
        verdict = "refuted" if refuted else "proved" if all(bound == law for bound, law in pairs) else "open"
        why = "" if verdict == "proved" else f"bounds and laws {pairs}"
        rows.append({"case": shape.text, "verdict": verdict, "psnr_db": np.nan, "ok": verdict == "proved", "why": why})
    return pd.DataFrame(rows)
