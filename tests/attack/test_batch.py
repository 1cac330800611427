import math
from itertools import pairwise

import pytest
import torch
from cases import rand, sequential
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.attack.pattern import batch_on_pattern, settle_signs
from rgap.separation import read as batch_reading
from rgap.separation.joint_softmax import fit_joint_softmax
from rgap.separation.scales import refine_inputs
from rgap.separation.subspaces import first_dense, row_span
from rgap.shared_gradient import receive

SHAPE = (3, 8, 8)
FULL = ((12, 4, 2, 1), (16, 3, 1, 1))


def network(specs=FULL, head=(40, 5), bias=False, activation=None, dtype=torch.float64):
    """Convolutions (channels, kernel, stride, padding) for (3, 8, 8), then fully connected layers."""
    modules, channels, size = [], 3, 8
    for outputs, kernel, stride, padding in specs:
        modules += [nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias), activation or nn.LeakyReLU(0.2)]
        channels, size = outputs, (size + 2 * padding - kernel) // stride + 1
    modules.append(nn.Flatten())
    for inputs, outputs in pairwise((channels * size * size, *head)):
        modules += [nn.Linear(inputs, outputs, bias=bias), nn.LeakyReLU(0.2)]
    return sequential(*modules[:-1]).to(dtype)


def shared(model, count=3, classes=5, loss="cross_entropy"):
    images, labels = rand(count, *SHAPE) ** 2, torch.arange(count) % classes
    dtype = next(model.parameters()).dtype
    return images, labels, rgap.client_gradients(model, images.to(dtype), labels, loss)


def quality(result, images, labels):
    order = rgap.metrics.match(result.images, images)
    assert torch.equal(result.labels, labels[order])
    return rgap.metrics.psnr_db(result.images, images[order]).min()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 200), (torch.float32, 90)])
@pytest.mark.parametrize("count", [2, 3, None])
def test_every_image_of_a_batch_comes_back_with_its_label(count, dtype, least, bias):
    model = network(bias=bias, dtype=dtype)
    images, labels, gradients = shared(model, count or 3)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=count)
    assert result.verdict == "exact" and quality(result, images, labels) > least
    assert [verdict for verdict, _ in result.per_image] == ["exact"] * len(images)
    assert [report.name for report in result.layers] == ["7", "5", "2", "0"]
    (joint,) = result.candidates
    assert joint.gradient_residual < 1e-3 and joint.in_pixel_range and joint.layer_inputs["2"].shape == (
        len(images), 12, 4, 4)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_one_logit_has_twins_only_where_nothing_fixes_the_scale(bias):
    model = network(head=(160, 80, 1), bias=bias)
    images, labels, gradients = shared(model, 3, 2, "logistic")
    result = rgap.reconstruct(model, gradients, SHAPE, batch_size=3)
    assert result.verdict in ("exact", "ambiguous") and len(result.images) == 3
    assert any(len(candidates) > 1 for _, candidates in result.per_image) != bias
    for image, label in zip(images, labels, strict=True):
        every = [one for _, candidates in result.per_image for one in candidates]
        nearest = min(every, key=lambda one: (one.images[0] - image).norm())
        assert rgap.metrics.psnr_db(nearest.images, image[None]).item() > 120 and nearest.labels == label


def test_twins_give_the_same_gradient():
    model = network(head=(60, 24, 1))
    *_, gradients = shared(model, 3, 2, "logistic")
    result = rgap.reconstruct(model, gradients, SHAPE, batch_size=3, pixel_range=(-math.inf, math.inf))
    assert result.verdict == "ambiguous"
    other = torch.cat([candidates[-1].images for _, candidates in result.per_image])
    assert (other - result.images).abs().max() > 0.01
    again = rgap.client_gradients(model, other, result.labels)
    for mine, theirs in zip(again, gradients, strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-8 * theirs.abs().max().item())


def test_convolutions_with_biases_choose_between_scales_of_a_head_without():
    model = network(head=(60, 24, 1))
    for place in (0, 2):
        conv = model[place]
        model[place] = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    model = model.double()
    images, labels, gradients = shared(model, 3, 2, "logistic")
    result = rgap.reconstruct(model, gradients, SHAPE, batch_size=3)
    assert result.verdict == "exact" and quality(result, images, labels) > 120
    assert any("the last convolution chose between" in note for note in result.notes)


def test_pooling_normalisation_and_smooth_activations():
    modules = [
        nn.Conv2d(3, 16, 3, 1, 1),
        nn.AvgPool2d(2),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ELU(),
        nn.Flatten(),
    ]
    model = sequential(*modules, nn.Linear(256, 40), nn.LeakyReLU(0.2), nn.Linear(40, 5))
    normalisation = nn.BatchNorm2d(16).double()
    normalisation.running_var += rand(16)
    model = nn.Sequential(*model[:4], normalisation, *model[4:]).eval()
    images, labels, gradients = shared(model)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "exact" and quality(result, images, labels) > 120


