import sys

import pytest
import torch
from cases import batch, fcn, rand, sequential, small_cnn
from torch import nn
from torch.testing import assert_close

import rgap
from rgap import client
from rgap.isolation import dense_systems_on

SHAPE = (3, 8, 8)
IMAGE = rand(1, *SHAPE)
NETWORK = small_cnn(bias=True)


def with_outputs(outputs, bias=True, seed=0, size=1.0):
    """`small_cnn` with so many outputs."""
    *modules, _ = small_cnn(seed, bias=bias)
    return nn.Sequential(*modules, *sequential(nn.Linear(160, outputs, bias=bias), seed=seed + 9, scale=size))


TEN = with_outputs(10)


def gradients_for(network, image=IMAGE, label=1, dtype=None, loss="logistic"):
    gradients = rgap.client_gradients(network, image, torch.tensor([label]), loss)
    return gradients if dtype is None else [g.to(dtype) for g in gradients]


def attack(network, gradients, loss="logistic", **options):
    """The attack on a client whose loss is by the book."""
    return rgap.reconstruct(network, gradients, SHAPE, loss, gradient_scale=1.0, **options)


def with_margin(mu, image=IMAGE, label=1):
    """A bias-free network whose margin on the image is mu, by the scale of its last layer."""
    network = small_cnn()
    with torch.no_grad():
        network[-1].weight.mul_((2 * label - 1) * mu / network(image).item())
    return network


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 90), (torch.float64, 160)])
@pytest.mark.parametrize(("name", "indices"), [("cnn6", [0, 1, 2]), ("fcn3", [0, 99])])
def test_the_papers_networks_give_real_images_back(name, indices, dtype, least):
    shape = rgap.models.IMAGE_SHAPES[name]
    images, labels = rgap.data.load_images("embedded", image_shape=shape, index=indices, classes=2)
    for seed, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        chain = rgap.prepare(getattr(rgap.models, name)(seed=seed).to(dtype), shape)
        gradients = rgap.client_gradients(chain.model, image, label)
        assert {g.dtype for g in gradients} == {dtype}
        result = rgap.reconstruct(chain, gradients, gradient_scale=1.0)
        assert rgap.metrics.psnr_db(result.images, image).item() >= least
        assert result.verdict == "exact" and result.labels.equal(label)
        assert result.images.dtype == torch.float64


@pytest.mark.slow
def test_cnn6_d_is_rank_deficient_and_says_where():
    images, labels = rgap.data.load_images("embedded", index=0, classes=2)
    model = rgap.models.cnn6_d().double()
    gradients = rgap.client_gradients(model, images, labels)
    result = rgap.reconstruct(model, gradients, (3, 32, 32), virtual_constraints=False, gradient_scale=1.0)
    assert result.verdict == "rank-deficient"
    assert result.to_frame().set_index("name").deficit.to_dict()["2"] == 280
    assert any("layers short of full rank: '2' by 280" in note for note in result.notes)


def test_the_ways_to_give_model_and_gradients_agree():
    gradients = gradients_for(NETWORK, dtype=torch.float32)
    expected = attack(NETWORK, gradients, device="cpu")
    chain = rgap.prepare(NETWORK, SHAPE)
    named = dict(zip(dict(NETWORK.named_parameters()), gradients, strict=True))
    for model, given in [(chain, gradients), (NETWORK, named), (NETWORK, [g.double() for g in gradients])]:
        result = attack(model, given)
        assert result.images.equal(expected.images) and result.verdict == expected.verdict == "exact"
    assert rgap.reconstruct(chain, gradients, gradient_scale=1.0).images.equal(expected.images)


