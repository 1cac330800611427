"""Controls for a notebook: an image, a defence with a slider, and what the attack makes of the gradient so shared.

Where a program runs the notebook (make sets RGAP_PROFILE) there is nobody to move a slider, and what would be kept of
the controls' state is large and changes from run to run: `controls` then returns a line of text in their place.
"""

from __future__ import annotations

import html
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image
from torch import Tensor, nn

from rgap import client
from rgap.attack.reconstruct import reconstruct
from rgap.data import load_images
from rgap.experiments.defence_menu import DEFENCES, Gradients, defended, noise_of, strengths_of
from rgap.metrics import psnr_db
from rgap.network.chain import Chain, prepare
from rgap.results import Reconstruction

SIDE = 256
"""Height of a picture on the screen, pixels."""


def controls(model: nn.Module | Chain, image_shape: tuple[int, int, int], **options) -> widgets.Widget | str:
    """The panel for a person at the notebook, or a line of text where a program runs it.

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
        status: What the attack says, in words.
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
        loss: str = "logistic",
        defence: str = "gaussian_noise",
    ):
        """Builds the controls and attacks once.

        Args:
            model: A network that `rgap.reconstruct` attacks, or its `Chain`.
            image_shape: (C, H, W) of one image.
            source: Where images come from, as for `rgap.data.load_images`.
            index: The first image's place there.
            loss: The client's loss.
            defence: The first defence, a name in `DEFENCES`.
        """
        strengths = _options(defence)
        self.chain, self.loss, self.source = prepare(model, image_shape), loss, source
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
        self.origin, self.found = (widgets.Image(format="png", height=SIDE) for _ in range(2))
        self.status = widgets.HTML()
        pictures = [widgets.VBox([widgets.Label(text), picture]) for text, picture in
                    (("what the client has", self.origin), ("what the attack finds", self.found))]  # fmt: skip
        choose = widgets.HBox([self.place, self.image_file, self.gradient_file])
        protect = widgets.HBox([self.defence, self.strength])
        self.widget = widgets.VBox([choose, protect, widgets.HBox(pictures), self.status])
        self._connect()
        self._guarded(self._take_place)

    def _connect(self) -> None:
        """Lets every control do its part; whatever goes wrong is said in the panel."""
        for control, act in ((self.place, self._take_place), (self.image_file, self._take_image),
                             (self.gradient_file, self._take_gradients), (self.strength, self._attack)):  # fmt: skip
            control.observe(lambda _, act=act: self._guarded(act), "value")
        self.defence.observe(self._change_defence, "value")

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (ValueError, FileNotFoundError) as error:
            self.result, self.found.value = None, b""
            self.status.value = f"<b>refused</b>: {html.escape(str(error))}"

    def _change_defence(self, _) -> None:
        before = self.strength.value
        self.strength.options = _options(self.defence.value)  # the slider goes back to its first value
        if before == self.strength.value:  # and then has no change to tell of
            self._guarded(self._attack)

    def _take_place(self) -> None:
        self._take(*load_images(self.source, image_shape=self.chain.image_shape, index=self.place.value, classes=2))

    def _take_image(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            _stored(self.image_file, folder)
            self._take(*load_images(f"folder:{folder}", image_shape=self.chain.image_shape, index=0))

    def _take(self, image: Tensor, label: Tensor) -> None:
        """Makes an image the client's, and attacks."""
        self._image, self.origin.value = image, _png(image[0])
        self._gradients = client.client_gradients(self.chain.model, image, label, loss=self.loss)
        self._attack()

    def _take_gradients(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._gradients = client.load_gradients(_stored(self.gradient_file, folder))
        self._image, self.origin.value = None, b""
        self._attack()

    def _attack(self) -> None:
        start, strength = time.perf_counter(), self.strength.value
        shared = defended(self._gradients, self.defence.value, strength)
        self.result = reconstruct(self.chain, shared, loss=self.loss, noise_std=noise_of(self.defence.value, strength))
        seconds = time.perf_counter() - start
        self.found.value = _png(self.result.images[0])
        quality = ""
        if self._image is not None:
            quality = f", PSNR {psnr_db(self.result.images, self._image.to(self.result.images)).item():.1f} dB"
        notes = "".join(f"<br>{html.escape(note)}" for note in self.result.notes)
        self.status.value = f"<b>{self.result.verdict}</b>{quality}, {seconds:.2f} s{notes}"


def _options(defence: str) -> list[tuple[str, float | str]]:
    """A slider's steps: what it shows, and the strength."""
    first, *others = strengths_of(defence)
    return [("none", first), *((s if isinstance(s, str) else f"{s:g}", s) for s in others)]


def _stored(upload: widgets.FileUpload, folder: str) -> Path:
    """The uploaded file, put into a folder under its own suffix."""
    file = upload.value[0]
    path = Path(folder) / f"upload{Path(file['name']).suffix.lower()}"
    path.write_bytes(file["content"])
    return path


def _png(image: Tensor) -> bytes:
    """A picture for the screen, its pixels as squares; (C, H, W), values outside [0, 1] clipped."""
    pixels = np.rint(image.double().nan_to_num().clamp(0, 1).cpu().numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scale = max(1, SIDE // picture.height)
    buffer = io.BytesIO()
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
