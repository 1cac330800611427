"""What the audit says before any attack, beside what the attack then finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.defence_menu import Gradients, defended, noise_of
from rgap.metrics import psnr_db
from rgap.network.layer import Chain
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import exposure

VERDICTS = {"leaks": {"exact", "ambiguous"}, "stops": {"rank-deficient"}}
"""Outcome of the audit -> verdicts of the attack that agree with it."""


def audited_and_attacked(
    networks: Mapping[str, nn.Module], image: Tensor, label: Tensor, loss: str = "logistic", **options
) -> pd.DataFrame:
    """Audits every network from its shapes alone, then attacks it.

    Args:
        networks: Name -> network; all take the image's shape.
        image: (1, C, H, W) in [0, 1].
        label: (1,).
        loss: The client's loss.
        **options: For `rgap.reconstruct`.

    Returns:
        A row for each network: network, outcome, missing (what the open step lacks beyond the supply of the step before
        it, 0 where none is open), verdict, psnr_db and agrees: "leaks" goes with "exact" and "ambiguous", "stops" with
        "rank-deficient".
    """
    rows = []
    for name, model in networks.items():
        found = exposure(rank_analysis(model, tuple(image.shape[1:]), limit=0))
        missing = sum(step.deficit - step.supply for step in found.steps if step.status == "open")
        gradients = client_gradients(model, image, label, loss=loss)
        result = reconstruct(model, gradients, tuple(image.shape[1:]), loss, **options)
        psnr = psnr_db(result.images, image.double()).item()
        rows.append({"network": name, "outcome": found.outcome, "missing": missing, "verdict": result.verdict})
        rows[-1] |= {"psnr_db": psnr, "agrees": result.verdict in VERDICTS.get(found.outcome, ())}
    return pd.DataFrame(rows)


def attacks_under_defence(
    chain: Chain, gradients: Gradients, image: Tensor, defence: str, strengths: Sequence[float | str], **options
) -> tuple[pd.DataFrame, Tensor]:
    """Attacks one gradient under a defence of several strengths.

    Args:
        chain: The prepared network.
        gradients: As the client computed them.
        image: The truth, (1, C, H, W), for the PSNR alone.
        defence: A name in `rgap.experiments.defence_menu.DEFENCES`.
        strengths: What the defence takes.
        **options: For `rgap.reconstruct`.

    Returns:
        A row for each strength (strength, verdict, psnr_db), and the images that were found, (N, C, H, W).
    """
    rows, found = [], []
    for strength in strengths:
        shared = defended(gradients, defence, strength)
        result = reconstruct(chain, shared, noise_std=noise_of(defence, strength), **options)
        psnr = psnr_db(result.images, image.double()).item()
        rows.append({"strength": strength, "verdict": result.verdict, "psnr_db": psnr})
        found.append(result.images)
    return pd.DataFrame(rows), torch.cat(found)
