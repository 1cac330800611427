import math

import pytest
import torch
from cases import CNN_SHAPE, alike, batch_cnn, quality, rand, sequential, shared_batch
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.separation import factors
from rgap.separation.joint_softmax import fit_joint_softmax
from rgap.separation.scales import refine_inputs
from rgap.separation.subspaces import first_dense, row_span
from rgap.shared_gradient import receive


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 200), (torch.float32, 90)])
@pytest.mark.parametrize("count", [2, 3, None])
def test_every_image_of_a_batch_comes_back_with_its_label(count, dtype, least, bias):
    model = batch_cnn(bias=bias, dtype=dtype)
    images, labels, gradients = shared_batch(model, count or 3)
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=count)
    assert result.verdict == "exact" and quality(result, images, labels) > least
    assert [verdict for verdict, _ in result.per_image] == ["exact"] * len(images)
    assert [report.name for report in result.layers] == ["7", "5", "2", "0"]
    (joint,) = result.candidates
    assert joint.gradient_residual < 1e-3 and joint.in_pixel_range and joint.layer_inputs["2"].shape == (
        len(images), 12, 4, 4)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_one_logit_has_twins_only_where_nothing_fixes_the_scale(bias):
    model = batch_cnn(head=(160, 80, 1), bias=bias)
    images, labels, gradients = shared_batch(model, 3, 2, "logistic")
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, batch_size=3, gradient_scale=1.0)
    assert result.verdict in ("exact", "ambiguous") and len(result.images) == 3
    assert any(len(candidates) > 1 for _, candidates in result.per_image) != bias
    for image, label in zip(images, labels, strict=True):
        every = [one for _, candidates in result.per_image for one in candidates]
        nearest = min(every, key=lambda one: (one.images[0] - image).norm())
        assert rgap.metrics.psnr_db(nearest.images, image[None]).item() > 120 and nearest.labels == label


def test_twins_give_the_same_gradient():
    model = batch_cnn(head=(60, 24, 1))
    *_, gradients = shared_batch(model, 3, 2, "logistic")
    result = rgap.reconstruct(
        model, gradients, CNN_SHAPE, batch_size=3, pixel_range=(-math.inf, math.inf), gradient_scale=1.0
    )
    assert result.verdict == "ambiguous"
    other = torch.cat([candidates[-1].images for _, candidates in result.per_image])
    assert (other - result.images).abs().max() > 0.01
    again = rgap.client_gradients(model, other, result.labels)
    for mine, theirs in zip(again, gradients, strict=True):
        assert_close(mine, theirs, rtol=0, atol=1e-8 * theirs.abs().max().item())


def test_convolutions_with_biases_choose_between_scales_of_a_head_without():
    model = batch_cnn(head=(60, 24, 1))
    for place in (0, 2):
        conv = model[place]
        model[place] = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
    model = model.double()
    images, labels, gradients = shared_batch(model, 3, 2, "logistic")
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, batch_size=3, gradient_scale=1.0)
    assert result.verdict == "exact" and quality(result, images, labels) > 120
    assert any("the last convolution decided between" in note for note in result.notes)


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
    images, labels, gradients = shared_batch(model)
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "exact" and quality(result, images, labels) > 120


@pytest.mark.slow
def test_virtual_constraints_close_a_layer_or_it_is_named():
    model = batch_cnn(((16, 4, 2, 1), (6, 3, 1, 1)), head=(80, 9))
    limit = rgap.largest_batch(model, CNN_SHAPE)
    count = limit.alone + 1
    assert limit.batch_size >= count
    images, labels, gradients = shared_batch(model, count, 9)
    options = {"loss": "cross_entropy", "batch_size": count}
    plain = rgap.reconstruct(model, gradients, CNN_SHAPE, virtual_constraints=False, **options, gradient_scale=1.0)
    assert (
        plain.verdict == "rank-deficient" and plain.candidates[0].open_layers == ("2",) and len(plain.images) == count
    )
    assert any("what they leave open was not determined" in note for note in plain.notes)
    closed = rgap.reconstruct(model, gradients, CNN_SHAPE, **options, gradient_scale=1.0)
    report = next(report for report in closed.layers if report.name == "2")
    assert report.deficit > 0 and report.virtual_constraints > report.deficit
    assert closed.verdict == "exact" and quality(closed, images, labels) > 120
    assert any("closed by virtual constraints: '2'" in note for note in closed.notes)