def test_the_second_attack_on_a_chain_finds_its_factors_made():
    model = rgap.models.cnn6()
    chain = rgap.prepare(model, (3, 32, 32))
    images, labels = rgap.data.load_images("embedded", index=[0, 1], classes=2)
    assert not any(layer.cache for layer in chain.layers)
    rgap.reconstruct(chain, rgap.client_gradients(model, images[:1], labels[:1]), gradient_scale=1.0)
    kept = [dict(layer.cache) for layer in chain.layers]
    assert any("weight_factor" in cache for cache in kept)
    gradients = rgap.client_gradients(model, images[1:], labels[1:])
    second = rgap.reconstruct(chain, gradients, gradient_scale=1.0)
    for layer, cache in zip(chain.layers, kept, strict=True):
        assert layer.cache.keys() == cache.keys()
        assert all(layer.cache[key] is value for key, value in cache.items())
    fresh = rgap.reconstruct(model, gradients, (3, 32, 32), gradient_scale=1.0)
    assert_close(second.images, fresh.images, rtol=0, atol=1e-9)


def test_every_layers_input_is_in_the_candidate_and_every_layer_has_a_report():
    result = attack(NETWORK, gradients_for(NETWORK))
    best = result.candidates[0]
    truth = rgap.prepare(NETWORK, SHAPE).layer_inputs(IMAGE)
    for name, expected in truth.items():
        assert_close(best.layer_inputs[name], expected, rtol=0, atol=1e-9)
    assert [r.name for r in result.layers] == ["5", "2", "0"] and best.layers == result.layers
    assert best.gradient_residual < 1e-12 and best.in_pixel_range and result.images.equal(best.images)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("loss", "outputs"), [("cross_entropy", 2), ("cross_entropy", 10), ("mse", 1), ("mse", 2), ("mse", 10)]
)
def test_every_loss_gives_its_image_and_label_back(loss, outputs, bias):
    for seed in range(3):
        network = with_outputs(outputs, bias, seed)
        label = (seed + 1) % max(outputs, 2)
        for dtype, least in ((torch.float64, 160), (torch.float32, 85)):
            gradients = gradients_for(network.to(dtype), label=label, loss=loss)
            result = attack(network, gradients, loss)
            found = [c for c in result.candidates if c.labels.tolist() == [label]]
            assert max(rgap.metrics.psnr_db(c.images, IMAGE).item() for c in found) > least
            assert result.verdict in (("exact", "ambiguous") if outputs < 3 and not bias else ("exact",))
            right = attack(network, gradients, loss, labels=[label])
            assert right.verdict in ("exact", "ambiguous") and right.labels.tolist() == [label]


def test_a_squared_errors_twins_may_have_either_label():
    network = with_outputs(1, bias=False)
    with torch.no_grad():
        network[-1].weight.mul_(1.6 / network(IMAGE).item())
    gradients = gradients_for(network, loss="mse")
    result = attack(network, gradients, "mse")
    assert {c.labels.item() for c in result.candidates} == {0, 1} and result.verdict == "ambiguous"
    for c in result.candidates:
        for one, shared in zip(gradients_for(network, c.images, c.labels.item(), loss="mse"), gradients, strict=True):
            assert (one - shared).norm() < 1e-12 * shared.norm()


def test_the_notes_say_on_what_evidence_the_label_was_decided():
    by_head = rgap.reconstruct(TEN, gradients_for(TEN, label=7, loss="cross_entropy"), SHAPE, "cross_entropy").notes
    assert by_head[0].startswith("label 7 by the head's equations, missed by") and "the next best" in by_head[0]
    network = small_cnn()
    by_layers = attack(network, gradients_for(network)).notes
    assert by_layers[0].startswith("label 1, decided by the layers' identities: residual")
    assert ", against" in by_layers[0] and by_layers[0].endswith("for label 0")


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 50), (torch.bfloat16, 30)])
@pytest.mark.parametrize(("loss", "outputs"), [("logistic", 1), ("cross_entropy", 10), ("mse", 10)])
def test_a_client_that_computes_in_half_precision_is_attacked(loss, outputs, dtype, least):
    network = with_outputs(outputs).to(dtype)
    gradients = gradients_for(network, loss=loss)
    assert {g.dtype for g in gradients} == {dtype}
    result = attack(network, gradients, loss)
    assert result.images.dtype == torch.float64 and result.verdict == "exact"
    assert rgap.metrics.psnr_db(result.images, IMAGE).item() > least


