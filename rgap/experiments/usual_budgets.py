"""Notebook 04: the optimisers at the budgets that they usually get, with restarts, beside the closed form."""

from __future__ import annotations

import time
from itertools import product

import pandas as pd

from rgap import data, models
from rgap.artifact.progress import progress
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import one_thread
from rgap.experiments.methods import OPTIMISERS
from rgap.metrics import psnr_db

USUAL_STEPS = {"DLG": 6000, "Inverting Gradients": 4800}
"""DLG: 300 steps of L-BFGS with up to 20 evaluations each; Inverting Gradients: 4,800 steps of Adam."""

USUAL_RESTARTS = 2  # starts of each; the one with the smallest distance between gradients counts

NETWORKS = ("cnn6", "cnn6_d", "fcn3")


def sample_opponents(count: int = 24, seed: int = 0) -> pd.DataFrame:
    """Optimisers at their usual budgets and the closed form on the same gradients, float32, labels told to the former.

    Case n is image n // 6 through one network by one optimiser, so that chunks run side by side; the first is `seed`.
    Columns: case, network, method, image, steps, restarts, psnr_db (the optimiser's), ours_db, ours_verdict, seconds,
    verdict, ok (the closed form's image is the better one), why.
    """
    rows = []
    kinds = list(product(NETWORKS, OPTIMISERS))
    for number in progress(range(seed, seed + count), "opponents"):
        image_number, (name, method) = number // len(kinds), kinds[number % len(kinds)]
        rows.append(_beside(name, method, image_number, USUAL_STEPS[method], USUAL_RESTARTS))
    return pd.DataFrame(rows)


def _beside(name: str, method: str, index: int, steps: int, restarts: int) -> dict:
    """One optimiser and the closed form on one gradient."""
    shape, model = models.IMAGE_SHAPES[name], getattr(models, name)()
    image, label = data.load_images("embedded", image_shape=shape, index=[index], classes=2)
    gradients = client_gradients(model, image, label)
    with one_thread():
        start = time.perf_counter()
        rival = OPTIMISERS[method](model, gradients, shape, labels=label, steps=steps, restarts=restarts)
        seconds = time.perf_counter() - start
        ours = reconstruct(model, gradients, shape, effort="full", gradient_scale=1.0)
    theirs_db, ours_db = (psnr_db(found.images.double(), image.double()).item() for found in (rival, ours))
    row = {"case": f"{name}, image {index}, {method}", "network": name, "method": method, "image": index}
    row |= {"steps": steps, "restarts": restarts, "psnr_db": theirs_db, "ours_db": ours_db}
    row |= {"ours_verdict": ours.verdict, "seconds": seconds, "verdict": rival.verdict, "ok": ours_db > theirs_db}
    return {**row, "why": "" if row["ok"] else "the optimiser's image is the better one"}
