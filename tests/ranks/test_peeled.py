from itertools import pairwise

import pytest
import torch
from torch import nn

import rgap
from rgap.ranks.peeled import active_shares, largest_peeled, predicted_share


def table(count, features=60):
    generator = torch.Generator().manual_seed(0)
    return (0.6 + 0.25 * torch.randn(count, features, generator=generator, dtype=torch.float64)).clamp(0, 1)


def network(*hidden, activation=nn.ReLU):
    torch.manual_seed(0)
    widths = (60, *hidden, 4)
    modules = [m for pair in pairwise(widths) for m in (nn.Linear(*pair), activation())]
    return nn.Sequential(*modules[:-1]).double()


def test_active_shares_are_those_of_the_network():
    model, rows = network(100), table(50)
    chain = rgap.prepare(model, (60,))
    assert active_shares(chain, chain.layers[0], rows).equal((model[0](rows) > 0).double().mean(0))


def test_a_unit_for_each_image_peels_all_and_units_that_all_switch_on_none():
    assert predicted_share(torch.full((400,), 0.1, dtype=torch.float64), 10) == 1
    assert predicted_share(torch.ones(400, dtype=torch.float64), 10) == 0
    seldom_off = torch.full((400,), 0.9, dtype=torch.float64)
    assert predicted_share(seldom_off, 10) == 1 > predicted_share(seldom_off, 10, both_ends=False)


def test_the_largest_batch_that_peels_is_a_bisection():
    active = torch.full((300,), 0.1, dtype=torch.float64)
    most = largest_peeled(active, 200)
    assert predicted_share(active, most) >= 0.95 > predicted_share(active, most + 1)


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.1)])
def test_images_of_a_client_raise_the_largest_batch_to_what_peels(activation):
    model, rows = network(240, activation=activation), table(200)
    bare, found = rgap.largest_batch(model, (60,)), rgap.largest_batch(model, (60,), images=rows)
    assert bare.peeled is None and bare.batch_size == 3
    assert found.batch_size == found.peeled > 20 and "peel off" in found.reason
    count = found.peeled // 2
    labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(0))
    gradients = rgap.client_gradients(model, rows[:count], labels, "cross_entropy")
    result = rgap.reconstruct(model, gradients, (60,), "cross_entropy", batch_size=count, gradient_scale=1.0)
    assert result.verdict == "exact" and len(result.images) == count


def test_smooth_layers_and_wide_ones_behind_leaky_relu_peel_nothing():
    rows = table(200)
    assert rgap.largest_batch(network(240, activation=nn.Tanh), (60,), images=rows).peeled == 0
    deep = network(240, 100, activation=lambda: nn.LeakyReLU(0.1))
    assert rgap.largest_batch(deep, (60,), images=rows).peeled == 0


@pytest.mark.parametrize("images", [torch.zeros(0, 60), torch.zeros(3, 61), torch.tensor(1.0)])
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ValueError, match=r"images are .*; give some of shape \(60,\)"):
        rgap.largest_batch(network(100), (60,), images=images)