@pytest.mark.parametrize("virtual_constraints", [False, True])
def test_gradients_that_underflow_are_noted_and_never_certify(virtual_constraints):
    network = with_outputs(1, size=1e-6).half()
    gradients = gradients_for(network)
    assert not gradients[2].any() or gradients[2].norm() < 1e-5
    result = attack(network, gradients, virtual_constraints=virtual_constraints)
    assert result.notes[0].startswith("lost to underflow and not used: the gradient of '0.weight'")
    assert result.verdict == "rank-deficient" and result.images.isfinite().all()
    cast = attack(network, [g.double() for g in gradients], virtual_constraints=virtual_constraints)
    assert cast.verdict == "rank-deficient"


def three_ways(network, gradients, frozen):
    """A gradient without that of the `frozen` parameters: None in a list, a mapping without them, zeros."""
    named = dict(zip(dict(network.named_parameters()), gradients, strict=True))
    left = {name: g for name, g in named.items() if name not in frozen}
    return [left.get(name) for name in named], left, [left.get(name, torch.zeros_like(g)) for name, g in named.items()]


@pytest.mark.parametrize("frozen", [("2.weight", "2.bias"), ("0.weight",), ("0.weight", "0.bias", "2.weight")])
def test_what_a_client_does_not_train_is_not_used_however_it_says_so(frozen):
    modules = [nn.Conv2d(3, 14, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(14, 20, 3, 1, 1), nn.LeakyReLU(0.2)]
    network = sequential(*modules, nn.Flatten(), nn.Linear(320, 1))
    note = f"not shared, or zero, and not used: the gradient of {', '.join(map(repr, frozen))}"
    for given in three_ways(network, gradients_for(network), frozen):
        result = attack(network, given)
        assert result.verdict == "exact" and note in result.notes
        assert rgap.metrics.psnr_db(result.images, IMAGE).item() > 150


def test_a_frozen_layer_that_its_weights_do_not_invert_stays_open():
    modules = [nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 4)]
    network = sequential(*modules)
    network[0].requires_grad_(False)
    gradients = rgap.client_gradients(network, IMAGE, torch.tensor([2]), "cross_entropy")
    for given in (gradients, gradients[2:], three_ways(network, gradients, ("0.weight", "0.bias"))[1]):
        result = rgap.reconstruct(network, given, SHAPE, "cross_entropy")
        assert result.verdict == "rank-deficient" and result.layers[-1].deficit == 192 - 128


@pytest.mark.parametrize("channels", [8, 14])
def test_a_black_image_has_a_gradient_of_zeros_and_comes_back(channels):
    modules = [nn.Conv2d(3, channels, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * channels, 4)]
    network, black = sequential(*modules), torch.zeros_like(IMAGE)
    gradients = rgap.client_gradients(network, black, torch.tensor([1]), "cross_entropy")
    result = rgap.reconstruct(network, gradients, SHAPE, "cross_entropy")
    assert not gradients[0].any() and result.verdict == "exact"
    assert_close(result.images, black, rtol=0, atol=1e-12)


def test_a_batch_needs_the_gradients_of_all_fully_connected_layers():
    network = fcn(bias=True)
    images, labels = batch(3)
    for given in three_ways(network, rgap.client_gradients(network, images, labels), ("3.weight", "3.bias")):
        with pytest.raises(rgap.GradientMismatchError, match=r"'3.weight' is zero or not shared; a batch"):
            rgap.reconstruct(network, given, (1, 6, 6), batch_size=3, gradient_scale=1.0)