def test_virtual_constraints_close_a_layer_or_it_is_named():
    model = network(((16, 4, 2, 1), (6, 3, 1, 1)), head=(80, 9))
    limit = rgap.largest_batch(model, SHAPE)
    count = limit.alone + 1
    assert limit.batch_size >= count
    images, labels, gradients = shared(model, count, 9)
    options = {"loss": "cross_entropy", "batch_size": count}
    plain = rgap.reconstruct(model, gradients, SHAPE, virtual_constraints=False, **options)
    assert (
        plain.verdict == "rank-deficient" and plain.candidates[0].open_layers == ("2",) and len(plain.images) == count
    )
    assert any("what they leave open was not determined" in note for note in plain.notes)
    closed = rgap.reconstruct(model, gradients, SHAPE, **options)
    report = next(report for report in closed.layers if report.name == "2")
    assert report.deficit > 0 and report.virtual_constraints > report.deficit
    assert closed.verdict == "exact" and quality(closed, images, labels) > 120
    assert any("closed by virtual constraints: '2'" in note for note in closed.notes)


def test_beyond_the_limit_nothing_is_certified():
    model = network(((12, 4, 2, 1), (4, 3, 1, 1)))
    limit = rgap.largest_batch(model, SHAPE).batch_size
    _, _, gradients = shared(model, limit + 1)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=limit + 1)
    assert result.verdict == "rank-deficient"
    assert all(verdict == "rank-deficient" for verdict, _ in result.per_image)


def test_a_batch_size_that_is_wrong_is_said():
    model = network()
    *_, gradients = shared(model)
    small = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=2)
    assert small.verdict == "exact" and len(small.images) == 3
    assert any("batch_size=2 is too small" in note for note in small.notes)
    large = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=4)
    assert large.verdict == "rank-deficient" and len(large.images) == 0 and large.images.shape == (0, *SHAPE)
    assert "if the batch has 3 images, say batch_size=3 or None" in large.notes and large.per_image == ()


def test_with_images_missing_nothing_is_returned():
    model = network(head=(8, 5))
    _, _, gradients = shared(model, 4)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=4, device="cpu")
    assert result.verdict != "exact" and len(result.images) == 0
    assert any("with some of these missing" in note for note in result.notes)


def test_an_altered_gradient_is_certified_by_nothing():
    model = network()
    _, _, gradients = shared(model)
    gradients[0] = gradients[0] * 1.5
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "inconsistent" and any("misses the gradient by" in note for note in result.notes)


def test_an_image_without_a_scale_ends_the_attack(monkeypatch):
    model = network()
    _, _, gradients = shared(model)
    monkeypatch.setattr(batch_reading, "scale_hypotheses", lambda *_: ([], ["no scale"]))
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "inconsistent" and len(result.images) == 0
    assert "without a scale for every image the convolutions were not solved" in result.notes


def test_labels_are_compared_in_any_order():
    model = network()
    _, labels, gradients = shared(model)
    options = {"loss": "cross_entropy", "batch_size": 3}
    assert rgap.reconstruct(model, gradients, SHAPE, labels=labels.flip(0), **options).verdict == "exact"
    with pytest.raises(rgap.GradientMismatchError, match=r"labels \[1, 1, 2\] were given; .* that of \[0, 1, 2\]"):
        rgap.reconstruct(model, gradients, SHAPE, labels=[1, 1, 2], **options)


