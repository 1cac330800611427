import pytest
import torch
from cases import rand, randn
from torch import nn

import rgap
from rgap.client import loss_value
from rgap.head import read_head
from rgap.head.activated import output_loss_gradient
from rgap.shared_gradient import receive

ACTIVATIONS = [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.ELU(), nn.LeakyReLU(0.2), nn.Softsign(), nn.LogSigmoid()]
LOSSES = [("cross_entropy", 10), ("cross_entropy", 2), ("mse", 10), ("mse", 1), ("logistic", 1)]


@pytest.mark.parametrize(("loss", "outputs"), LOSSES)
def test_the_gradient_by_the_outputs_is_autograds(loss, outputs):
    f = randn(1, outputs).requires_grad_()
    for label in range(max(outputs, 2)):
        (expected,) = torch.autograd.grad(loss_value(loss, f, torch.tensor([label])), f)
        torch.testing.assert_close(output_loss_gradient(loss, f.detach(), label), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("loss", "outputs"), LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
def test_the_head_is_read_through_an_invertible_activation(activation, loss, outputs, bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs, bias=bias), activation).double()
    image, label = rand(1, 3, 2, 2, seed=1), min(outputs, 2) - 1
    gradients = rgap.client_gradients(network, image, torch.tensor([label]), loss)
    chain = rgap.prepare(network, (3, 2, 2))
    reading = read_head(loss, chain.layers[-1], receive(chain, gradients))
    nearest = min(reading.hypotheses, key=lambda h: (h.x - image.flatten()).norm().item())
    torch.testing.assert_close(nearest.x, image.flatten(), rtol=1e-8, atol=1e-8)
    assert nearest.label == label and nearest.residual < 1e-8
    assert len({h.label for h in reading.hypotheses}) <= 2
    if outputs > 2:
        assert [h.label for h in reading.hypotheses] == [label]


def test_an_image_is_recovered_from_a_network_with_a_sigmoid_before_the_loss():
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, 14, 4, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(14 * 16, 10), nn.Sigmoid()]
    network, image = nn.Sequential(*modules).double(), rand(1, 3, 8, 8)
    gradients = rgap.client_gradients(network, image, torch.tensor([7]), "cross_entropy")
    result = rgap.reconstruct(network, gradients, (3, 8, 8), "cross_entropy")
    assert result.verdict == "exact" and result.labels.tolist() == [7]
    assert rgap.metrics.psnr_db(result.images, image).item() > 100


def test_a_known_label_is_tried_alone_and_a_wrong_one_is_refused():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 30, bias=False), nn.Tanh()).double()
    gradients = rgap.client_gradients(network, rand(1, 3, 2, 2), torch.tensor([3]), "mse")
    chain = rgap.prepare(network, (3, 2, 2))
    reading = read_head("mse", chain.layers[-1], receive(chain, gradients), 3)
    assert [h.label for h in reading.hypotheses] == [3]
    with pytest.raises(rgap.GradientMismatchError, match="label 4 was given; the last layer's gradient is that of 3"):
        read_head("mse", chain.layers[-1], receive(chain, gradients), 4)


def test_a_batch_with_an_activation_before_the_loss_is_refused():
    modules = [nn.Flatten(), nn.Linear(48, 30), nn.LeakyReLU(0.2), nn.Linear(30, 6), nn.Tanh()]
    network = nn.Sequential(*modules).double()
    gradients = rgap.client_gradients(network, rand(3, 3, 4, 4), torch.arange(3), "cross_entropy")
    with pytest.raises(rgap.UnsupportedLayerError, match=r"'3': a batch is taken apart where .* tanh stands between"):
        rgap.reconstruct(network, gradients, (3, 4, 4), "cross_entropy", batch_size=3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("loss", "outputs"), LOSSES)
def test_an_unknown_factor_is_found_or_leaves_the_brightness_open(loss, outputs, bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs, bias=bias), nn.Tanh()).double()
    image, label = rand(1, 3, 2, 2, seed=1), min(outputs, 2) - 1
    gradients = [2.5 * g for g in rgap.client_gradients(network, image, torch.tensor([label]), loss)]
    chain = rgap.prepare(network, (3, 2, 2))
    received = receive(chain, gradients)
    reading = read_head(loss, chain.layers[-1], received, gradient_scale=None)
    if not bias and outputs < 3:
        assert all(h.length_error == float("inf") for h in reading.hypotheses)
    elif outputs > 1:
        assert [h.label for h in reading.hypotheses] == [label]
        assert reading.hypotheses[0].gradient_scale == pytest.approx(2.5)
    if bias or outputs > 2:
        torch.testing.assert_close(reading.hypotheses[0].x, image.flatten(), rtol=1e-7, atol=1e-7)
    given = read_head(loss, chain.layers[-1], received, gradient_scale=2.5)
    nearest = min(given.hypotheses, key=lambda h: (h.x - image.flatten()).norm().item())
    torch.testing.assert_close(nearest.x, image.flatten(), rtol=1e-8, atol=1e-8)


def test_smoothed_labels_are_read_where_the_smoothing_is_given():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10, bias=False), nn.Tanh()).double()
    gradients = rgap.client_gradients(
        network, rand(1, 3, 2, 2), torch.tensor([3]), "cross_entropy", label_smoothing=0.1
    )
    chain = rgap.prepare(network, (3, 2, 2))
    reading = read_head("cross_entropy", chain.layers[-1], receive(chain, gradients), label_smoothing=0.1)
    assert [h.label for h in reading.hypotheses] == [3] and reading.hypotheses[0].residual < 1e-8