def test_beyond_the_limit_nothing_is_certified():
    model = batch_cnn(((12, 4, 2, 1), (4, 3, 1, 1)))
    limit = rgap.largest_batch(model, CNN_SHAPE).batch_size
    _, _, gradients = shared_batch(model, limit + 1)
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=limit + 1)
    assert result.verdict == "rank-deficient"
    assert all(verdict == "rank-deficient" for verdict, _ in result.per_image)


def test_a_batch_size_that_is_wrong_is_said():
    model = batch_cnn()
    *_, gradients = shared_batch(model)
    small = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=2)
    assert small.verdict == "exact" and len(small.images) == 3
    assert any("batch_size=2 is too small" in note for note in small.notes)
    large = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=4)
    assert large.verdict == "rank-deficient" and len(large.images) == 0 and large.images.shape == (0, *CNN_SHAPE)
    assert "if the batch has 3 images, give batch_size=3 or None" in large.notes and large.per_image == ()


def test_features_behind_a_convolution_peel_far_beyond_the_classes():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(432, 240), nn.ReLU(), nn.Linear(240, 5)]
    model, labels = nn.Sequential(*layers).double(), torch.arange(16) % 5
    images = rgap.data.load_images("embedded", 16, (3, 8, 8), seed=0)[0].double()
    gradients = rgap.client_gradients(model, images, labels, "cross_entropy")
    result = rgap.reconstruct(model, gradients, (3, 8, 8), "cross_entropy", batch_size=16, gradient_scale=1.0)
    assert result.verdict == "exact" and any("peeled off" in note for note in result.notes)
    assert (result.images[:, None] - images).flatten(2).abs().amax(2).amin(1).max() < 1e-6


def test_with_images_missing_nothing_is_returned():
    model = batch_cnn(head=(8, 5))
    _, _, gradients = shared_batch(model, 4)
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=4, device="cpu")
    assert result.verdict != "exact" and len(result.images) == 0
    assert any("with some of these missing" in note for note in result.notes)


def test_an_altered_gradient_is_certified_by_nothing():
    model = batch_cnn()
    _, _, gradients = shared_batch(model)
    gradients[0] = gradients[0] * 1.5
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "inconsistent" and any("miss the gradient by" in note for note in result.notes)


def test_an_image_without_a_scale_ends_the_attack(monkeypatch):
    model = batch_cnn()
    _, _, gradients = shared_batch(model)
    monkeypatch.setattr(factors, "scale_hypotheses", lambda *_: ([], ["no scale"]))
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=3, gradient_scale=1.0)
    assert result.verdict == "inconsistent" and len(result.images) == 0
    assert "without a scale for every image the convolutions were not solved" in result.notes


def test_labels_are_compared_in_any_order():
    model = batch_cnn()
    _, labels, gradients = shared_batch(model)
    options = {"loss": "cross_entropy", "batch_size": 3}
    assert (
        rgap.reconstruct(model, gradients, CNN_SHAPE, labels=labels.flip(0), **options, gradient_scale=1.0).verdict
        == "exact"
    )
    with pytest.raises(rgap.GradientMismatchError, match=r"labels \[1, 1, 2\] were given; .* that of \[0, 1, 2\]"):
        rgap.reconstruct(model, gradients, CNN_SHAPE, labels=[1, 1, 2], **options, gradient_scale=1.0)


