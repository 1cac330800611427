from dataclasses import replace

import pytest
import torch
from cases import RELU, SHAPE, batch, fcn, gradients, small_cnn
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.attack.batch import weigh_batch
from rgap.attack.candidates import Attack
from rgap.attack.descent import descend
from rgap.attack.verdict import judge
from rgap.experiments.batch_fcn import combination
from rgap.network.chain import Chain
from rgap.results import PixelRange
from rgap.separation.read import read_batch
from rgap.separation.subspaces import find_batch_size
from rgap.shared_gradient import receive


def recovered(network, images, labels, loss="logistic", size=None, dtype=torch.float32, chain=None):
    """Without the door, so that losses and activations that it does not let through yet are tested."""
    chain = chain or rgap.prepare(network, SHAPE)
    received = receive(chain, gradients(network, images, labels, loss, dtype))
    start, notes = read_batch(chain, received, find_batch_size(chain, received, size or len(images)), loss, None, 0)
    weighed = weigh_batch(Attack(chain, received, loss), descend(chain, received, start))
    return judge([weighed], notes, PixelRange())


def attack(network, shared, loss="logistic", **options):
    """The attack on a client whose loss is by the book."""
    return rgap.reconstruct(network, shared, SHAPE, loss, gradient_scale=1.0, **options)


def check_exact(result, images, labels, atol, expected="exact"):
    order = rgap.metrics.match(result.images, images)
    assert result.verdict == expected and sorted(order.tolist()) == list(range(len(images)))
    assert_close(result.images, images[order], rtol=0, atol=atol)
    assert result.labels.equal(labels[order])
    assert all(verdict == expected for verdict, _ in result.per_image)


def test_fcn3_gives_every_face_of_a_batch_back():
    images, labels = rgap.data.load_images("embedded", count=10, image_shape=(1, 28, 28))
    chain = rgap.prepare(rgap.models.fcn3(), (1, 28, 28))
    result = rgap.reconstruct(
        chain, rgap.client_gradients(chain.model, images, labels), batch_size=10, gradient_scale=1.0
    )
    check_exact(result, images.double(), labels, 1e-4)
    assert result.candidates[0].gradient_residual < 1e-5 and len(result.candidates) == 1
    assert any("10 of 10 images found, in" in note for note in result.notes)


