"""Candidates are weighed with the error that noise leaves; what the rank laws call hopeless is not solved for."""

import math
import time
from dataclasses import replace

import pytest
import torch
from cases import CNN_SHAPE, SHAPE, batch, batch_cnn, fcn, gradients, quality, rand, randn, shared_batch, small_cnn
from torch import nn

import rgap
from rgap import client
from rgap.attack import batch as batches
from rgap.attack.candidates import Attack, foreseen_deficits, weigh_image
from rgap.attack.descent import close_by_virtual_constraints, descend
from rgap.attack.misfit import drawn_head, start_probe
from rgap.head import read_head
from rgap.head.hypothesis import Start, starts_of
from rgap.results import PixelRange
from rgap.shared_gradient import receive

LABEL = torch.tensor([1])


def worst_error(result, images):
    """Of the images found, the largest root-mean-square error."""
    order = rgap.metrics.match(result.images, images)
    return (result.images - images[order]).flatten(1).square().mean(1).sqrt().max().item()


@pytest.mark.parametrize("share", [lambda g: g, lambda g: client.quantise(g, "bfloat16")])
def test_a_batch_through_convolutions_has_its_error_predicted(share):
    model = batch_cnn(dtype=torch.float32)
    images, labels, gradients = shared_batch(model)
    result = rgap.reconstruct(model, share(gradients), CNN_SHAPE, "cross_entropy", batch_size=3, gradient_scale=1.0)
    (joint,) = result.candidates
    error = worst_error(result, images)
    assert 0.1 < joint.predicted_error / error < 10
    assert joint.predicted_error == max(found[0].predicted_error for _, found in result.per_image)
    if result.verdict == "exact":
        assert quality(result, images, labels) > result.certified_psnr_db - 10
        assert 0 < joint.gradient_residual <= joint.residual_allowed <= 0.1
    else:
        assert joint.predicted_error > 0.01 and any("limits the accuracy" in note for note in result.notes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("std", "certain"), [(0.0, True), (1e-6, True), (1e-3, False)])
def test_a_fully_connected_batch_has_the_error_of_each_image_predicted(std, certain, bias):
    network, (images, labels) = fcn((120, 30), 6, bias), batch(4, 6)
    shared = gradients(network, images, labels, "cross_entropy", torch.float64)
    noisy = client.gaussian_noise(shared, std * shared[0].std().item(), seed=1)
    declared = std * shared[0].std().item() or None
    result = rgap.reconstruct(
        network, noisy, SHAPE, "cross_entropy", batch_size=4, noise_std=declared, gradient_scale=1.0
    )
    order = rgap.metrics.match(result.images, images)
    errors = (result.images - images[order]).flatten(1).square().mean(1).sqrt()
    predicted = torch.tensor([found[0].predicted_error for _, found in result.per_image])
    assert (result.verdict == "exact") == (certain or bias)  # with biases the noise is told from a factor
    if std and certain:
        assert ((predicted / errors > 0.1) & (predicted / errors < 20)).all()
    for (verdict_, found), error in zip(result.per_image, errors.tolist(), strict=True):
        assert verdict_ != "exact" or error < max(3 * found[0].predicted_error, 3e-3)


def test_an_altered_gradient_is_not_explained():
    model = batch_cnn(dtype=torch.float32)
    _, _, gradients = shared_batch(model)
    gradients[0] = gradients[0] * 1.02
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=3, gradient_scale=1.0)
    (joint,) = result.candidates
    assert joint.predicted_error is not None and joint.gradient_residual > joint.residual_allowed
    assert result.verdict == "inconsistent" and any("is allowed" in note for note in result.notes)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 0.0), (torch.float64, 0.0), (torch.float64, 1e-6)])
def test_the_gradient_that_is_tried_out_has_the_errors_of_the_shared_one(dtype, noise):
    model = batch_cnn(dtype=dtype)
    images, labels, gradients = shared_batch(model)
    gradients = [g + noise * g.abs().max() * torch.randn_like(g) for g in gradients]
    chain = rgap.prepare(model, CNN_SHAPE)
    std = noise * max(g.abs().max().item() for g in gradients)
    received = receive(chain, gradients, noise_std=std or None)
    tried = batches._as_shared(
        Attack(chain, received, "cross_entropy"), images, Start(0, labels, images, images, (), ())
    )
    for name, g in tried.items():
        miss = ((g - received.gradients[name]).norm() / g.norm()).item()
        assert miss < max(1e-12 if dtype == torch.float64 else 1e-5, 1e3 * noise)
        assert g.dtype == torch.float64 and (not noise or miss > noise)


