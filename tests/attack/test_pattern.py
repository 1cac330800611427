import pytest
import torch
from cases import CNN_SHAPE, batch_cnn, rand, randn, sequential, shared_batch, small_cnn
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.attack.pattern import batch_on_pattern, decide_activation_pattern, settle_signs

IMAGE = randn(1, 3, 8, 8).abs()


def middle(network=None):
    """The second convolution with its gradient, its output and the gradient by that."""
    network = small_cnn() if network is None else network
    chain = rgap.prepare(network, (3, 8, 8))
    layer = chain.layers[1]
    gradients = dict(zip(chain.parameters, rgap.client_gradients(network, IMAGE, torch.tensor([1])), strict=True))
    x = layer.activation.forward(layer.apply(chain.layer_inputs(IMAGE)[layer.name]) + layer.pre_bias())
    mu = network(IMAGE).item()
    dx = chain.layers[-1].adjoint(torch.tensor([[[-1 / (1 + torch.tensor(mu).double().exp())]]])).reshape(x.shape)
    return layer, layer.gradient(gradients), x, dx


def test_signs_that_noise_has_turned_are_turned_back():
    layer, G, x, dx = middle()
    truth = layer.activation.derivative(layer.activation.inverse(x))
    spread, before, after = 0.01 * x.abs().mean().item(), 0, 0
    for seed in range(60):
        noisy = x + spread * randn(*x.shape, seed=seed)
        before += int(((noisy > 0) != (x > 0)).sum())
        found = decide_activation_pattern(layer, G, noisy, dx, spread, 1e-6 * G.abs().max().item())
        after += int((found.values != truth).sum())
        assert (found.flip_probability[noisy.abs() > 5 * spread] == 0).all()
    assert before >= 20 and after <= before / 4


def test_without_error_the_slopes_are_the_derivative_and_nothing_is_in_doubt():
    layer, G, x, dx = middle(small_cnn(bias=True))
    found = decide_activation_pattern(layer, G, x, dx, 0.0, 0.0)
    assert_close(found.values, layer.activation.derivative(layer.activation.inverse(x)))
    assert not found.flip_probability.any()


def test_noise_that_hides_the_identities_leaves_the_sign_that_is_seen_and_doubt():
    layer, G, x, dx = middle()
    spread = 0.1 * x.abs().mean().item()
    found = decide_activation_pattern(layer, G, x, dx, spread, 1e3 * G.abs().max().item())
    assert_close(found.values, layer.activation.derivative(layer.activation.inverse(x)))
    closest = x.abs().flatten().argmin()
    assert 0.2 < found.flip_probability.flatten()[closest] <= 0.5
    turned = found.draw(torch.Generator().manual_seed(0)) != found.values
    assert turned.any() and (found.flip_probability[turned] > 0).all()


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Identity(), nn.LeakyReLU(1.0)])
def test_activations_without_two_slopes_are_left_alone(activation):
    network = sequential(
        nn.Conv2d(3, 8, 3, 2, 1), activation, nn.Conv2d(8, 6, 3, 1, 1), activation, nn.Flatten(), nn.Linear(96, 1)
    )
    layer = rgap.prepare(network, (3, 8, 8)).layers[1]
    x = randn(1, *layer.output_shape)
    assert decide_activation_pattern(layer, randn(*layer.weight.shape), x, x, 0.1, 0.1) is None


def test_a_gradient_of_zeros_decides_nothing():
    layer, G, x, dx = middle()
    assert decide_activation_pattern(layer, 0 * G, x, dx, 0.1, 0.1) is None


def test_gradients_whose_squares_underflow_decide_as_others_do():
    layer, G, x, dx = middle()
    spread = 0.03 * x.abs().mean().item()
    std = 1e-6 * G.abs().max().item()
    found, tiny = (decide_activation_pattern(layer, c * G, x, c * dx, spread, c * std) for c in (1.0, 1e-200))
    assert_close(found.values, tiny.values)


def test_a_unit_next_to_zero_is_turned_where_the_identities_say_so():
    model = batch_cnn(bias=True)
    images, labels, gradients = shared_batch(model)
    chain = rgap.prepare(model, CNN_SHAPE)
    layer, G = chain.layers[0], gradients[0]
    x = model[:2](images).detach().requires_grad_()
    nn.functional.cross_entropy(model[2:](x), labels).backward()
    dx, x = x.grad, x.detach()
    place = tuple(torch.nonzero(x[:1].abs() == x[:1].abs().min())[0].tolist())
    moved = x.clone()
    moved[place] = -moved[place]
    found = settle_signs(layer, G, moved, dx, doubt=1.5 * x[place].abs().item() / x.square().mean().sqrt().item())
    assert torch.equal(found > 0, x > 0) and torch.equal(settle_signs(layer, G, x, dx, doubt=0.05), x)
    linear = rgap.prepare(batch_cnn(activation=nn.Identity()), CNN_SHAPE).layers[0]
    assert settle_signs(linear, G, x, dx, doubt=0.1) is x


def test_images_are_moved_to_the_signs_that_were_recovered(monkeypatch):
    model = batch_cnn(bias=True)
    images, _, _ = shared_batch(model)
    chain = rgap.prepare(model, CNN_SHAPE)
    inputs = chain.layer_inputs(images)
    near = images + 0.02 * rand(*images.shape, seed=3)
    following = zip(chain.layers[:-1], chain.layers[1:], strict=True)
    positive = {layer.name: inputs[after.name] > 0 for layer, after in following}
    moved = batch_on_pattern(chain, near, positive)
    before, after = chain.layer_inputs(near), chain.layer_inputs(moved)
    for name in ("2", "5", "7"):  # the last one is hidden among the fully connected layers
        assert not torch.equal(before[name] > 0, inputs[name] > 0)
        assert torch.equal(after[name] > 0, inputs[name] > 0)
    assert (moved - near).abs().max() < 0.05
    smooth = rgap.prepare(batch_cnn(activation=nn.Tanh()), CNN_SHAPE)
    assert batch_on_pattern(smooth, near, positive) is near
    monkeypatch.setattr("rgap.attack.pattern.MAX_PATTERN_FLIPS", 0)
    assert torch.equal(batch_on_pattern(chain, near, positive), near)
