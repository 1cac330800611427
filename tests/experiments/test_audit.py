import numpy as np
import pandas as pd
import pytest
import torch
from cases import rand, randn, rendered, small_cnn

import rgap
from rgap import client
from rgap.experiments import audit as experiment
from rgap.experiments.audit import DEFENCES, defended, strengths_of
from rgap.experiments.vision_transformers import small_transformer
from rgap.ranks.rebuild import with_convolution

SHAPE = (3, 8, 8)


def test_what_is_audited_as_a_leak_is_recovered_and_what_stops_is_not():
    narrow = with_convolution(small_cnn(), SHAPE, "0", out_channels=2)
    networks = {"small": small_cnn(), "narrow": narrow}
    runs = experiment.audited_and_attacked(networks, rand(1, *SHAPE), torch.tensor([1]))
    assert runs["network"].tolist() == ["small", "narrow"]
    assert runs["outcome"].tolist() == ["leaks", "stops"]
    assert runs["verdict"].tolist() == ["exact", "rank-deficient"] and runs["agrees"].all()
    assert runs["psnr_db"][0] > 100 > runs["psnr_db"][1]
    assert runs["missing"][0] == 0 < runs["missing"][1]


def test_a_stronger_defence_leaves_less():
    chain, image = rgap.prepare(small_cnn(), SHAPE), rand(1, *SHAPE)
    gradients = rgap.client_gradients(small_cnn(), image, torch.tensor([1]))
    table, found = experiment.attacks_under_defence(chain, gradients, image, "gaussian_noise", [0, 1e-8, 1e-2])
    assert found.shape == (3, *SHAPE) and isinstance(table, pd.DataFrame)
    assert table["psnr_db"].is_monotonic_decreasing and table["verdict"][0] == "exact" != table["verdict"][2]


def test_defences_are_those_of_the_client():
    shared = [randn(40)]
    assert torch.equal(defended(shared, "prune", 0.5)[0], client.prune(shared, 0.5)[0])
    assert torch.equal(defended(shared, "clip_and_noise", 0.1)[0], client.clip_and_noise(shared, 1.0, 0.1)[0])
    assert defended(shared, "gaussian_noise", 0) is shared
    for call in (lambda: defended(shared, "hope", 1), lambda: strengths_of("hope")):
        with pytest.raises(ValueError, match="defence is 'hope'; it must be one of gaussian_noise, clip_and_noise"):
            call()


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_strength_on_the_menu_can_be_had_and_only_the_first_changes_nothing(defence):
    shared = [randn(2000).float()]
    for strength in strengths_of(defence):
        changed = not torch.equal(defended(shared, defence, strength)[0], shared[0])
        small = isinstance(strength, float) and strength < 1e-7  # below what float32 resolves
        assert changed == (strength != strengths_of(defence)[0]) or small


def test_an_attacker_expects_the_noise_that_it_knows_of():
    assert experiment.noise_of("gaussian_noise", 1e-5) == 1e-5
    assert experiment.noise_of("gaussian_noise", 0) is None and experiment.noise_of("quantise", "int8") is None


def test_an_audits_bars_are_shares_of_the_unknowns_with_the_numbers_beside_them():
    rows = [("conv", "convolution", 200, 0, 0, "determined"), ("narrow", "convolution", 100, 40, 30, "open")]
    rows += [("2.0", "convolution", 100, 40, 90, "closable"), ("block", "residual block", 100, None, None, "unknown")]
    steps = pd.DataFrame(rows, columns=["name", "kind", "unknowns", "deficit", "supply", "status"])
    steps = steps.astype({"deficit": "Int64", "supply": "Int64"})
    (axis,) = rendered(experiment.plot_audit({"a network": steps}))
    widths = np.array([bar.get_width() for bar in axis.patches]).reshape(4, 3)
    np.testing.assert_allclose(widths, [[100, 100, 0], [100, 60, 30], [100, 60, 40], [100, 0, 0]])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["conv1", "conv2", "conv3", "block"]
    assert [text.get_text() for text in axis.texts] == [
        "200 unknowns: gives its input away",
        "100 unknowns, 40 missing: stays open",
        "100 unknowns, 40 missing: gives its input away with the step before",
        "100 unknowns: whether it leaks is not known",
    ]
    assert [text.get_text() for text in axis.get_legend().get_texts()][-1] == "not known"


@pytest.mark.parametrize(
    "name", [*rgap.models.IMAGE_SHAPES, pytest.param("resnet18", marks=pytest.mark.slow), "own transformer"]
)
def test_every_network_and_loss_that_the_notebook_offers_has_a_verdict(name):
    if name == "own transformer":
        model, shape = small_transformer(24, 1, 0, size=8, patch=2, classes=5), SHAPE
    else:
        model, shape = rgap.models.load_model(name)
    network = experiment.attackable(model, list(shape))
    loss, classes = experiment.fitting_loss(network), experiment.classes_of(network)
    image, label = rgap.data.load_images("embedded", image_shape=shape, index=6, classes=classes)
    for used in (loss, "mse"):
        gradients = rgap.client_gradients(model, image, label % 5, used)
        if name in ("cnn6_d", "lenet", "resnet18"):  # seconds each, attacked by tests of their own
            continue
        table, _ = experiment.attacks_under_defence(network, gradients, image, "gaussian_noise", [0], loss=used)
        assert table["verdict"].tolist() == ["exact"]
