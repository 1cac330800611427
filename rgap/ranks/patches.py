"""Vision transformers: the gradient of a learned position embedding gives the patches where the width exceeds them.

Every path from a token to the loss passes a layer norm, whose backward pass is orthogonal to the ones, so that the T
tokens' gradients have rank min(T, D − 1); each of a patch's n entries is determined by them alone (`rgap.tokens`).
"""

from __future__ import annotations

from torch import nn

from rgap.network.chain import prepare
from rgap.results import LayerRank, UnsupportedLayerError
from rgap.tokens.embedding import recognise

BYPASSED = "inside the transformer, which plays no part in it"  # note on the steps that the tokens' gradients bypass


def patch_ranks(model: nn.Module, image_shape: tuple[int, ...], batch_size: int) -> list[LayerRank]:
    """The rank of a transformer's patches by law, preceded, where they lack equations, by what may add some.

    Nothing where the gradients do not determine those of single tokens: for a batch they share the sum over its images.
    """
    if batch_size != 1 or len(image_shape) != 3 or not _may_attend(model):
        return []
    try:
        found = None if _is_chain(model, tuple(image_shape)) else recognise(model, tuple(image_shape))
    except ValueError:  # UnsupportedLayerError among them
        found = None
    if found is None:
        return []
    tokens, width = found.position_entries.shape
    entries, rank = found.pixels.shape[1], min(tokens, width - 1)
    patches = LayerRank(
        found.name,
        "convolution" if model.get_parameter(found.weight_name).ndim > 2 else "linear",
        unknowns=tokens * entries,
        weight_rows=0,
        gradient_rows=width * entries,
        ra_index=(tokens - width) * entries,
        deficit=(tokens - rank) * entries,
        virtual_constraints=0,
        law_weights=0,
        law_gradients=rank * entries,
        law_rank=rank * entries,
        note=f"{tokens} patches of width {width}, by the gradient of {found.position_name!r}, that of every token",
    )
    if not patches.deficit:
        return [patches]
    note = "attention and layer norms add equations that no rank counts"
    return [LayerRank(found.position_name, "not analysed", 0, 0, note=note), patches]


def _is_chain(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether the attack walks a network layer by layer, as it does one of convolutions with an added parameter."""
    try:
        prepare(model, image_shape)
    except UnsupportedLayerError:
        return False
    return True


def _may_attend(model: nn.Module) -> bool:
    """Whether a network has a parameter that is no layer's weight or bias, as a position embedding is."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, nn.Embedding) or set(dict(module.named_parameters(recurse=False))) - {"weight", "bias"}
        for module in model.modules()
    )