def test_a_confident_softmax_in_float32_is_recovered():
    network = with_outputs(10).float()
    with torch.no_grad():
        z = network(IMAGE.float())[0]
        network[-1].bias[3] += 11.5 - (z[3] - z[torch.arange(10) != 3].logsumexp(0))
    result = rgap.reconstruct(network, gradients_for(network, label=3, loss="cross_entropy"), SHAPE, "cross_entropy")
    assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, IMAGE).item() > 80


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_the_label_is_found_and_a_wrong_one_is_refused_or_flagged(label, bias):
    network = small_cnn(bias=bias)
    gradients = gradients_for(network, label=label)
    assert attack(network, gradients).labels.tolist() == [label]
    right = attack(network, gradients, labels=torch.tensor([label]))
    assert_close(right.images, IMAGE, rtol=0, atol=1e-9)
    if bias:
        with pytest.raises(rgap.GradientMismatchError, match=f"label {1 - label} was given; .* is that of {label}"):
            attack(network, gradients, labels=[1 - label])
    else:
        wrong = attack(network, gradients, labels=[1 - label])
        assert wrong.verdict == "inconsistent" and wrong.labels.tolist() == [1 - label]
        assert "no hypothesis reproduces the gradient" in wrong.notes[-1]


@pytest.mark.parametrize(("mu", "largest"), [(0.3, 1.0), (0.9, 1.0), (1.0, 0.5), (2.0, 1.0), (4.0, 1.0)])
def test_twins_have_one_gradient_and_only_the_pixel_range_can_choose(mu, largest):
    image = IMAGE * largest / IMAGE.max()
    network = with_margin(mu, image)
    gradients = gradients_for(network, image)
    result = attack(network, gradients)
    assert len(result.candidates) == 2
    first, second = (gradients_for(network, c.images) for c in result.candidates)
    for one, other, shared in zip(first, second, gradients, strict=True):
        assert (one - other).norm() < 1e-12 * shared.norm()
    assert min((c.images - image).abs().max() for c in result.candidates) < 1e-9
    ratio = result.candidates[1].images / result.candidates[0].images
    assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-9, atol=0)
    if sum(c.in_pixel_range for c in result.candidates) == 2:
        assert result.verdict == "ambiguous" and "twin data" in result.notes[-1]
        assert mu > 1.278 or largest < 1
    else:
        assert result.verdict == "exact" and "the pixel range chose between 2 hypotheses" in result.notes[-2]
        assert mu < 1.278 and rgap.metrics.psnr_db(result.images, image).item() > 200


def test_the_pixel_range_is_an_argument():
    network = with_margin(0.9)
    gradients = gradients_for(network)
    assert attack(network, gradients).verdict == "exact"
    assert attack(network, gradients, pixel_range=(0.0, 5.0)).verdict == "ambiguous"
    nowhere = attack(network, gradients, pixel_range=(-2.0, -1.0))
    assert nowhere.verdict == "ambiguous" and "no consistent hypothesis lies inside" in nowhere.notes[-2]
    for bias, verdict in ((False, "ambiguous"), (True, "exact")):  # a bias determines the brightness
        network = small_cnn(bias=bias)
        alone = attack(network, gradients_for(network), pixel_range=(-2.0, -1.0))
        assert alone.verdict == verdict and not alone.candidates[0].in_pixel_range


def test_a_range_that_is_open_above_still_has_its_lower_end():
    gradients = gradients_for(NETWORK, IMAGE - 0.5)
    result = attack(NETWORK, gradients, pixel_range=(0.0, float("inf")))
    assert not result.candidates[0].in_pixel_range


@pytest.mark.parametrize("bias", [False, True])
def test_the_mean_gradient_of_a_batch_is_that_of_no_image(bias):
    network = small_cnn(bias=bias)
    gradients = rgap.client_gradients(network, rand(3, *SHAPE), torch.tensor([0, 1, 1]))
    result = attack(network, gradients)
    assert result.verdict == "inconsistent" and len(result.candidates) == 1
    assert result.candidates[0].gradient_residual > 0.01
    assert any("if it may be that of a batch, give batch_size, or None to find it" in note for note in result.notes)


