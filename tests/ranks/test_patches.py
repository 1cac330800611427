"""Transformers by the rank law min(T, D − 1), before any attack, and as the attack then finds them."""

import pytest
import torch
from torch import nn
from vits import SHAPE, small, torchvision_vit

import rgap
from rgap.ranks.audit import audit
from rgap.ranks.exposure import exposure


@pytest.mark.parametrize(("width", "deficit"), [(48, 0), (18, 0), (16, 48), (14, 144)])
def test_the_law_is_what_the_attack_finds(width, deficit):
    model = torchvision_vit(width).double()
    (patches,) = (layer for layer in rgap.rank_analysis(model, SHAPE).layers if layer.ra_index is not None)
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    gradients = rgap.client_gradients(model, image, torch.tensor([1]), "cross_entropy")
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", virtual_constraints=False)
    assert patches.deficit == result.layers[0].deficit == deficit
    assert patches.law_rank == result.layers[0].rank
    assert patches.name == result.layers[0].name == "conv_proj"


@pytest.mark.parametrize("layout", ["timm", "huggingface", "mean"])
def test_the_audit_says_leaks_whatever_fx_can_trace(layout):
    result = audit(small(layout), SHAPE) if layout == "mean" else None
    assert result is None or result.exposure.outcome == "leaks"
    assert exposure(rgap.rank_analysis(small(layout), SHAPE)).outcome == "leaks"


def test_narrow_transformers_are_not_said_to_stop():
    """The image lacks few equations, and the layers above may add them: neither is shown."""
    outcome = exposure(rgap.rank_analysis(torchvision_vit(14), SHAPE))
    assert outcome.outcome == "unknown"
    assert "conv_proj" in outcome.sentence


@pytest.mark.parametrize("layout", ["sincos", "frozen", "none"])
def test_without_position_gradients_nothing_is_claimed(layout):
    assert exposure(rgap.rank_analysis(small(layout), SHAPE)).outcome == "unknown"


def test_batches_are_not_claimed():
    assert exposure(rgap.rank_analysis(torchvision_vit(), SHAPE, batch_size=2)).outcome == "unknown"


class Shifted(nn.Module):
    """A convolution to whose output a learned parameter is added: a chain, which is attacked layer by layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 48, 4, 4), nn.Linear(768, 5)
        self.shift = nn.Parameter(torch.zeros(1, 48, 4, 4))

    def forward(self, x):
        return self.last(nn.functional.leaky_relu(self.first(x) + self.shift).flatten(1))


def test_a_chain_with_an_added_parameter_is_no_transformer():
    layers = rgap.rank_analysis(Shifted(), SHAPE).layers
    assert not any("patches" in layer.note or "transformer" in layer.note for layer in layers)


def test_dropout_in_training_leaves_the_random_state():
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)).train()
    state = torch.random.get_rng_state()
    rgap.rank_analysis(network, SHAPE)
    assert torch.equal(state, torch.random.get_rng_state())