HEADS = [
    ("logistic", 1, (120, 30)),
    ("logistic", 1, (120, 30, 10)),
    ("cross_entropy", 6, (120, 30)),
    ("cross_entropy", 6, (60,)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("loss", "outputs", "widths"), HEADS)
def test_heads_biases_and_depths(loss, outputs, widths, bias):
    network, (images, labels) = fcn(widths, outputs, bias, seed=1), batch(4, max(outputs, 2))
    check_exact(recovered(network, images, labels, loss, dtype=torch.float64), images, labels, 1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_relu(bias):
    network, (images, labels) = fcn((200, 40), bias=bias, activation=nn.ReLU()), batch(6)
    chain = rgap.prepare(fcn((200, 40), bias=bias), SHAPE)
    layers = [replace(layer, activation=RELU) for layer in chain.layers[:-1]]
    chain = Chain(network, SHAPE, (*layers, chain.layers[-1]), chain.parameters)
    check_exact(recovered(network, images, labels, chain=chain), images, labels, 1e-4)


def test_each_image_has_its_twin_and_the_layers_their_ranks():
    network, (images, labels) = fcn(), batch(4)
    result = attack(network, gradients(network, images, labels), batch_size=4, device="cpu")
    for (verdict, candidates), image in zip(result.per_image, result.images, strict=True):
        assert verdict == "exact" and candidates[0].images[0].equal(image)
        assert candidates[0].images.shape == (1, *SHAPE) and candidates[0].gradient_residual < 1e-5
        assert 1 <= len(candidates) <= 2
    frame = result.to_frame().set_index("name")
    assert frame.index.tolist() == ["3", "1"] and (frame["rank"] == 4).all() and (frame["deficit"] == 0).all()
    assert result.candidates[0].layer_inputs["5"].shape == (4, 30)


def test_two_scales_inside_the_range_are_ambiguous():
    network, (images, labels) = fcn(), batch(3)
    shared = gradients(network, images, labels)
    wide = attack(network, shared, batch_size=3, pixel_range=(-1e9, 1e9))
    twins = [verdict == "ambiguous" for verdict, candidates in wide.per_image if len(candidates) == 2]
    assert twins and all(twins) and wide.verdict == "ambiguous"
    assert any("between which the pixel range does not choose" in note for note in wide.notes)
    narrow = attack(network, shared, batch_size=3)
    assert any("the pixel range chose between two scales" in note for note in narrow.notes)


def test_the_batch_size_is_found():
    network = fcn()
    for count in (1, 2, 9):
        images, labels = batch(count)
        result = attack(network, gradients(network, images, labels), batch_size=None)
        check_exact(result, images, labels, 1e-3, "ambiguous") if count > 1 else assert_close(
            result.images, images, rtol=0, atol=1e-4
        )
        assert f"has {count} singular values above rounding" in result.notes[0]


@pytest.mark.parametrize("bias", [False, True])
def test_a_wrong_batch_size_is_said(bias):
    network, (images, labels) = fcn(bias=bias), batch(5)
    shared = gradients(network, images, labels)
    small = attack(network, shared, batch_size=3)
    check_exact(small, images, labels, 1e-3, "exact" if bias else "ambiguous")  # lengths rest on the size
    assert "batch_size=3 is too small, at least 5 images have this gradient" in small.notes[0]
    unknown = attack(network, shared, batch_size=None)
    for result in (small, unknown):
        assert any("make a batch look smaller than it is" in note for note in result.notes) != bias
    large = attack(network, shared, batch_size=7)
    assert large.verdict == "rank-deficient" and len(large.images) == 5
    assert "2 fewer than the batch has images" in large.notes[0]
    assert all(verdict != "exact" for verdict, _ in large.per_image)


@pytest.mark.parametrize("bias", [False, True])
def test_equal_images_collapse_and_are_said(bias):
    network, (images, labels) = fcn(bias=bias), batch(5)
    images[1], labels[1] = images[0], labels[0]
    result = recovered(network, images, labels)
    assert result.verdict == "rank-deficient" and len(result.images) == 4
    assert "equal images" in result.notes[0]
    unlike = [v for v, _ in result.per_image if v != "exact"]
    assert len(unlike) == (1 if bias else 4)  # with a bias the share tells which image is there twice
    if bias:
        assert any(
            "the gradient shares of 1 of 4 images are not those of one image each" in note for note in result.notes
        )


def test_an_image_of_zeros_is_missing_without_bias_and_found_with():
    images, labels = batch(4)
    images[2] = 0
    without = recovered(fcn(), images, labels)
    assert without.verdict == "rank-deficient" and len(without.images) == 3 and "of zeros" in without.notes[0]
    check_exact(recovered(fcn(bias=True), images, labels), images, labels, 1e-3)


def test_beyond_the_limits_nothing_is_certified():
    images, labels = batch(12)
    narrow = recovered(fcn((120, 3), seed=2), images, labels)
    assert narrow.verdict == "rank-deficient" and any("it has only 3 rows" in note for note in narrow.notes)
    none = recovered(fcn((24, 12)), images, labels)
    assert len(none.images) == 0 and none.verdict != "exact" and none.candidates[0].gradient_residual == 1
    assert any("24 units, too few for a batch of this size" in note for note in none.notes)
    full = recovered(fcn((8, 30)), images, labels)
    assert "a gradient of 8 rows" in full.notes[0]


def test_noise_is_not_taken_for_images():
    network, (images, labels) = fcn(), batch(3)
    noisy = [g + 0.3 * g.std() * torch.randn(g.shape, generator=torch.Generator().manual_seed(0))
             for g in gradients(network, images, labels)]  # fmt: skip
    result = attack(network, noisy, batch_size=3)
    assert result.verdict != "exact"


def test_labels_are_compared_in_any_order():
    network, (images, labels) = fcn(), batch(3)
    shared = gradients(network, images, labels)
    assert attack(network, shared, batch_size=3, labels=labels.flip(0)).verdict == "exact"
    with pytest.raises(rgap.GradientMismatchError, match=r"labels \[1, 1, 1\] were given; .* that of \[0, 0, 1\]"):
        attack(network, shared, batch_size=3, labels=[1, 1, 1])
    with pytest.raises(ValueError, match=r"labels are .* of shape \(2,\); give an integer for each image, 3"):
        attack(network, shared, batch_size=3, labels=[1, 1])


def test_networks_that_cannot_be_taken_apart_are_refused():
    cnn = small_cnn()
    shared = rgap.client_gradients(cnn, torch.rand(2, 3, 8, 8).double(), torch.tensor([0, 1]))
    with pytest.raises(rgap.UnsupportedLayerError, match="a batch of 2 images cannot be taken apart: '5' is the only"):
        rgap.reconstruct(cnn, shared, (3, 8, 8), batch_size=2, gradient_scale=1.0)
    with pytest.raises(ValueError, match="batch_size is None, and the gradient of '5' has a single row"):
        rgap.reconstruct(cnn, shared, (3, 8, 8), batch_size=None, gradient_scale=1.0)
    images, labels = batch(2)
    for network, message in (
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).double(), "a batch through a single layer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 60, bias=False), nn.LeakyReLU(0.1), nn.Linear(60, 1)).double(),
         "layer '1' has no bias, and '3' has one"),
    ):  # fmt: skip
        with pytest.raises(rgap.UnsupportedLayerError, match=message):
            attack(network, gradients(network, images, labels), batch_size=2)