@pytest.fixture(scope="module")
def recovered():
    """An attack on a gradient in float32, and its descent."""
    model = small_cnn()
    chain = rgap.prepare(model, (3, 8, 8))
    gradients = [g.float() for g in rgap.client_gradients(model, randn(1, 3, 8, 8).abs(), LABEL)]
    received = receive(chain, gradients)
    (start,) = starts_of(chain, read_head("logistic", chain.layers[-1], received, 1).hypotheses[:1])
    probe = start_probe(start, drawn_head(chain, received))
    attack = Attack(chain, received, "logistic", pixels=PixelRange(-9.0, 9.0))
    return attack, descend(chain, received, start, probe=probe)


def with_one_unit_turned(chain, descent):
    """The descent with an image beyond the kink of the second layer closest to it, and how far that is."""
    name = chain.layers[0].name
    x = descent.layer_inputs[name].clone().requires_grad_()
    second = chain.layers[1]
    z = second.apply(chain.layers[0].activation.forward(chain.layers[0].apply(x))).flatten()
    unit = z.abs().argmin()
    (slope,) = torch.autograd.grad(z[unit], x)
    step = -1.5 * z[unit].detach() * slope / slope.square().sum()
    return replace(descent, layer_inputs={**descent.layer_inputs, name: x.detach() + step}), step.square().mean().sqrt()


def test_a_unit_that_flips_when_the_image_goes_forward_says_nothing_against_it(recovered):
    attack, descent = recovered
    name = attack.chain.layers[0].name
    turned, by = with_one_unit_turned(attack.chain, descent)
    close = replace(turned, probe=replace(turned.probe, x=(by / turned.probe.error) * turned.probe.x))
    assert close.probe.error == pytest.approx(by.item())
    candidate = weigh_image(attack, close).joint
    assert candidate.gradient_residual < candidate.residual_allowed < 1e-3
    assert (candidate.images - descent.layer_inputs[name]).square().mean().sqrt() < by
    assert torch.equal(candidate.layer_inputs[name], candidate.images)


def test_an_image_is_not_moved_beyond_its_error(recovered):
    attack, descent = recovered
    turned, by = with_one_unit_turned(attack.chain, descent)
    assert turned.probe.error < by / 50
    candidate = weigh_image(attack, turned).joint
    assert not candidate.consistent and candidate.gradient_residual > 1e-3
    assert torch.equal(candidate.images, turned.layer_inputs[attack.chain.layers[0].name])


def foreseen(model, shape, loss="cross_entropy", close=close_by_virtual_constraints):
    gradients = rgap.client_gradients(model, rand(1, *shape), torch.tensor([1]), loss)
    chain = rgap.prepare(model, shape)
    return foreseen_deficits(Attack(chain, receive(chain, gradients), loss, close))


def narrow(width=6):
    """A LeNet whose first layer is too narrow: 3,072 unknowns, 256·width + 75·width equations."""
    return rgap.models.lenet(widths=(width, 12, 12), bias=True).double()


def test_a_hopeless_network_is_told_at_once_with_its_deficits_and_without_solving():
    model, image = narrow(), rand(1, 3, 32, 32)
    gradients = rgap.client_gradients(model, image, torch.tensor([1]), "cross_entropy")
    rgap.models.lenet()  # what is loaded on first use is not the attack's
    begin = time.process_time()
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy")
    assert time.process_time() - begin < 1
    assert result.verdict == "rank-deficient" and result.labels.tolist() == [1]
    assert result.images.shape == image.shape and (result.images == 0.5).all()
    assert {r.name: r.deficit for r in result.layers} == {"7": 0, "4": 0, "2": 0, "0": 3072 - 6 * (256 + 75) + 36}
    assert any("'0' by 1122" in note for note in result.notes)
    assert any("rank laws say so before any system is solved; effort='full'" in note for note in result.notes)


