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

PIXEL_SLACK_FACTOR = 5.0  # times its predicted error by which a pixel may lie outside the range
MIN_PIXEL_SLACK = 1e-8  # the same in widths of the range, for errors of float64 arithmetic


@dataclass(frozen=True)
class Attack:
    """What all steps of one attack share."""

    chain: Chain  # the prepared network
    received: SharedGradient  # the gradients
    loss: str  # a name in `rgap.client.LOSSES`
    close: Closer | None = None  # what may close rank-deficient layers; None leaves them open
    pixels: PixelRange = field(default_factory=PixelRange)  # the values that a pixel may have
    # whether the gradient's noise was inferred from surplus equations, not declared or seen by its format
    inferred: bool = False
    gradient_scale: float | None = 1.0  # factor κ of the shared gradient κ ∇ℓ; None to estimate it
    label_smoothing: float | None = 0.0  # ε of the client's labels; None to estimate it

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
    """The candidates of a descent, compared with the shared gradient."""

    start: Start  # where the descent started
    joint: Candidate  # the candidate of all images together
    # for each image of a batch its candidates, one for each of its twins, those in the pixel range first
    each: tuple[tuple[Candidate, ...], ...] = ()
    # whether the scales of a batch rest on its size alone, without confirmation by the gradient's rank
    unconfirmed: bool = False
    doubt: str = ""  # why noise that was inferred does not explain the misfit; empty where it does
