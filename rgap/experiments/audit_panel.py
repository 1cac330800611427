"""Notebook 08: a panel to try defences on a network by hand."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
from torch import Tensor, nn

from rgap import client
from rgap.attack.reconstruct import reconstruct
from rgap.data import load_images
from rgap.experiments.audit import (
    DEFENCES,
    Gradients,
    attackable,
    classes_of,
    defended,
    factor_of,
    fitting_loss,
    noise_of,
    strengths_of,
)
from rgap.experiments.common import timed
from rgap.metrics import psnr_db
from rgap.network.layer import Chain
from rgap.results import Reconstruction
from rgap.results.display import to_png

PICTURE_PIXELS = 256  # height of a picture in the panel, pixels


def controls(model: nn.Module | Chain, image_shape: tuple[int, int, int], **options) -> widgets.Widget | str:
    """The panel for a person at the notebook, or a line of text where a program runs it.

    Where a program runs the notebook (make sets RGAP_PROFILE) nobody moves a slider, and the state that a notebook
    stores of its controls is large and changes from run to run. Arguments are `AttackPanel`'s.
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
        self, model: nn.Module | Chain, image_shape: tuple[int, int, int], *, source: str = "embedded", index: int = 0,
        loss: str | None = None, defence: str = "gaussian_noise",
    ):  # fmt: skip
        """Builds the controls and attacks a network that `rgap.reconstruct` takes once.

        The first image, (C, H, W), is number `index` of the source, as `rgap.data.load_images` takes it; the loss is by
        default that of `fitting_loss`, and the first defence a name in `DEFENCES`.
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