def test_a_single_layer_after_convolutions_tells_the_batch_size_it_cannot_take_apart():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 5)).double()
    images, labels = batch(3)
    with pytest.raises(rgap.UnsupportedLayerError, match="a batch of 3 images cannot be taken apart: '3' is the only"):
        rgap.reconstruct(
            network, gradients(network, images, labels, "cross_entropy"), SHAPE, "cross_entropy", batch_size=None
        )


def test_the_papers_combination_is_one_image_that_mixes_the_batch():
    network, (images, labels) = fcn(), batch(4)
    blend = combination(network, gradients(network, images, labels, dtype=torch.float64), SHAPE)
    assert blend.images.shape == (1, *SHAPE) and blend.verdict != "exact"
    weights = torch.linalg.lstsq(images.flatten(1).T, blend.images.flatten()[:, None]).solution
    assert_close(
        images.flatten(1).T @ weights, blend.images.flatten()[:, None], rtol=0, atol=1e-6 * blend.images.abs().max()
    )


def weighted(network, images, labels, loss, weights):
    parameters = dict(network.named_parameters())
    return list(rgap.client.gradients_of(network, parameters, images, labels, loss, weights=weights).values())


@pytest.mark.parametrize(("outputs", "bias"), [(1, True), (10, True), (10, False)])
@pytest.mark.parametrize("kind", ["accumulated", "weighted"])
def test_factors_of_a_batch_are_estimated(outputs, bias, kind):
    """Accumulation gives one factor for all, class weights one for each label."""
    network, (images, labels) = fcn((120, 40), outputs=outputs, bias=bias), batch(4, max(outputs, 2))
    weights = torch.full((4,), 0.25) if kind == "accumulated" else torch.where(labels == 1, 3.0, 1.0)
    loss = "logistic" if outputs == 1 else "cross_entropy"
    result = rgap.reconstruct(network, weighted(network, images, labels, loss, weights), SHAPE, loss, batch_size=4)
    check_exact(result, images, labels, 1e-6)
    order = rgap.metrics.match(result.images, images)
    assert_close(torch.tensor([c[0].gradient_scale for _, c in result.per_image]), weights[order], rtol=1e-6, atol=0)
    assert result.gradient_scale == pytest.approx(weights.mean().item(), rel=1e-6)
    assert any("times 0.25 (averaged over 4" in n or "times 1 (by the book), 3 (summed" in n for n in result.notes)


