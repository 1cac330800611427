"""What an attack costs as images and networks grow, beside one pass forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from rgap import models
from rgap.attack import reconstruct
from rgap.baselines import dlg
from rgap.chain import prepare
from rgap.client import client_gradients
from rgap.sweeps.methods import one_thread

FLOOR, CLOSED, STEP = "forward and backward", "R-GAP", "one step of DLG"


SLOW = 2.0
"""Seconds above which a call is not timed again."""


def cnn6_for(side: int) -> nn.Module:
    """CNN6 with a last layer that fits square images of another side."""
    model = models.cnn6()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        features = model[:-1](torch.zeros(1, 3, side, side)).shape[1]
        model[-1] = nn.Linear(features, 1, bias=False)
    return model


def costs(sides: Sequence[int], widths: Sequence[int]) -> pd.DataFrame:
    """Seconds of one attack, one pass and one step of DLG, each with one thread.

    Args:
        sides: Sides of square images through CNN6.
        widths: Widths of the first hidden layer of FCN3.

    Returns:
        Columns network, against ("side" or "width"), value, method, seconds (the fastest of several runs, of the
        closed form on a prepared chain; the only run where it takes more than two seconds).
    """
    cases = [("cnn6", "side", side, partial(cnn6_for, side), (3, side, side)) for side in sides]
    cases += [("fcn3", "width", w, partial(models.fcn3, widths=(w, 100)), (1, 28, 28)) for w in widths]
    rows = []
    for network, against, value, make, shape in cases:
        with one_thread():
            seconds = _seconds(make(), shape)
        rows += [{"network": network, "against": against, "value": value, "method": m, "seconds": s}
                 for m, s in seconds.items()]  # fmt: skip
    return pd.DataFrame(rows)


def _seconds(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, float]:
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    label, chain = torch.tensor([0]), prepare(model, shape)
    gradients = client_gradients(model, image, label)
    return {
        FLOOR: _fastest(lambda: client_gradients(model, image, label), 5),
        CLOSED: _fastest(lambda: reconstruct(chain, gradients), 2),
        STEP: dlg(model, gradients, shape, labels=label, steps=8).history["seconds"].diff().min(),
    }


def _fastest(call: Callable[[], object], times: int) -> float:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spans.append(time.perf_counter() - start)
        if spans[-1] > SLOW:
            break
    return min(spans)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Slopes of log seconds against log value, for each network and method.

    Args:
        table: As from `costs`, with at least two values of each.

    Returns:
        Columns network, against, method, exponent.
    """
    rows = [
        (*key, np.polyfit(np.log(group["value"]), np.log(group["seconds"]), 1)[0])
        for key, group in table.groupby(["network", "against", "method"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["network", "against", "method", "exponent"])