def test_layers_without_weights_pass_each_image_on_or_say_what_they_lose():
    normalised = sequential(nn.BatchNorm2d(3), *network()).eval()
    with torch.no_grad():
        normalised[0].running_mean += 0.4
        normalised[0].running_var /= 15
    pooled = sequential(
        *network()[:2], nn.AvgPool2d(2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(108, 40), nn.LeakyReLU(0.2),
        nn.Linear(40, 5),
    )  # fmt: skip
    images, _, gradients = shared(normalised)
    result = rgap.reconstruct(normalised, gradients, SHAPE, "cross_entropy", batch_size=3)
    order = rgap.metrics.match(result.images, images)
    assert result.verdict == "exact" and (result.images - images[order]).abs().max() < 1e-2
    _, _, gradients = shared(pooled)
    result = rgap.reconstruct(pooled, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "rank-deficient" and result.candidates[0].open_layers == ("2",)


def test_what_cannot_be_taken_apart_is_refused_by_name():
    lone, relu = network(head=(5,)), network(activation=nn.ReLU())
    smooth = sequential(*network()[:5], nn.Linear(256, 40), nn.Tanh(), nn.Linear(40, 5))
    for model, message in (
        (lone, "a batch of 3 images cannot be taken apart: '5' is the only fully connected layer"),
        (relu, "layer '0': a batch is taken through convolutions with invertible activations, and relu is constant"),
        (smooth, "layer '5': a batch is taken apart through LeakyReLU, PReLU or ReLU, and its activation is tanh"),
    ):
        _, _, gradients = shared(model)
        with pytest.raises(rgap.UnsupportedLayerError, match=message):
            rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)


def test_fitting_the_head_takes_off_error():
    model = network(dtype=torch.float64)
    images, labels, gradients = shared(model)
    chain = rgap.prepare(model, SHAPE)
    below = first_dense(chain)
    received = receive(chain, gradients)
    truth = chain.layer_inputs(images)["5"]
    mixed = truth + 1e-3 * rand(3, 3) @ truth
    head = refine_inputs(chain.layers[below:], received.gradients, mixed, labels, "cross_entropy")
    assert_close(head.x, truth, rtol=0, atol=1e-10) and head.residual < 1e-12
    features = truth.clone().requires_grad_()
    nn.functional.cross_entropy(model[5:](features), labels).backward()
    assert_close(head.dx, features.grad, rtol=0, atol=1e-10)


def test_a_unit_next_to_zero_is_turned_where_the_identities_say_so():
    model = network(bias=True)
    images, labels, gradients = shared(model)
    chain = rgap.prepare(model, SHAPE)
    layer, G = chain.layers[0], gradients[0]
    x = model[:2](images).detach().requires_grad_()
    nn.functional.cross_entropy(model[2:](x), labels).backward()
    dx, x = x.grad, x.detach()
    place = tuple(torch.nonzero(x[:1].abs() == x[:1].abs().min())[0].tolist())
    moved = x.clone()
    moved[place] = -moved[place]
    found = settle_signs(layer, G, moved, dx, doubt=1.5 * x[place].abs().item() / x.square().mean().sqrt().item())
    assert torch.equal(found > 0, x > 0) and torch.equal(settle_signs(layer, G, x, dx, doubt=0.05), x)
    linear = rgap.prepare(network(activation=nn.Identity()), SHAPE).layers[0]
    assert settle_signs(linear, G, x, dx, doubt=0.1) is x


def test_images_are_moved_to_the_signs_that_were_recovered(monkeypatch):
    model = network(bias=True)
    images, _, _ = shared(model)
    chain = rgap.prepare(model, SHAPE)
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
    smooth = rgap.prepare(network(activation=nn.Tanh()), SHAPE)
    assert batch_on_pattern(smooth, near, positive) is near
    monkeypatch.setattr("rgap.attack.pattern.MAX_PATTERN_FLIPS", 0)
    assert torch.equal(batch_on_pattern(chain, near, positive), near)


def alike(count, dtype=torch.float64, bias=True):
    """A network in which biases dominate, so that all images switch the same units."""
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, 12, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2), nn.Conv2d(12, 16, 3, 1, 1, bias=bias)]
    modules += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 24, bias=bias), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*modules, nn.Linear(24, 8, bias=bias)).to(dtype)
    images, labels = 0.4 + 0.2 * rand(count, *SHAPE), torch.arange(count)
    return model, images, labels, rgap.client_gradients(model, images.to(dtype), labels, "cross_entropy")


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 150), (torch.float32, 70)])
@pytest.mark.parametrize("known", [False, True])
def test_images_that_switch_the_same_units_are_told_apart_by_the_softmax(dtype, least, known):
    model, images, labels, gradients = alike(3, dtype)
    options = {"labels": labels.flip(0) if known else None, "batch_size": None if not known else 3}
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", **options)
    assert result.verdict == "exact" and quality(result, images, labels) > least
    assert any("all images found together, by the softmax" in note for note in result.notes)


def test_where_the_softmax_has_too_few_equations_nothing_is_returned():
    model, _, _, gradients = alike(7)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=7)
    assert result.verdict != "exact" and len(result.images) == 0
    assert "nor were all images found together, by the softmax of their outputs" in result.notes


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_found_together_are_the_true_ones(bias):
    model, images, labels, gradients = alike(3, bias=bias)
    chain = rgap.prepare(model, SHAPE)
    layers, received = chain.layers[2:], receive(chain, gradients)
    span = row_span(layers[0], received.gradients, received.precision)
    found, head = fit_joint_softmax(layers, received.gradients, span, labels=None, precision=received.precision)
    assert torch.equal(found, labels) and head.residual < 1e-12
    assert_close(head.x, chain.layer_inputs(images)["5"], rtol=0, atol=1e-9)
    assert fit_joint_softmax(layers, received.gradients, span, labels=[0, 1], precision=1e-16) is None
    assert fit_joint_softmax(layers, received.gradients, span, labels=[3, 3, 3], precision=1e-16) is None