def test_a_gradient_below_the_smallest_c_is_noted_and_flagged():
    network = with_margin(3.0)
    result = attack(network, [20 * g for g in gradients_for(network)])
    assert result.verdict == "inconsistent" and "the smallest of any single sample" in result.notes[0]


@pytest.mark.parametrize("declared", [None, 1e-6])
def test_noise_is_found_or_declared_and_the_error_that_it_leaves_is_predicted(declared):
    noisy = client.gaussian_noise(gradients_for(NETWORK), 1e-6, seed=1)
    result = attack(NETWORK, noisy, noise_std=declared)
    assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, IMAGE).item() > 30
    rmse = (result.images - IMAGE).square().mean().sqrt().item()
    assert rmse / 3 < result.candidates[0].predicted_error < 3 * rmse
    assert result.candidates[0].predicted_error == result.layers[-1].predicted_error
    assert ("noise of standard deviation" in " ".join(result.notes)) == (declared is None)


def test_noise_that_drowns_the_image_leaves_no_certificate():
    noisy = client.gaussian_noise(gradients_for(NETWORK), 1e-2, seed=1)
    result = attack(NETWORK, noisy)
    assert result.verdict == "inconsistent" and result.candidates[0].predicted_error > 0.1


def test_images_that_overflow_are_never_consistent():
    network = small_cnn()
    gradients = gradients_for(network)
    gradients[0] = gradients[0] * 1e308 / gradients[0].abs().max()
    gradients[2] = gradients[2] * 1e-300
    assert attack(network, gradients).verdict == "inconsistent"


def test_the_smallest_gradients_of_confident_networks_are_attacked():
    network = with_margin(400.0)
    assert attack(network, gradients_for(network)).verdict == "ambiguous"


def test_an_attack_runs_where_autograd_is_off():
    gradients = gradients_for(NETWORK)
    with torch.no_grad():
        assert attack(NETWORK, gradients).verdict == "exact"


