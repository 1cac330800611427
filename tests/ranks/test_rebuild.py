import pytest
import torch
from cases import rand
from torch import nn

from rgap import models
from rgap.ranks.rebuild import chain_steps, with_convolution
from rgap.results import UnsupportedLayerError


def conv_bn():
    layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(6, affine=False), nn.Tanh(), nn.Flatten(), nn.Linear(96, 10)).eval()


class Nested(nn.Module):
    """A chain that is no Sequential."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh())
        self.head = nn.Linear(6 * 36, 2)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def test_a_new_width_reaches_the_next_layer_and_the_normalisation_between():
    model = conv_bn()
    new = with_convolution(model, (3, 8, 8), "0", out_channels=5)
    assert new[0].weight.shape == (5, 3, 3, 3) and new[0].bias is not None
    assert new[1].num_features == 5 and new[3].weight.shape == (6, 5, 3, 3) and new[3].bias is None
    assert type(new[3]) is nn.Conv2d and type(new[1]) is nn.BatchNorm2d
    assert not new.training and new(rand(2, 3, 8, 8).float()).shape == (2, 10)
    for place in (4, 5, 7):  # what need not change is the model's own
        assert all(a is b for a, b in zip(model[place].parameters(), new[place].parameters(), strict=True))
    assert model[0].weight.shape == (8, 3, 3, 3) and model[1].num_features == 8


def test_a_new_stride_reaches_the_first_linear_layer():
    new = with_convolution(conv_bn(), (3, 8, 8), "3", stride=4)
    assert new[3].stride == (4, 4) and new[7].in_features == 6 * 4
    assert new[4].num_features == 6 and not new[4].affine


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    first, second = (with_convolution(models.cnn6(), (3, 32, 32), "2", out_channels=14, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_chain_need_not_be_a_sequential_and_keeps_its_dtype():
    new = with_convolution(Nested().double(), (1, 8, 8), "body.0", out_channels=2)
    assert new.head.in_features == 2 * 36 and new.head.weight.dtype == torch.float64


def test_a_network_with_branches_is_no_chain():
    assert chain_steps(models.resnet18(), (3, 32, 32)) == []
    assert len(chain_steps(conv_bn(), (3, 8, 8))) == 1 + 8
    shared = nn.Conv2d(2, 2, 3, 1, 1)
    assert chain_steps(nn.Sequential(shared, nn.Tanh(), shared, nn.Flatten(), nn.Linear(32, 1)), (2, 4, 4)) == []


def grouped(place):
    groups = {place: 2}
    layers = [nn.Conv2d(4, 4, 3, groups=groups.get(0, 1)), nn.Conv2d(4, 4, 3, groups=groups.get(1, 1))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 1))


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        (grouped(0), "0", "'0' is no convolution without groups"),
        (grouped(1), "0", r"'1' \(Conv2d\) has groups and cannot be adapted"),
        (grouped(None), "3", "'3' is no convolution without groups"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 1)), "0", "GroupNorm"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(6, 1)), "0", "works on several places at once"),
    ],
)
def test_what_cannot_be_changed_or_adapted_is_refused_by_name(model, path, message):
    with pytest.raises(UnsupportedLayerError, match=message):
        with_convolution(model, (4, 8, 8), path, out_channels=3)


def test_shapes_that_do_not_fit_are_reported():
    with pytest.raises(ValueError, match="'0' does not fit the network with this change"):
        with_convolution(grouped(None), (4, 8, 8), "0", stride=6)