def test_layers_without_weights_pass_each_image_on_or_say_what_they_lose():
    normalised = sequential(nn.BatchNorm2d(3), *batch_cnn()).eval()
    with torch.no_grad():
        normalised[0].running_mean += 0.4
        normalised[0].running_var /= 15
    pooled = sequential(
        *batch_cnn()[:2], nn.AvgPool2d(2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(108, 40), nn.LeakyReLU(0.2),
        nn.Linear(40, 5),
    )  # fmt: skip
    images, _, gradients = shared_batch(normalised)
    result = rgap.reconstruct(normalised, gradients, CNN_SHAPE, "cross_entropy", batch_size=3)
    order = rgap.metrics.match(result.images, images)
    assert result.verdict == "exact" and (result.images - images[order]).abs().max() < 1e-2
    _, _, gradients = shared_batch(pooled)
    result = rgap.reconstruct(pooled, gradients, CNN_SHAPE, "cross_entropy", batch_size=3)
    assert result.verdict == "rank-deficient" and result.candidates[0].open_layers == ("2",)


def test_what_cannot_be_taken_apart_is_refused_by_name():
    lone, relu = batch_cnn(head=(5,)), batch_cnn(activation=nn.ReLU())
    smooth = sequential(*batch_cnn()[:5], nn.Linear(256, 40), nn.Tanh(), nn.Linear(40, 5))
    for model, message in (
        (lone, "a batch of 3 images cannot be taken apart: '5' is the only fully connected layer"),
        (relu, "layer '0': a batch needs convolutions with invertible activations, and relu is constant"),
        (smooth, "layer '5': a batch is taken apart through LeakyReLU, PReLU or ReLU, and its activation is tanh"),
    ):
        _, _, gradients = shared_batch(model)
        with pytest.raises(rgap.UnsupportedLayerError, match=message):
            rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=3)


def test_fitting_the_head_takes_off_error():
    model = batch_cnn(dtype=torch.float64)
    images, labels, gradients = shared_batch(model)
    chain = rgap.prepare(model, CNN_SHAPE)
    below = first_dense(chain)
    received = receive(chain, gradients)
    truth = chain.layer_inputs(images)["5"]
    mixed = truth + 1e-3 * rand(3, 3) @ truth
    head = refine_inputs(chain.layers[below:], received.gradients, mixed, labels, "cross_entropy")
    assert_close(head.x, truth, rtol=0, atol=1e-10) and head.residual < 1e-12
    features = truth.clone().requires_grad_()
    nn.functional.cross_entropy(model[5:](features), labels).backward()
    assert_close(head.dx, features.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 150), (torch.float32, 70)])
@pytest.mark.parametrize("known", [False, True])
def test_images_that_switch_the_same_units_are_told_apart_by_the_softmax(dtype, least, known):
    model, images, labels, gradients = alike(3, dtype)
    options = {"labels": labels.flip(0) if known else None, "batch_size": None if not known else 3}
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", **options)
    assert result.verdict == "exact" and quality(result, images, labels) > least
    assert any("all images found together, by the softmax" in note for note in result.notes)


def test_where_the_softmax_has_too_few_equations_nothing_is_returned():
    model, _, _, gradients = alike(7)
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=7)
    assert result.verdict != "exact" and len(result.images) == 0
    assert "nor were all images found together, by the softmax of their outputs" in result.notes


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_found_together_are_the_true_ones(bias):
    model, images, labels, gradients = alike(3, bias=bias)
    chain = rgap.prepare(model, CNN_SHAPE)
    layers, received = chain.layers[2:], receive(chain, gradients)
    span = row_span(layers[0], received.gradients, received.precision)
    found, head = fit_joint_softmax(layers, received.gradients, span, labels=None, precision=received.precision)
    assert torch.equal(found, labels) and head.residual < 1e-12
    assert_close(head.x, chain.layer_inputs(images)["5"], rtol=0, atol=1e-9)
    assert fit_joint_softmax(layers, received.gradients, span, labels=[0, 1], precision=1e-16) is None
    assert fit_joint_softmax(layers, received.gradients, span, labels=[3, 3, 3], precision=1e-16) is None