@pytest.mark.parametrize("training", [False, True])
def test_model_gradients_mode_and_generator_stay(training):
    network = small_cnn(bias=True).train(training)
    gradients = gradients_for(network)
    marks, state = [torch.ones_like(p) for p in network.parameters()], torch.get_rng_state()
    for p, mark in zip(network.parameters(), marks, strict=True):
        p.grad = mark
    before, copies = [p.clone() for p in network.parameters()], [g.clone() for g in gradients]
    attack(network, gradients)
    assert network.training is training and torch.get_rng_state().equal(state)
    for p, mark, value in zip(network.parameters(), marks, before, strict=True):
        assert p.equal(value) and p.grad is mark and mark.equal(torch.ones_like(p))
    assert all(g.equal(copy) for g, copy in zip(gradients, copies, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "cnn6"}, "model is a str; give an nn.Module or a Chain"),
        ({"image_shape": None}, "image_shape is missing; give .channels, height, width., or a Chain"),
        ({"image_shape": (3, 9, 9)}, "does not fit the network at layer '5'"),
        ({"model": rgap.prepare(NETWORK, SHAPE), "image_shape": (3, 9, 9)}, "prepared for images"),
        ({"model": sequential(nn.Flatten(), nn.Linear(192, 10))}, "'1' has 10 outputs; the logistic loss takes 1$"),
        ({"loss": "cross_entropy"}, "'5' has 1 outputs; the cross_entropy loss takes 2 or more"),
        ({"model": sequential(nn.GELU(), nn.Flatten(), nn.Linear(192, 1))}, "'0' .GELU. cannot be inverted"),
        ({"gradients": []}, "0 gradients for 6 parameters"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; known: "),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"pixel_range": (1.0, 0.0)}, r"pixel_range is \(1.0, 0.0\); give .smallest, largest"),
        ({"rcond": -1e-3}, "rcond is -0.001; it must be at least 0 and below 1"),
        ({"noise_std": -1.0}, "noise_std is -1.0; it must be at least 0"),
        ({"labels": [2]}, r"labels are \[2\]; a single image of the logistic loss takes \[0\] or \[1\]"),
        ({"model": TEN, "loss": "mse", "labels": [10]}, r"\[10\]; a single image of the mse loss takes \[0\] to \[9\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    given = {"model": NETWORK, "gradients": gradients_for(NETWORK), "image_shape": SHAPE, **arguments}
    with pytest.raises(ValueError, match=message):
        rgap.reconstruct(**given, gradient_scale=1.0)


TARGET = torch.tensor([[0.3, -1.2, 0.8, 2.0]]).double()


@pytest.mark.parametrize("known", [{}, {"labels": TARGET}, {"labels": TARGET.tolist(), "gradient_scale": 1.0}])
def test_a_regressions_image_follows_with_its_target(known):
    network = with_outputs(4)
    found = rgap.reconstruct(network, rgap.client_gradients(network, IMAGE, TARGET, "mse"), SHAPE, "mse", **known)
    assert found.verdict == "exact" and rgap.metrics.psnr_db(found.images, IMAGE).item() > 150
    assert_close(found.labels, TARGET, rtol=1e-8, atol=1e-8)
    assert bool(known) != any("a real-valued target does: (0.3, -1.2, 0.8, 2)" in note for note in found.notes)


@pytest.mark.parametrize("outputs", [2, 4])
def test_without_biases_a_regressions_brightness_is_open_until_its_target_is_given(outputs):
    network, target = with_outputs(outputs, bias=False), TARGET[:, :outputs]
    gradients = rgap.client_gradients(network, IMAGE, target, "mse")
    for options in ({}, {"gradient_scale": 1.0}):
        found = rgap.reconstruct(network, gradients, SHAPE, "mse", **options)
        assert found.verdict == "ambiguous" and any("brightness is not determined" in note for note in found.notes)
    found = attack(network, gradients, "mse", labels=target)
    assert found.verdict == "exact" and rgap.metrics.psnr_db(found.images, IMAGE).item() > 150


@pytest.mark.parametrize(("loss", "labels"), [("mse", TARGET[:, :3]), ("cross_entropy", TARGET)])
def test_targets_that_do_not_fit_are_refused(loss, labels):
    with pytest.raises(ValueError, match="only the mse loss has such targets, here of shape"):
        rgap.reconstruct(with_outputs(4), gradients_for(with_outputs(4), loss=loss), SHAPE, loss, labels=labels)


@pytest.mark.parametrize("factor", [1e300, 1e-250])
def test_the_factor_of_hugely_scaled_gradients_is_that_of_the_gradients_as_they_came(factor):
    gradients = [factor * g for g in gradients_for(TEN, loss="cross_entropy")]
    found = rgap.reconstruct(TEN, gradients, SHAPE, "cross_entropy")
    assert found.verdict == "exact" and found.gradient_scale / factor == pytest.approx(1, abs=1e-6)


def test_a_network_that_branches_on_data_is_refused_once():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x):
            return self.inner(x + 1 if x.sum() > 0 else x)

    with pytest.raises(rgap.UnsupportedLayerError, match="decides on values of the image") as error:
        rgap.reconstruct(Branching(), gradients_for(NETWORK), SHAPE)
    assert str(error.value).count("decides on values") == 1


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_dense_systems_on_another_device_give_the_same_image(device, monkeypatch):
    monkeypatch.setattr("rgap.linalg.matrices.MIN_ON_ACCELERATOR", 64)
    model = rgap.models.cnn6()
    images, labels = rgap.data.load_images(count=1, classes=2)
    shared = rgap.client_gradients(model, images, labels)
    expected = rgap.reconstruct(model, shared, (3, 32, 32), gradient_scale=1.0)
    where = lambda _: dense_systems_on(torch.device(device))  # noqa: E731  # device="cpu" itself keeps to LAPACK
    monkeypatch.setattr(sys.modules["rgap.attack.reconstruct"], "dense_systems_on", where)
    found = rgap.reconstruct(model, shared, (3, 32, 32), gradient_scale=1.0)
    assert found.verdict == expected.verdict == "exact"
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-10)
