"""Transformers by the rank law min(T, D − 1), and blind layers with the walk down from them, by shapes alone."""

import pytest
import torch
from torch import nn
from vits import SHAPE, small, torchvision_vit

import rgap
from rgap import rank_analysis
from rgap.equations.gradient import blocks, gradient_matrix
from rgap.models import cnn6, resnet, resnet18
from rgap.network.chain import prepare_graph
from rgap.network.tracing import trace
from rgap.ranks.audit import audit
from rgap.ranks.exposure import exposure
from rgap.ranks.no_chains import _rank, blind_layers, walk_by_law


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


def walk(model, size):
    """The walk by law through a network of square images."""
    traced = trace(model, (3, size, size))
    return walk_by_law(prepare_graph(model, (3, size, size), traced), traced)


@pytest.mark.slow
def test_a_resnet18_leaks_through_its_blind_layers():
    analysis = rank_analysis(resnet18(), (3, 32, 32), limit=0)
    assert analysis.verdict == analysis.entry == exposure(analysis).sentence
    assert analysis.verdict.startswith("leaks: 'layer3.0.conv2' is blind: its own gradient gives its input; below the")
    blind = {layer.name: layer.blind for layer in analysis.layers if layer.blind is not None}
    assert blind["layer4.1.conv2"] and blind["layer2.0.conv2"] and not blind["layer2.0.conv1"] and not blind["conv1"]


def without_norm_and_bias():
    """A residual network whose blind layers have no scale."""
    model = resnet(widths=(16, 64))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.Identity())
    return model


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (resnet(widths=(16, 20, 20), blocks=1), 32),  # 20 channels on 8×8: 4 · 20 < 9 · 9
        (without_norm_and_bias(), 16),
        (
            nn.Sequential(
                *[nn.Conv2d(c, 64, 3, 2, 1) for c in (3, 64)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)
            ),
            16,
        ),
    ],
    ids=["narrow last stages", "no bias and no norm", "strides"],
)
def test_what_closes_a_blind_layer(model, size):
    assert walk(model, size) is None
    assert not any(blind_layers(prepare_graph(model, (3, size, size))).values())
    assert rank_analysis(model, (3, size, size), limit=0).entry == ""


def test_what_lies_below_a_narrow_network_is_too_much_for_the_inversion():
    found = walk(resnet(blocks=1), 32)
    assert found.entry == "5.path.3" and found.solved == ("5.path.0 + 5.skip.0", "4.path.3")
    assert not found.leaks and found.rank < found.unknowns
    assert "fewer than the 15 with which the inversion has converged" in found.sentence


def test_chains_are_judged_by_their_own_layers_and_batches_have_no_blind_layer():
    analysis = rank_analysis(cnn6(), (3, 32, 32), limit=0)
    assert analysis.entry == "" and any(layer.blind is not None for layer in analysis.layers)
    assert all(layer.blind is None for layer in rank_analysis(cnn6(), (3, 32, 32), 2, limit=0).layers)


@pytest.mark.parametrize("stride", [1, 2])
def test_ranks_along_the_walk_are_those_of_the_attack(stride):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * (6 // stride) ** 2, 2))
    node = next(n for n in prepare_graph(model, (2, 6, 6)).nodes.values() if n.has_weight)
    dz = torch.randn(node.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = sum(int(torch.linalg.matrix_rank(gradient_matrix(node.layer, b, dz))) for b in blocks(node.layer))
    assert _rank([node], 72) == 2 * dense


def test_networks_with_frozen_layers_or_many_parameters_are_not_walked(monkeypatch):
    model = resnet(blocks=1)
    assert rank_analysis(model, (3, 32, 32), limit=0).entry
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).requires_grad_(False)
    frozen = rank_analysis(model, (3, 32, 32), limit=0)
    assert frozen.entry == "" and exposure(frozen).outcome != "leaks"
    monkeypatch.setattr("rgap.ranks.analysis.MAX_WALKED_PARAMETERS", 1000)
    assert rank_analysis(resnet(blocks=1), (3, 32, 32), limit=0).entry == ""
