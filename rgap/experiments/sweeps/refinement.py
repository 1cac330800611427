"""What each part of the attack adds on a defended gradient, beside Inverting Gradients on the same one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.baselines import hybrid, inverting_gradients
from rgap.client import client_gradients
from rgap.experiments.sweeps.noise import defend, plain_attack
from rgap.metrics import psnr_db, ssim
from rgap.network.chain import Chain, prepare

STAGES = ("plain R-GAP", "+ signs", "+ noise found", "+ matching", "Inverting Gradients")
"""The recursion as it was; with signs decided by identities, for the noise that single values betray; with the noise
that surplus equations betray, which together is `reconstruct`; refined by gradient matching, `hybrid`; the opponent."""


def normal_weights(make_model: Callable[[int], nn.Module], std: float) -> Callable[[int], nn.Module]:
    """The same networks with every parameter drawn from N(0, std²)."""

    def make(seed: int) -> nn.Module:
        model = make_model(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, std, generator=generator)
        return model

    return make


def attack_stages(
    networks: Mapping[str, Callable[[int], nn.Module]],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    strengths: Mapping[str, Sequence],
    steps: int,
) -> tuple[pd.DataFrame, dict[tuple, Tensor]]:
    """Attacks each defended gradient by every one of `STAGES`; none is told the defence.

    Inverting Gradients and plain R-GAP are told the label, to their advantage.

    Args:
        networks: Name of a kind of weights -> seed -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1.
        seeds: Of the weights.
        strengths: Defence -> its strengths, as `rgap.experiments.sweeps.noise.defend` takes them; clipping apart, for
            it hides the brightness.
        steps: Most evaluations of gradient matching and of Inverting Gradients.

    Returns:
        A row an attack (weights, defence, strength, seed, image, method, psnr_db, ssim), and (weights, defence,
        strength, method) -> the images of the first seed.
    """
    rows, found = [], {}
    cases = [(name, strength) for name, values in strengths.items() for strength in values]
    runs = list(product(networks, seeds, range(len(images)), cases))
    for weights, seed, i, (defence, strength) in tqdm(runs, desc="stages", disable=not sys.stderr.isatty()):
        chain = prepare(networks[weights](seed), tuple(images.shape[1:]))
        image, label = images[i : i + 1], labels[i : i + 1]
        gradients = defend(client_gradients(chain.model, image, label), defence, strength, seed=i)
        for method, guess in _stages(chain, gradients, label, steps).items():
            row = {"weights": weights, "defence": defence, "strength": strength, "seed": seed, "image": i}
            quality = {"psnr_db": psnr_db(guess, image.double()), "ssim": ssim(guess.clamp(0, 1), image.double())}
            rows.append(row | {"method": method} | {name: value.item() for name, value in quality.items()})
            if seed == seeds[0]:
                found.setdefault((weights, defence, strength, method), []).append(guess)
    return pd.DataFrame(rows), {key: torch.cat(guesses) for key, guesses in found.items()}


def _stages(chain: Chain, gradients: Sequence[Tensor], label: Tensor, steps: int) -> dict[str, Tensor]:
    """The image of each stage, from network and gradient alone."""
    refined = hybrid(chain, gradients, steps=steps, dtype=torch.float32)
    opponent = inverting_gradients(chain, gradients, labels=label, steps=steps)
    images = [
        plain_attack(chain, gradients, int(label)),
        reconstruct(chain, gradients, noise_std=0.0).images,  # declared: no more than the values betray
        reconstruct(chain, gradients).images,
        refined.images,
        opponent.images,
    ]
    return dict(zip(STAGES, (image.double() for image in images), strict=True))