def test_one_output_leaves_the_brightness_of_a_batch_open_unless_the_scale_is_given():
    """FCN3 with positives weighted 3: images of twice the brightness had a gradient as good as the true ones."""
    network = rgap.models.fcn3()
    images, _ = rgap.data.load_images("embedded", count=5, image_shape=(1, 28, 28))
    labels = torch.tensor([0, 1, 0, 1, 1])
    shared = weighted(network, images, labels, "logistic", torch.where(labels == 1, 3.0, 1.0))
    result = rgap.reconstruct(network, shared, (1, 28, 28), batch_size=5)
    assert result.verdict == "ambiguous" and result.gradient_scale is None
    assert all(verdict == "ambiguous" for verdict, _ in result.per_image)
    assert any("leave the pixel range" in note for note in result.notes)
    assert any("brightness is not determined" in note for note in result.notes)
    scaled = [4 * g for g in rgap.client_gradients(network, images, labels)]
    known = rgap.reconstruct(network, scaled, (1, 28, 28), batch_size=5, gradient_scale=4.0)
    check_exact(known, images.double(), labels, 1e-4)
    wrong = rgap.reconstruct(network, scaled, (1, 28, 28), batch_size=5, gradient_scale=2.0)
    assert wrong.verdict == "ambiguous" and all(verdict != "exact" for verdict, _ in wrong.per_image)


def test_an_image_of_a_gradient_by_other_weights_is_promised_no_better_than_its_share_fits():
    network, (images, labels) = fcn(outputs=6, bias=True), batch(4, 6)
    client, generator = fcn(outputs=6, bias=True), torch.Generator().manual_seed(1)
    for weights in client.parameters():
        weights.data *= 1 + 1e-4 * torch.randn(weights.shape, generator=generator).double()
    result = attack(network, gradients(client, images, labels, "cross_entropy"), "cross_entropy", batch_size=4)
    assert result.verdict == "inconsistent" and [verdict for verdict, _ in result.per_image] == ["exact"] * 4
    order = rgap.metrics.match(result.images, images)
    rmse = (result.images - images[order]).square().flatten(1).mean(1).sqrt()
    predicted = torch.tensor([found[0].predicted_error for _, found in result.per_image]).double()
    assert (rmse > 5e-6).all() and (rmse < 3 * predicted).all()


@pytest.mark.parametrize("bias", [False, True])
def test_smoothed_labels_of_a_batch_certify_nothing(bias):
    network, (images, labels) = fcn((120, 40), outputs=10, bias=bias), batch(4, 10)
    shared = rgap.client_gradients(network, images, labels, "cross_entropy", label_smoothing=0.1)
    result = rgap.reconstruct(network, shared, SHAPE, "cross_entropy", batch_size=4)
    assert result.verdict in ("inconsistent", "ambiguous")
    assert all(verdict != "exact" for verdict, _ in result.per_image)


def test_two_classes_without_bias_and_a_black_image_certify_no_length():
    network, (images, labels) = fcn(outputs=2), batch(3)
    images[0] = 0.0
    shared = rgap.client_gradients(network, images, labels, "cross_entropy")
    for options in ({}, {"gradient_scale": 1.0}):
        result = rgap.reconstruct(network, shared, SHAPE, "cross_entropy", batch_size=None, **options)
        assert result.verdict == "ambiguous"
        assert any("make a batch look smaller than it is" in note for note in result.notes)
