"""Notebook 08: a network audited before any attack and then attacked, and a panel to try defences on it by hand."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from rgap import client
from rgap.attack.arguments import checked_network
from rgap.attack.reconstruct import reconstruct
from rgap.data import load_images
from rgap.display import to_png
from rgap.experiments.common import PALETTE, timed
from rgap.metrics import psnr_db
from rgap.network.layer import Chain
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import exposure
from rgap.results import Reconstruction

Gradients = Sequence[Tensor] | Mapping[str, Tensor]

CLIP_NORM = 1.0
"""Norm to which `clip_and_noise` clips here."""

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

AGREEING_VERDICTS = {"leaks": {"exact", "ambiguous"}, "stops": {"rank-deficient"}}
"""Outcome of the audit -> verdicts of the attack that agree with it."""

STATUS_WORDS = {
    "determined": "gives its input away",
    "closable": "gives its input away with the step before",
    "separated": "tells the images of the batch apart",
    "open": "stays open",
    "unknown": "whether it leaks is not known",
}

PICTURE_PIXELS = 256
"""Height of a picture in the panel, pixels."""


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
        A row for each network: network, outcome, missing (equations that the open step lacks beyond all that the step
        before it can add, 0 where none is open), verdict, psnr_db and agrees: "leaks" goes with "exact" and
        "ambiguous", "stops" with "rank-deficient".
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
    """Attacks one gradient under a defence of several strengths.

    Args:
        chain: The prepared network.
        gradients: As the client computed them.
        image: The truth, (1, C, H, W), for the PSNR alone.
        defence: A name in `DEFENCES`.
        strengths: As the defence takes them.
        **options: For `rgap.reconstruct`.

    Returns:
        A row for each strength (strength, verdict, psnr_db), and the images that were found, (N, C, H, W).
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
    """The gradient as it is shared under a defence.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        defence: A name in `DEFENCES`.
        strength: As the defence takes it; the first of its strengths there leaves the gradient as it is.

    Raises:
        ValueError: If the defence is unknown or the strength out of range.
    """
    none = strengths_of(defence)[0]
    return gradients if strength == none else DEFENCES[defence][0](gradients, strength)


def strengths_of(defence: str) -> tuple[float | str, ...]:
    """Strengths to choose from, the first of which leaves the gradient as it is.

    Args:
        defence: A name in `DEFENCES`.

    Raises:
        ValueError: If the defence is unknown.
    """
    if defence not in DEFENCES:
        raise ValueError(f"defence is {defence!r}; it must be one of {', '.join(DEFENCES)}")
    return DEFENCES[defence][1]


def factor_of(defence: str) -> float | None:
    """The factor of a defended gradient, for `gradient_scale`: unknown after clipping."""
    return None if defence == "clip_and_noise" else 1.0


def noise_of(defence: str, strength: float | str) -> float | None:
    """The standard deviation of the noise that an attacker who knows the defence expects on every entry; None without.

    Args:
        defence: A name in `DEFENCES`.
        strength: As for `defended`.
    """
    return float(strength) if defence == "gaussian_noise" and strength else None


def plot_audit(steps: pd.DataFrame) -> Figure:
    """Independent equations of every step as a share of its unknowns, from the image (top) to the output.

    Args:
        steps: Columns `name`, `kind`, `unknowns`, `deficit`, `supply` and `status`, as in
            `rgap.ranks.exposure.StepExposure`.

    Returns:
        The figure: what a step's own equations determine, what the step before can add, and what stays open; the
        numbers and the status stand beside each bar.
    """
    own, added, gap = sns.color_palette(PALETTE)[0], sns.color_palette(PALETTE)[1], "0.9"
    figure, axis = plt.subplots(figsize=(9.0, 1.3 + 0.34 * len(steps)))
    for place, step in enumerate(steps.itertuples()):
        known = not pd.isna(step.deficit)
        share = 1 - step.deficit / step.unknowns if known else 0.0
        closed = min(step.supply / step.unknowns, 1 - share) if known and not pd.isna(step.supply) else 0.0
        axis.barh(place, 100, color=gap if known else "white", edgecolor="0.6", lw=0.8, hatch="" if known else "..")
        axis.barh(place, 100 * share, color=own)
        axis.barh(place, 100 * closed, left=100 * share, color=added, hatch="///", edgecolor="white", lw=0)
        lack = f", {step.deficit:,} missing" if known and step.deficit else ""
        text = f"{step.unknowns:,} unknowns{lack}: {STATUS_WORDS[step.status]}"
        axis.text(102, place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(steps)), [f"{s.name}\n{s.kind}" for s in steps.itertuples()], fontsize=8)
    axis.set(xlim=(0, 100), xlabel="independent equations, % of the step's unknowns")
    axis.invert_yaxis()
    handles = [Patch(label="its own", color=own)]
    handles.append(Patch(label="from the step before", facecolor=added, hatch="///", edgecolor="white"))
    handles.append(Patch(label="missing", facecolor=gap, edgecolor="0.6"))
    if steps["deficit"].isna().any():
        handles.append(Patch(label="not known", facecolor="white", edgecolor="0.6", hatch=".."))
    axis.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    sns.despine(figure, left=True)
    figure.tight_layout()
    return figure


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


def controls(model: nn.Module | Chain, image_shape: tuple[int, int, int], **options) -> widgets.Widget | str:
    """The panel for a person at the notebook, or a line of text where a program runs it.

    Where a program runs the notebook (make sets RGAP_PROFILE) nobody moves a slider, and the state that a notebook
    stores of its controls is large and changes from run to run.

    Args:
        model: A network that `rgap.reconstruct` attacks, or its `Chain`.
        image_shape: (C, H, W) of one image.
        **options: For `AttackPanel`.
    """
    if os.environ.get("RGAP_PROFILE"):
        return "Open this notebook by `make lab` and run it there: controls appear in this place."
    return AttackPanel(model, image_shape, **options).widget


