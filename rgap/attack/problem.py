"""What all steps of an attack share, and what weighing a descent's candidates finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rgap.attack.descent import Closer, Descent
from rgap.client import gradients_of
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain
from rgap.results import Candidate, PixelRange
from rgap.shared_gradient import SharedGradient

NOISE_RESIDUAL_FACTOR = 5.0
"""Multiple of the predicted residual up to which a residual is attributed to noise."""

MAX_PIXEL_SLACK = 0.1
"""Largest distance outside the pixel range that the gradient's precision excuses, in widths of the range."""


@dataclass(frozen=True)
class Attack:
    """What all steps of one attack share.

    Attributes:
        chain: The prepared network.
        received: The gradients.
        loss: A name in `rgap.client.LOSSES`.
        close: What may close rank-deficient layers; None leaves them open.
        pixels: The values that a pixel may have.
    """

    chain: Chain
    received: SharedGradient
    loss: str
    close: Closer | None = None
    pixels: PixelRange = field(default_factory=PixelRange)

    def gradients(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The gradient that a client with these images (B, C, H, W) would share, by parameter name."""
        return gradients_of(self.chain.model, self.chain.parameters, images, labels, self.loss)

    def images(self, descent: Descent) -> Tensor:
        """The recovered input of the first layer, (B, C, H, W)."""
        return descent.layer_inputs[self.chain.layers[0].name].reshape(len(descent.start.x), *self.chain.image_shape)

    def inputs(self, descent: Descent, images: Tensor) -> dict[str, Tensor]:
        """The recovered inputs by layer name, with these images in place of the first layer's."""
        name = self.chain.layers[0].name
        return {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    @property
    def slack(self) -> float:
        """How far outside the range a pixel may lie by the gradient's precision."""
        return self.pixels.width * min(self.received.tolerance, MAX_PIXEL_SLACK)


@dataclass(frozen=True)
class Weighed:
    """The candidates of a descent, compared with the shared gradient.

    Attributes:
        start: Where the descent started.
        joint: The candidate of all images together.
        each: For each image of a batch its candidates, one for each of its twins, those in the pixel range first.
        unconfirmed: Whether the scales of a batch rest on its size alone, without confirmation by the gradient's rank.
    """

    start: Start
    joint: Candidate
    each: tuple[tuple[Candidate, ...], ...] = ()
    unconfirmed: bool = False


@dataclass(frozen=True)
class Match:
    """How the images' gradient compares with the shared one.

    Attributes:
        residual: The largest relative residual of a parameter's gradient.
        allowed: The residual up to which the images are consistent.
        error: Predicted root-mean-square error of the image, of a batch that of the worst one; None without prediction.
        excess: Ratio of the noise to that assumed in the descent, at least 1.
    """

    residual: float
    allowed: float
    error: float | None = None
    excess: float = 1.0
