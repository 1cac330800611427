"""Verdicts on candidates; a factor on the whole gradient is estimated where it can be, and never certifies wrongly."""

import math
from dataclasses import replace

import pytest
import torch
from cases import SHAPE as MLP_SHAPE
from cases import fcn, gradients, rand, small_cnn
from torch import nn

import rgap
from rgap.attack.candidates import Weighed
from rgap.attack.verdict import about_brightness, factor_of, judge
from rgap.head.hypothesis import Start, Twin
from rgap.results import Candidate, PixelRange

LABEL = torch.tensor([1])


def candidate(residual, size=1.0):
    return Candidate(
        torch.full((1, 1, 2, 2), size).double(),
        LABEL,
        residual,
        0 <= size <= 1,
        residual_allowed=1e-3,
        predicted_error=1e-6,
    )


def start():
    """A start of its own, whose image has no twin."""
    return Start(0, LABEL, torch.zeros(1, 4), torch.zeros(1, 4), ((Twin(1),),), ())


@pytest.mark.parametrize(
    ("residuals", "verdict", "kept"),
    [
        ([1e-2, 1.001e-2], "inconsistent", 2),
        ([1e-2, 2e-2], "inconsistent", 1),
        ([math.inf, math.inf], "inconsistent", 1),
        ([1e-4, 1e-2], "exact", 1),
        ([1e-4, 2e-4], "ambiguous", 2),
    ],
)
def test_hypotheses_that_miss_the_gradient_alike_stay_together(residuals, verdict, kept):
    weighed = [Weighed(start(), candidate(residual, 0.9)) for residual in residuals]
    result = judge(weighed, [], PixelRange())
    assert result.verdict == verdict and len(result.candidates) == kept


def test_twins_are_consistent_together_whatever_each_misses():
    together = start()
    weighed = [Weighed(together, candidate(residual, size)) for residual, size in ((1e-4, 0.3), (0.2, 0.9))]
    result = judge(weighed, [], PixelRange())
    assert result.verdict == "ambiguous" and all(c.consistent for c in result.candidates)
    assert [c.certified_psnr_db for c in result.candidates] == [pytest.approx(120)] * 2
    assert result.certified_psnr_db is None and "twin data" in result.notes[-1]
    outside = replace(weighed[0], joint=replace(weighed[0].joint, in_pixel_range=False))
    chosen = judge([outside, weighed[1]], [], PixelRange())
    assert chosen.verdict == "exact" and chosen.images.max() == pytest.approx(
        0.9
    )  # the misfit decides nothing between twins
    assert "the pixel range chose between 2 hypotheses" in chosen.notes[-2]


@pytest.mark.parametrize(("error", "verdict", "psnr"), [(1e-5, "exact", 100), (9e-3, "exact", 41), (0.011, None, 39)])
def test_a_certificate_says_its_accuracy_and_ends_at_a_hundredth_of_the_range(error, verdict, psnr):
    joint = replace(candidate(1e-4, 0.5), predicted_error=2 * error, images=torch.ones(1, 1, 2, 2).double())
    result = judge([Weighed(start(), joint)], [], PixelRange(-1.0, 1.0))
    assert result.verdict == (verdict or "inconsistent")
    if verdict:
        assert result.certified_psnr_db == result.candidates[0].certified_psnr_db == pytest.approx(psnr, abs=0.5)
        assert f"the image is certified to {psnr} dB, by a predicted error of" in result.notes[-1]
    else:
        assert result.certified_psnr_db is None and result.candidates[0].certified_psnr_db is None
        assert f"the gradient's noise limits the accuracy to {psnr} dB" in result.notes[-1]


def test_without_a_predicted_error_nothing_is_certified():
    result = judge([Weighed(start(), replace(candidate(1e-4, 0.5), predicted_error=None))], [], PixelRange())
    assert result.verdict == "inconsistent" and "could not be predicted" in result.notes[-1]


