"""Mini-batches: the paper's mixture of a batch, and the parts of which `rgap.reconstruct` recovers every image.

`separate` takes two consecutive fully connected layers apart, whatever stands before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.network.layer import Chain
from rgap.results import Reconstruction
from rgap.separation.scales import output_gradients, scale_hypotheses
from rgap.separation.search import Separation, separate
from rgap.separation.subspaces import find_batch_size

__all__ = ["Separation", "combination", "find_batch_size", "output_gradients", "scale_hypotheses", "separate"]


def combination(
    model: nn.Module | Chain,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    image_shape: tuple[int, int, int] | None = None,
    loss: str = "logistic",
    **options,
) -> Reconstruction:
    """What plain R-GAP makes of a batch's gradient: one linear combination of the images (Zhu & Blaschko 2021).

    The batch's gradient is treated as that of a single image.

    Args:
        model: The network, or a `Chain`.
        gradients: As for `rgap.reconstruct`.
        image_shape: (C, H, W) of one image; may be left out with a `Chain`.
        loss: As for `rgap.reconstruct`.
        **options: For `rgap.reconstruct`.

    Returns:
        Its `Reconstruction`, with one image; the verdict is that of a single image and usually "inconsistent".
    """
    return reconstruct(model, gradients, image_shape, loss, batch_size=1, virtual_constraints=False, **options)