class AttackPanel:
    """An image, a defence with a slider, and the reconstruction beside the original.

    The attack gets the network and the gradient. The original, where there is one, is for the picture and the PSNR.

    Attributes:
        widget: What a notebook shows.
        origin, found: The pictures.
        status: The attack's verdict, PSNR, time and notes.
        place, defence, strength: The controls: which image, which defence, how much of it.
        image_file, gradient_file: Uploads: an image of the user's own, and a shared gradient.
        result: The last attack's outcome, None where it refused.
    """

    def __init__(
        self,
        model: nn.Module | Chain,
        image_shape: tuple[int, int, int],
        *,
        source: str = "embedded",
        index: int = 0,
        loss: str | None = None,
        defence: str = "gaussian_noise",
    ):
        """Builds the controls and attacks once.

        Args:
            model: A network that `rgap.reconstruct` attacks, or its `Chain`.
            image_shape: (C, H, W) of one image.
            source: Where images come from, as for `rgap.data.load_images`.
            index: The first image's place there.
            loss: The client's loss; by default that of `fitting_loss`.
            defence: The first defence, a name in `DEFENCES`.
        """
        strengths = _options(defence)
        self.chain, self.source = attackable(model, image_shape), source
        self.loss = loss or fitting_loss(self.chain)
        self.result: Reconstruction | None = None
        self._image: Tensor | None = None
        self._gradients: Gradients = []
        self.place = widgets.BoundedIntText(index, 0, 10**6, description="image")
        self.defence = widgets.Dropdown(options=list(DEFENCES), value=defence, description="defence")
        self.strength = widgets.SelectionSlider(
            options=strengths, description="strength", continuous_update=False, layout={"width": "28em"}
        )
        self.image_file = widgets.FileUpload(accept="image/*", description="own image")
        self.gradient_file = widgets.FileUpload(accept=".safetensors,.pt,.pth", description="own gradient")
        self.origin, self.found = (widgets.Image(format="png", height=PICTURE_PIXELS) for _ in range(2))
        self.status = widgets.HTML()
        pictures = [widgets.VBox([widgets.Label(text), picture]) for text, picture in
                    (("what the client has", self.origin), ("what the attack finds", self.found))]  # fmt: skip
        choose = widgets.HBox([self.place, self.image_file, self.gradient_file])
        protect = widgets.HBox([self.defence, self.strength])
        self.widget = widgets.VBox([choose, protect, widgets.HBox(pictures), self.status])
        for control, act in ((self.place, self._take_place), (self.image_file, self._take_image),
                             (self.gradient_file, self._take_gradients), (self.strength, self._attack)):  # fmt: skip
            control.observe(lambda _, act=act: self._guarded(act), "value")
        self.defence.observe(self._change_defence, "value")
        self._guarded(self._take_place)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Shows an error of the user's input in the panel."""
        try:
            act()
        except (ValueError, FileNotFoundError) as error:
            self.result, self.found.value = None, b""
            self.status.value = f"<b>refused</b>: {html.escape(str(error))}"

    def _change_defence(self, _) -> None:
        before = self.strength.value
        self.strength.options = _options(self.defence.value)  # the slider goes back to its first value
        if before == self.strength.value:  # and then reports no change
            self._guarded(self._attack)

    def _take_place(self) -> None:
        self._take(
            *load_images(
                self.source, image_shape=self.chain.image_shape, index=self.place.value, classes=classes_of(self.chain)
            )
        )

    def _take_image(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _stored(self.image_file, folder)
            self._take(*load_images(f"folder:{folder}", image_shape=self.chain.image_shape, index=0))

    def _take(self, image: Tensor, label: Tensor) -> None:
        """Makes an image the client's, and attacks."""
        self._image, self.origin.value = image, to_png(image[0], PICTURE_PIXELS)
        self._gradients = client.client_gradients(self.chain.model, image, label, loss=self.loss)
        self._attack()

    def _take_gradients(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._gradients = client.load_gradients(_stored(self.gradient_file, folder))
        self._image, self.origin.value = None, b""
        self._attack()

    def _attack(self) -> None:
        def attack():
            shared = defended(self._gradients, self.defence.value, self.strength.value)
            noise_std = noise_of(self.defence.value, self.strength.value)
            factor = None if self._image is None else factor_of(self.defence.value)
            return reconstruct(self.chain, shared, loss=self.loss, noise_std=noise_std, gradient_scale=factor)

        self.result, seconds = timed(attack)
        self.found.value = to_png(self.result.images[0], PICTURE_PIXELS)
        quality = ""
        if self._image is not None:
            quality = f", PSNR {psnr_db(self.result.images, self._image.to(self.result.images)).item():.1f} dB"
        notes = "".join(f"<br>{html.escape(note)}" for note in self.result.notes)
        self.status.value = f"<b>{self.result.verdict}</b>{quality}, {seconds:.2f} s{notes}"


def _options(defence: str) -> list[tuple[str, float | str]]:
    """A slider's steps: the text and the strength of each."""
    first, *others = strengths_of(defence)
    return [("none", first), *((s if isinstance(s, str) else f"{s:g}", s) for s in others)]


def _stored(upload: widgets.FileUpload, folder: str) -> Path:
    """The uploaded file, put into a folder under its own suffix."""
    file = upload.value[0]
    path = Path(folder) / f"upload{Path(file['name']).suffix.lower()}"
    path.write_bytes(file["content"])
    return path