IMAGE, LABEL = rgap.data.load_images("embedded", count=1, image_shape=(3, 32, 32))[0], torch.tensor([3])


def attacked(network, shared, image, loss="cross_entropy", **options):
    result = rgap.reconstruct(network, shared, tuple(image.shape[1:]), loss, **options)
    return result, rgap.metrics.psnr_db(result.images, image.double()).item()


@pytest.fixture(scope="module")
def lenet():
    network = rgap.models.lenet()
    return rgap.prepare(network, (3, 32, 32)), rgap.client_gradients(network, IMAGE, LABEL, "cross_entropy")


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.0, None),
        (0.25, "0.25 (averaged over 4, or clipped)"),
        (8.0, "8 (summed over 8, or scaled)"),
        (0.37, "0.37 (clipped, or a class weight)"),
        (65536.0, "65536 (summed over 65536, or scaled)"),
    ],
)
def test_ten_classes_without_bias_give_factor_and_image(lenet, factor, words):
    chain, shared = lenet
    result = rgap.reconstruct(chain, [factor * g for g in shared], loss="cross_entropy")
    assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, IMAGE.double()) > 90
    assert result.gradient_scale == pytest.approx(factor, rel=1e-5)
    assert any(words in note for note in result.notes) if words else "times" not in " ".join(result.notes)


def test_smoothed_labels_are_found_or_given(lenet):
    chain, _ = lenet
    shared = rgap.client_gradients(chain.model, IMAGE, LABEL, "cross_entropy", label_smoothing=0.1)
    for options in ({}, {"label_smoothing": 0.1}, {"gradient_scale": 1.0}):
        result = rgap.reconstruct(chain, shared, loss="cross_entropy", **options)
        assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, IMAGE.double()) > 90


def test_a_wrong_assertion_is_refuted():
    network, image = fcn((40, 20), 10), rand(1, *MLP_SHAPE)
    shared = rgap.client_gradients(network, image, torch.tensor([1]), "cross_entropy", label_smoothing=0.1)
    assert attacked(network, shared, image)[0].verdict == "exact"
    for options in ({"label_smoothing": 0.0}, {"gradient_scale": 1.0, "label_smoothing": 0.0}, {"gradient_scale": 0.5}):
        assert attacked(network, shared, image, **options)[0].verdict != "exact"


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "smoothing"), [(0.25, 0.0), (1.0, 0.1), (0.3, 0.1)])
def test_nearly_equal_outputs_do_not_tell_a_factor_from_smoothing(factor, smoothing):
    """CNN6 with ten classes in float32, which was certified at 9 dB: exact only where one of the two is given."""
    network = rgap.models.cnn6(classes=10)
    shared = rgap.client_gradients(network, IMAGE, LABEL, "cross_entropy", label_smoothing=smoothing)
    shared = [factor * g for g in shared]
    result, _ = attacked(network, shared, IMAGE)
    assert result.verdict in ("ambiguous", "inconsistent")
    known, quality = attacked(network, shared, IMAGE, label_smoothing=smoothing)
    assert known.verdict == "exact" and quality > 70 and known.gradient_scale == pytest.approx(factor, rel=1e-3)


def test_one_output_without_biases_leaves_the_brightness_open():
    network, image = small_cnn(), rand(1, 3, 8, 8)
    shared = rgap.client_gradients(network, image, torch.tensor([1]))
    for factor in (1.0, 3.0):
        result, quality = attacked(network, [factor * g for g in shared], image, "logistic")
        assert result.verdict == "ambiguous" and result.gradient_scale is None
        assert result.candidates[0].predicted_error < 1e-12 and result.candidates[0].certified_psnr_db is None
        assert "brightness is not determined" in result.notes[-1] and "the pattern holds" in result.notes[-1]
        along = (result.images * image).sum() / (result.images.norm() * image.norm())
        assert along > 1 - 1e-12 and (factor != 1 or quality > 200)
        known, quality = attacked(network, [factor * g for g in shared], image, "logistic", gradient_scale=factor)
        assert known.verdict == "exact" and quality > 200 and known.gradient_scale == factor
    for wrong in [[2 * g for g in shared], rgap.client_gradients(network, image, torch.tensor([0]), "mse")]:
        result, _ = attacked(network, wrong, image, "logistic", gradient_scale=1.0)
        assert result.verdict == "ambiguous" and result.candidates[0].certified_psnr_db is None
        assert "which images outside of the pixel range contradict" in result.notes[-1]


