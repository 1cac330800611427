"""Notebook 08: a network audited before any attack and then attacked, without a defence and behind several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from rgap import client
from rgap.attack.arguments import checked_network
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.drawing import NAME_POINTS, PALETTE, finish, step_labels
from rgap.metrics import psnr_db
from rgap.network.layer import Chain
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import exposure

Gradients = Sequence[Tensor] | Mapping[str, Tensor]

CLIP_NORM = 1.0  # norm to which `clip_and_noise` clips here

NOISE_STRENGTHS = (0, 1e-10, 1e-9, 3e-9, 1e-8, 3e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)

DEFENCES: dict[str, tuple[Callable[[Gradients, float | str], Gradients], tuple[float | str, ...]]] = {
    "gaussian_noise": (lambda gradients, std: client.gaussian_noise(gradients, std), NOISE_STRENGTHS),
    "clip_and_noise": (
        lambda gradients, multiplier: client.clip_and_noise(gradients, CLIP_NORM, multiplier),
        NOISE_STRENGTHS,
    ),
    "prune": (client.prune, (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)),
    "quantise": (client.quantise, ("float32", "float16", "bfloat16", "int8")),
}
"""Name of a function in `rgap.client` -> it as a function of gradients and strength, and strengths to choose from.

The first strength leaves the gradient as it is. Strengths are the standard deviation, the noise multiplier at the
clipping norm `CLIP_NORM`, the share of entries that are pruned, and the format.
"""

AGREEING_VERDICTS = {"leaks": {"exact", "ambiguous"}, "stops": {"rank-deficient"}}  # outcome -> verdicts that agree

STATUS_WORDS = {
    "determined": "gives its input away",
    "closable": "gives its input away with the step before",
    "separated": "tells the images of the batch apart",
    "open": "stays open",
    "unknown": "whether it leaks is not known",
}


BLUE, ORANGE = sns.color_palette(PALETTE, 2)
BAR_STYLES = {
    "its own": {"color": BLUE},
    "from the step before": {"facecolor": ORANGE, "hatch": "///", "edgecolor": "white"},
    "missing": {"facecolor": "0.9", "edgecolor": "0.6"},
    "not known": {"facecolor": "white", "edgecolor": "0.6", "hatch": ".."},
}
"""Part of a step's equations -> how its bar is drawn."""


def audited_and_attacked(
    networks: Mapping[str, nn.Module], image: Tensor, label: Tensor, loss: str = "logistic", **options
) -> pd.DataFrame:
    """Audits every network (name -> network) from its shapes alone, then attacks a gradient of one image (1, C, H, W).

    Returns a row for each network: network, outcome, missing (equations that the open step lacks beyond all that the
    step before it can add, 0 where none is open), verdict, psnr_db and agrees: "leaks" goes with "exact" and
    "ambiguous", "stops" with "rank-deficient". Options are `reconstruct`'s.
    """
    rows = []
    for name, model in networks.items():
        found = exposure(rank_analysis(model, tuple(image.shape[1:]), limit=0))
        missing = sum(step.deficit - step.supply for step in found.steps if step.status == "open")
        gradients = client.client_gradients(model, image, label, loss=loss)
        result = reconstruct(
            model, gradients, tuple(image.shape[1:]), loss, effort="full", **{"gradient_scale": 1.0} | options
        )
        psnr = psnr_db(result.images, image.double()).item()
        rows.append({"network": name, "outcome": found.outcome, "missing": missing, "verdict": result.verdict})
        rows[-1] |= {"psnr_db": psnr, "agrees": result.verdict in AGREEING_VERDICTS.get(found.outcome, ())}
    return pd.DataFrame(rows)


def attacks_under_defence(
    chain: Chain, gradients: Gradients, image: Tensor, defence: str, strengths: Sequence[float | str], **options
) -> tuple[pd.DataFrame, Tensor]:
    """Attacks one gradient under a defence in `DEFENCES` of several strengths; the image is for the PSNR alone.

    Returns a row for each strength (strength, verdict, psnr_db), and the images that were found, (N, C, H, W). Options
    are `reconstruct`'s.
    """
    rows, found = [], []
    for strength in strengths:
        shared = defended(gradients, defence, strength)
        known = {"noise_std": noise_of(defence, strength), "gradient_scale": factor_of(defence)}
        result = reconstruct(chain, shared, effort="full", **known, **options)
        psnr = psnr_db(result.images, image.double()).item()
        rows.append({"strength": strength, "verdict": result.verdict, "psnr_db": psnr})
        found.append(result.images)
    return pd.DataFrame(rows), torch.cat(found)


