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

PIXEL_SLACK_FACTOR = 5.0
"""Times its predicted error by which a pixel may lie outside the range."""

MIN_PIXEL_SLACK = 1e-8
"""The same in widths of the range, for errors of float64 arithmetic."""


@dataclass(frozen=True)
class Attack:
    """What all steps of one attack share.

    Attributes:
        chain: The prepared network.
        received: The gradients.
        loss: A name in `rgap.client.LOSSES`.
        close: What may close rank-deficient layers; None leaves them open.
        pixels: The values that a pixel may have.
        inferred: Whether the gradient's noise was inferred from surplus equations, not declared or seen by its format.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ; None to estimate it.
        label_smoothing: ε of the client's labels; None to estimate it.
    """

    chain: Chain
    received: SharedGradient
    loss: str
    close: Closer | None = None
    pixels: PixelRange = field(default_factory=PixelRange)
    inferred: bool = False
    gradient_scale: float | None = 1.0
    label_smoothing: float | None = 0.0

    def gradients(self, images: Tensor, labels: Tensor, start: Start) -> dict[str, Tensor]:
        """The gradient that a client with these images (B, C, H, W) and the loss of a start would share, by name."""
        return gradients_of(self.chain.model, self.chain.parameters, images, labels, self.loss, **start.client_loss)

    def images(self, descent: Descent) -> Tensor:
        """The recovered input of the first layer, (B, C, H, W)."""
        return descent.layer_inputs[self.chain.layers[0].name].reshape(len(descent.start.x), *self.chain.image_shape)

    def inputs(self, descent: Descent, images: Tensor) -> dict[str, Tensor]:
        """The recovered inputs by layer name, with these images in place of the first layer's."""
        name = self.chain.layers[0].name
        return {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    def slack(self, largest_error: float) -> float:
        """How far outside the range a pixel may lie where the largest error of a pixel is predicted to be this."""
        return PIXEL_SLACK_FACTOR * largest_error + MIN_PIXEL_SLACK * self.pixels.width


@dataclass(frozen=True)
class Weighed:
    """The candidates of a descent, compared with the shared gradient.

    Attributes:
        start: Where the descent started.
        joint: The candidate of all images together.
        each: For each image of a batch its candidates, one for each of its twins, those in the pixel range first.
        unconfirmed: Whether the scales of a batch rest on its size alone, without confirmation by the gradient's rank.
        doubt: Why noise that was inferred does not explain the misfit; empty where it does.
    """

    start: Start
    joint: Candidate
    each: tuple[tuple[Candidate, ...], ...] = ()
    unconfirmed: bool = False
    doubt: str = ""