def test_a_clipped_gradient_of_such_a_network_is_not_certified():
    network, image = small_cnn(), rand(1, 3, 8, 8)
    shared = rgap.client_gradients(network, image, torch.tensor([1]))
    norm = math.hypot(*(g.norm().item() for g in shared))
    result, _ = attacked(network, rgap.client.clip_and_noise(shared, norm / 2, 0.0), image, "logistic")
    assert result.verdict == "ambiguous"


@pytest.mark.parametrize("factor", [65536.0, 1e-3])
@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.2), nn.Tanh()])
@pytest.mark.parametrize(("outputs", "loss"), [(1, "logistic"), (1, "mse"), (5, "cross_entropy"), (5, "mse")])
def test_with_biases_the_factor_follows(outputs, loss, activation, factor):
    network, image = fcn((40, 20), outputs, bias=True, activation=activation), rand(1, *MLP_SHAPE)
    shared = [factor * g for g in gradients(network, image, torch.tensor([1]), loss)]
    result, quality = attacked(network, shared, image, loss)
    assert result.verdict == "exact" and quality > 80
    if (outputs, loss) != (1, "mse"):  # an output beyond ±1 may be of either label
        assert result.gradient_scale == pytest.approx(factor, rel=1e-4)


def test_what_is_said_of_brightness():
    def candidate(factor, error):
        return Candidate(torch.zeros(1), torch.tensor([0]), 0.0, True, gradient_scale=factor, brightness_error=error)

    assert about_brightness([candidate(1.0, 0.0)]) == [] and factor_of([candidate(1.0, 0.0)]) == 1.0
    assert "determined to 5.0% only" in about_brightness([candidate(1.0, 0.05)])[0]
    assert "not determined" in about_brightness([candidate(1.0, math.inf)])[0]
    assert factor_of([candidate(2.0, 0.0), candidate(4.0, 0.0)]) == 3.0
    assert factor_of([candidate(2.0, 0.0), candidate(4.0, math.inf)]) is None


@pytest.mark.parametrize(
    ("loss", "margin"),
    [
        ("mse", 1 - 1e-4),
        ("mse", 1 - 1e-5),
        ("mse", 1 + 1e-4),
        ("logistic", 1.27846),
        ("logistic", 1.2785),
        ("logistic", 1.28),
        ("logistic", 90.0),
        ("logistic", 100.0),
    ],
)
def test_where_the_scale_is_ill_conditioned_no_wrong_image_is_certified(loss, margin):
    """A well fitted squared error, the fold of the logistic margins, and gradients that are denormal in float32."""
    for seed in range(2):
        network, image, label = small_cnn(seed), rand(1, 3, 8, 8, seed=seed), seed % 2
        with torch.no_grad():
            network[-1].weight.mul_(margin * (2 * label - 1) / network(image).item())
        shared = rgap.client_gradients(network.float(), image.float(), torch.tensor([label]), loss)
        result, quality = attacked(network, shared, image, loss, gradient_scale=1.0)
        error = (result.images - image).square().mean().sqrt().item()
        assert result.verdict != "exact" or error < 3 * result.candidates[0].predicted_error or quality > 50
        if margin < 50:
            assert max(rgap.metrics.psnr_db(c.images, image).item() for c in result.candidates) > 50