def defended(gradients: Gradients, defence: str, strength: float | str) -> Gradients:
    """The gradient as it is shared under a defence, a name in `DEFENCES`; its first strength there changes nothing.

    Raises ValueError if the defence is unknown or the strength out of range.
    """
    none = strengths_of(defence)[0]
    return gradients if strength == none else DEFENCES[defence][0](gradients, strength)


def strengths_of(defence: str) -> tuple[float | str, ...]:
    """Strengths of a defence in `DEFENCES`, the first of which changes nothing; ValueError for another name."""
    if defence not in DEFENCES:
        raise ValueError(f"defence is {defence!r}; it must be one of {', '.join(DEFENCES)}")
    return DEFENCES[defence][1]


def factor_of(defence: str) -> float | None:
    """The factor of a defended gradient, for `gradient_scale`: unknown after clipping."""
    return None if defence == "clip_and_noise" else 1.0


def noise_of(defence: str, strength: float | str) -> float | None:
    """Standard deviation of the noise that an attacker who knows the defence expects on every entry; or None."""
    return float(strength) if defence == "gaussian_noise" and strength else None


def plot_audit(networks: Mapping[str, pd.DataFrame]) -> Figure:
    """Independent equations of every step as a share of its unknowns, from the image (top) to the output.

    A panel for each entry, title -> columns `name`, `kind`, `unknowns`, `deficit`, `supply` and `status`, as in
    `rgap.ranks.exposure.StepExposure`: what a step's own equations determine, what the step before can add, and what
    stays open; the numbers and the status stand beside each bar.
    """
    counts = [len(steps) for steps in networks.values()]
    figure, axes = plt.subplots(len(networks), 1, figsize=(8.4, sum(0.7 + 0.27 * count for count in counts)),
                                squeeze=False, sharex=True, height_ratios=counts)  # fmt: skip
    for axis, (title, steps) in zip(axes[:, 0], networks.items(), strict=True):
        for place, step in enumerate(steps.itertuples()):
            _bar(axis, place, step)
        labels = step_labels(dict(zip(steps["name"], steps["kind"], strict=True)))
        axis.set_yticks(range(len(steps)), labels.values(), fontsize=NAME_POINTS)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set(xlim=(0, 100))
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("independent equations, % of the step's unknowns")
    handles = [Patch(label=label, **style) for label, style in BAR_STYLES.items()]
    if not any(steps["deficit"].isna().any() for steps in networks.values()):
        handles.pop()
    place = {"loc": "lower left", "bbox_to_anchor": (0.3, 1.0), "borderaxespad": 0.2}
    axes[0, 0].legend(handles=handles, ncols=len(handles), frameon=False, fontsize=NAME_POINTS, **place)
    return finish(figure, grid=None)


def _bar(axis: Axes, place: int, step) -> None:
    """One step's equations, with its numbers and its status beside it."""
    own, added, gap, hidden = BAR_STYLES.values()
    known = not pd.isna(step.deficit)
    share = 1 - step.deficit / step.unknowns if known else 0.0
    closed = min(step.supply / step.unknowns, 1 - share) if known and not pd.isna(step.supply) else 0.0
    axis.barh(place, 100, lw=0.8, **(gap if known else hidden))
    axis.barh(place, 100 * share, **own)
    axis.barh(place, 100 * closed, left=100 * share, lw=0, **added)
    lack = f", {step.deficit:,} missing" if known and step.deficit else ""
    text = f"{step.unknowns:,} unknowns{lack}: {STATUS_WORDS[step.status]}"
    axis.text(101, place, text, va="center", fontsize=NAME_POINTS)


def attackable(model: nn.Module, image_shape: Sequence[int]):
    """The network as `rgap.reconstruct` attacks it: prepared once, a chain, a transformer or a residual network."""
    return checked_network(model, tuple(image_shape))


def _outputs(network) -> int:
    """Outputs of a network that was prepared."""
    if isinstance(network, Chain):
        return network.layers[-1].output_shape[0]
    weight = next(network.model.parameters())
    with torch.no_grad():
        return network.model(weight.new_zeros(1, *network.image_shape)).shape[-1]


def classes_of(network) -> int | None:
    """`classes` for `rgap.data.load_images`: 2 for a network with one or two outputs, None for several."""
    return 2 if _outputs(network) <= 2 else None


def fitting_loss(network) -> str:
    """The loss that fits a network's outputs, as on the command line: logistic for one, cross-entropy for several."""
    return "logistic" if _outputs(network) == 1 else "cross_entropy"