def test_unbounded_pixels_have_no_middle():
    model = narrow()
    gradients = rgap.client_gradients(model, rand(1, 3, 32, 32), torch.tensor([1]), "cross_entropy")
    unbounded = {"pixel_range": (-math.inf, math.inf)}
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy", **unbounded)
    assert result.verdict == "rank-deficient" and not result.images.any()


def test_an_unknown_effort_is_refused():
    with pytest.raises(ValueError, match="effort is 'some'; known: auto, full"):
        rgap.reconstruct(narrow(), [], (3, 32, 32), effort="some")


@pytest.mark.parametrize(("width", "deficit"), [(14, 1018), (15, None), (16, None), (20, None)])
def test_what_the_layer_before_may_close_is_not_given_up(width, deficit):
    """CNN6-d: the range of layer 1 supplies 396 equations and its gradient 564."""
    found = foreseen(rgap.models.cnn6(width=width).double(), (3, 32, 32), "logistic")
    assert found == (None if deficit is None else {"2": deficit})


def test_the_time_that_layers_below_the_hopeless_one_take_counts_too():
    """Closing layer '2' by 64 takes less than a second; layer '0' lacks 488 of 3,072."""
    assert foreseen(rgap.models.lenet(widths=(8, 8, 8), bias=True).double(), (3, 32, 32)) == {"2": 64}


def test_without_virtual_constraints_and_behind_pooling_nothing_closes():
    assert "2" in foreseen(rgap.models.cnn6_d().double(), (3, 32, 32), "logistic", close=None)
    modules = [nn.Conv2d(3, 16, 5, 1, 2), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(16, 4, 3), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(4 * 14 * 14, 4)).double()
    assert foreseen(model, (3, 32, 32))


def test_frozen_layers_have_their_weights_alone():
    model = rgap.models.lenet(widths=(12, 12, 12), bias=True).double()
    assert foreseen(model, (3, 32, 32)) is None
    model[2].weight.requires_grad_(False)
    assert foreseen(model, (3, 32, 32)) == {"2": 3072 - 768}


def test_small_networks_are_solved_for_what_is_determined():
    modules = [nn.Conv2d(3, 2, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2 * 36, 4)]
    assert foreseen(nn.Sequential(*modules).double(), (3, 8, 8)) is None


def test_a_layer_that_takes_minutes_to_close_is_left_open_and_what_is_amplified_below_is_no_picture():
    """Behind ReLU layers of three channels the third layer lacks 160 unknowns; the second leaves 2,048 further open."""
    modules, channels = [], 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for width, stride, act in [(12, 2, nn.LeakyReLU(0.2)), (16, 2, nn.LeakyReLU(0.2)), *[(3, 1, nn.ReLU())] * 4]:
            modules += [nn.Conv2d(channels, width, 5, stride, 2), act]
            channels = width
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(192, 10))
        for p in model.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
    model = model.double()
    images, _ = rgap.data.load_images("embedded", index=[0], image_shape=(3, 32, 32))
    gradients = rgap.client_gradients(model, images.double(), torch.tensor([0]), "cross_entropy")
    begin = time.process_time()
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy", gradient_scale=1.0)
    assert time.process_time() - begin < 4
    assert result.verdict == "rank-deficient" and result.images.abs().max() < 1000


@pytest.mark.parametrize(("bounds", "compared"), [((0.0, 1.0), 1), ((-1e3, 1e3), 2), ((1e3, 1e4), 1)])
def test_a_twin_outside_the_pixel_range_is_compared_by_its_twin(bounds, compared, monkeypatch):
    calls, count = [], Attack.gradients
    monkeypatch.setattr(Attack, "gradients", lambda *given: calls.append(given) or count(*given))
    model, image = small_cnn(), randn(1, 3, 8, 8).abs().clamp(max=1)
    shared = rgap.client_gradients(model, image, LABEL)
    result = rgap.reconstruct(model, shared, (3, 8, 8), pixel_range=bounds, gradient_scale=1.0)
    assert len(calls) == 2 * compared and len(result.candidates) == 2
    for candidate in result.candidates:
        mine = rgap.client_gradients(model, candidate.images, candidate.labels)
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, shared, strict=True))
        assert candidate.consistent and worst <= candidate.residual_allowed and 0 < candidate.predicted_error < 1e-10
